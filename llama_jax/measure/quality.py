"""Quality of a quantised model: divergence of its predictions from those of the original model, over a text.

The protocol is llama.cpp's (tools/perplexity): windows of the text are independent, and the second half of each is
scored, so that every prediction has seen at least half a window. Only the reference's last hidden states are kept, from
which its logits are recomputed beside the other model's; its log-probabilities would take a hundred times as much.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint import Progress
from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError
from llama_jax.kernels.dispatch import using
from llama_jax.model import forward, unembed
from llama_jax.model.loaded import Model
from llama_jax.params import Params
from llama_jax.sharding import on

WINDOW = 512
"""Tokens of one window."""
ROWS = 4
"""Number of windows that are computed together."""


@dataclass(frozen=True)
class Quality:
    """A model's predictions compared with those of its reference.

    Standard errors treat windows, not tokens, as independent.

    Attributes:
      tokens: number of predicted tokens.
      perplexity, reference_perplexity: exp of the mean negative log-probability of the text's own tokens.
      log_ratio: log(perplexity / reference_perplexity), and `log_ratio_error`, its standard error.
      kl: mean Kullback-Leibler divergence of the model from its reference, in nats per token; `kl_error`: its
        standard error.
      same_top: share of the predictions whose likeliest token is the reference's.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float
    log_ratio: float
    log_ratio_error: float
    kl: float
    kl_error: float
    same_top: float


@dataclass(frozen=True)
class Reference:
    """A reference model's run over a text, to compare other models with.

    Attributes:
      model: in the precision that counts as exact.
      windows: int32 [windows, length], the text's tokens.
      hidden: [windows, scored, hidden_size], from which the model's logits are computed.
    """

    model: Model
    windows: np.ndarray
    hidden: np.ndarray


def windows(tokens: list[int] | np.ndarray, length: int = WINDOW) -> np.ndarray:
    """A text's tokens in independent windows: int32 [windows, length]; the remainder is dropped.

    Raises:
      RequestError: there are not enough for two windows, which a standard error needs.
    """
    ids = np.asarray(tokens, np.int32)
    if len(ids) < 2 * length:
        raise RequestError(
            f"the text has {len(ids)} tokens, which do not fill two windows of {length}",
            param="text",
            hint="take a longer text; 100 KB give a standard error that tells methods apart",
        )
    return ids[: len(ids) // length * length].reshape(-1, length)


def refer(model: Model, text: np.ndarray, progress: Progress | None = None) -> Reference:
    """Runs the reference once.

    Args:
      text: int32 [windows, length], from `windows`.
      progress: called after each group of windows, with the number of tokens.
    """
    return Reference(model, text, np.concatenate([_hidden(model, part) for part in _parts(text, progress)]))


def compare(model: Model, reference: Reference, progress: Progress | None = None) -> Quality:
    """Runs a model over the reference's text, and compares each prediction of the second half of each window.

    Raises:
      RequestError: the models have different vocabularies.
    """
    theirs = reference.model
    if model.config.vocab_size != theirs.config.vocab_size:
        raise RequestError(
            f"the models have {model.config.vocab_size} and {theirs.config.vocab_size} tokens",
            param="reference",
            hint="compare a model with the one that it was made of",
        )
    found, at = [], 0
    for part in _parts(reference.windows, progress):
        hidden = _hidden(model, part)
        for ours, its, window in zip(hidden, reference.hidden[at : at + len(part)], part, strict=True):
            logits = _logits(model, ours), _logits(theirs, its)
            found.append(jax.device_get(compared(*logits, window[-len(ours) :])))
        at += len(part)
    return summary({name: np.stack([window[name] for window in found]) for name in found[0]})


def _parts(text: np.ndarray, progress: Progress | None) -> Iterator[np.ndarray]:
    for at in range(0, len(text), ROWS):
        yield text[at : at + ROWS]
        if progress:
            progress(min(at + ROWS, len(text)) * text.shape[1], text.size, "tokens")


def _hidden(model: Model, rows: np.ndarray) -> np.ndarray:
    """The hidden states for the logits of each row's second half: [rows, length / 2, hidden_size]."""
    with on(model.mesh), using(**model.kernels):
        return np.asarray(_last_hidden(model.params, model.config, jnp.asarray(rows)))


@partial(jax.jit, static_argnums=1)
def _last_hidden(params: Params, config: LlamaConfig, rows: jax.Array) -> jax.Array:
    # The last token predicts a token of another window.
    scored = jnp.arange(rows.shape[1] // 2 - 1, rows.shape[1] - 1, dtype=jnp.int32)
    at = jnp.broadcast_to(scored, (len(rows), len(scored)))
    _, _, seen = forward(params, config, rows, logits_at=at, capture=("final_norm",))
    return seen["final_norm"]


def _logits(model: Model, hidden: np.ndarray) -> jax.Array:
    with on(model.mesh), using(**model.kernels):
        return _unembed(model.params, model.config, jnp.asarray(hidden))


@partial(jax.jit, static_argnums=1)
def _unembed(params: Params, config: LlamaConfig, hidden: jax.Array) -> jax.Array:
    return unembed(params, config, hidden)


@jax.jit
def compared(ours: jax.Array, theirs: jax.Array, text: jax.Array) -> dict[str, jax.Array]:
    """Means over the predictions of a window, from logits [scored, vocab] and the actual tokens [scored]."""
    ours, theirs = jax.nn.log_softmax(ours), jax.nn.log_softmax(theirs)
    came = text[:, None]
    return {
        "loss": -jnp.mean(jnp.take_along_axis(ours, came, axis=1)),
        "reference_loss": -jnp.mean(jnp.take_along_axis(theirs, came, axis=1)),
        "kl": jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=1)),
        "same_top": jnp.mean(jnp.argmax(ours, axis=1) == jnp.argmax(theirs, axis=1)),
        "tokens": jnp.asarray(len(text)),
    }


def summary(found: Mapping[str, np.ndarray]) -> Quality:
    """Figures of a text from those of its windows, as returned by `compared`, stacked."""
    loss, reference, kl = (found[name].astype(np.float64) for name in ("loss", "reference_loss", "kl"))

    def error(of_windows: np.ndarray) -> float:
        return float(np.std(of_windows, ddof=1) / np.sqrt(len(of_windows)))

    return Quality(
        int(found["tokens"].sum()),
        float(np.exp(loss.mean())),
        float(np.exp(reference.mean())),
        float((loss - reference).mean()),
        error(loss - reference),
        float(kl.mean()),
        error(kl),
        float(found["same_top"].astype(np.float64).mean()),
    )
