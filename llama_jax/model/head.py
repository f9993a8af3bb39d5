"""From hidden states to logits: the last step of `forward`, on its own."""

from __future__ import annotations

import jax

from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError
from llama_jax.kernels.norm import rms_norm
from llama_jax.model.adapters import NO_ADAPTERS, Adapters
from llama_jax.model.weights import compute_dtype, logits, norm_weight
from llama_jax.params import Params
from llama_jax.sharding import constrain


@jax.named_scope("logits")
def unembed(
    params: Params, config: LlamaConfig, x: jax.Array, *, norm: bool = False, adapters: Adapters = NO_ADAPTERS
) -> jax.Array:
    """Logits of hidden states, by the output projection, or by the embedding where the model ties the two.

    `forward` ends with it. None of the supported families scales or caps its logits; one that does would do so here.

    Args:
      params: parameter tree (`llama_jax.params`), canonical or fused.
      x: [..., hidden_size], computed with in `weights.compute_dtype(params)`. Activation "final_norm" of
        `forward(capture=)` as it is; for what comes out of a block ("layers.3.out", the logit lens) take norm=True.
      norm: whether to apply the model's final norm first.
      adapters: in slots, those of "lm_head", with an id for each of [batch, len].

    Returns:
      float32 [..., vocab_size].

    Raises:
      RequestError: the last dimension of x is not hidden_size.
    """
    if not x.ndim or x.shape[-1] != config.hidden_size:
        raise RequestError(
            f"hidden states of shape {list(x.shape)} for a model with hidden_size {config.hidden_size}",
            param="x",
            hint="pass [..., hidden_size], e.g. what forward(capture=('final_norm',)) gives",
        )
    x = x.astype(compute_dtype(params))
    if norm:
        x = rms_norm(x, norm_weight(params["final_norm"]), config.rms_norm_eps)
    out = logits(x, params, tied=config.tie_word_embeddings, adapters=adapters, activations=config.activations)
    leading = ("batch", "length")[: x.ndim - 1]
    return constrain(out, (*leading, *[None] * (x.ndim - 1 - len(leading)), "vocab"))
