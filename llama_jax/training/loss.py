"""Next-token cross entropy, and losses that are functions of it. Logits exist for some tokens at a time, and never as
float32 [batch, len, vocab]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.config import LlamaConfig
from llama_jax.model import forward, weights
from llama_jax.model.adapters import ATTACHED
from llama_jax.params import Params
from llama_jax.sharding import constrain, share
from llama_jax.training.batch import Batch, targets

LOGITS = 2**28
"""Logits that exist at once on a device, at most: 1 GiB."""


class Objective(Protocol):
    """A loss that is a mean, over tokens or over what they are grouped into."""

    def count(self, batch: Batch) -> jax.Array:
        """The number of members of the mean in a batch, a float32 scalar."""

    def __call__(
        self, params: Params, config: LlamaConfig, batch: Batch, *, remat: str, logits: int
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The sum over them, differentiable in `params`, and further sums to report; for the arguments see `loss`."""


@dataclass(frozen=True)
class CrossEntropy:
    """The cross entropy of learned tokens: `loss`."""

    def count(self, batch: Batch) -> jax.Array:
        return jnp.sum(targets(batch)[1], dtype=jnp.float32)

    def __call__(
        self, params: Params, config: LlamaConfig, batch: Batch, *, remat: str = "none", logits: int = LOGITS
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        return loss(params, config, batch, remat=remat, logits=logits)[0], {}


CROSS_ENTROPY: Objective = CrossEntropy()


def loss(
    params: Params,
    config: LlamaConfig,
    batch: Batch,
    *,
    remat: str = "none",
    logits: int = LOGITS,
    **forwarded: Any,
) -> tuple[jax.Array, jax.Array]:
    """The sum of the cross entropy of all learned tokens, and their number: the loss of a batch is their quotient.

    Both can be added up over the parts of a batch. Pure and differentiable in `params` (and in `adapters`), whose
    floating-point dtype is computed with; sums are in float32.

    Args:
      params: parameter tree, canonical or fused.
      remat: what gradients keep of each layer, a name in `llama_jax.model.remat.REMAT`.
      logits: logits that exist at once on a device, at most.
      forwarded: further arguments of `forward`, such as `adapters` and `adapter_ids`.

    Returns:
      float32 scalars.
    """
    hidden = last_hidden(params, config, batch, remat=remat, **forwarded)
    wanted, learned = targets(batch)
    total = summed_cross_entropy(config, logits, _head(params), hidden, wanted, learned.astype(jnp.float32))
    return total, jnp.sum(learned, dtype=jnp.float32)


def loss_of_entropies[T](
    of: Callable[[jax.Array], tuple[jax.Array, T]],
    params: Params,
    config: LlamaConfig,
    batch: Batch,
    *,
    remat: str = "none",
    logits: int = LOGITS,
) -> tuple[jax.Array, T]:
    """A scalar function of the `entropies` of a batch, differentiable in `params`.

    Its gradient is that of the cross entropy whose tokens weigh what the function's slopes are. The logits are
    computed twice, since no slope is known before all of them have been seen.

    Args:
      of: a differentiable function of float32 [batch, len] to a float32 scalar, and to anything else.
      remat, logits: see `loss`.

    Returns:
      What the function returns.
    """
    hidden, wanted, head = last_hidden(params, config, batch, remat=remat), targets(batch)[0], _head(params)
    seen = _entropies(config, logits, *jax.lax.stop_gradient((head, hidden)), wanted)
    (value, found), slopes = jax.value_and_grad(of, has_aux=True)(seen)
    return _sloped(value, summed_cross_entropy(config, logits, head, hidden, wanted, slopes)), found


@jax.custom_jvp
def _sloped(value: jax.Array, total: jax.Array) -> jax.Array:
    """The first number, with the derivatives of the second."""
    return value


_sloped.defjvp(lambda primals, tangents: (primals[0], tangents[1]))


def entropies(params: Params, config: LlamaConfig, batch: Batch, *, logits: int = LOGITS) -> jax.Array:
    """The negative log-probability of what each token has to predict (`targets`), float32 [batch, len].

    That of a token which is not learned is a finite number without a meaning.
    """
    return _entropies(config, logits, _head(params), last_hidden(params, config, batch), targets(batch)[0])


def _entropies(config: LlamaConfig, logits: int, head: Params, hidden: jax.Array, wanted: jax.Array) -> jax.Array:
    parts = _cut(_length(config, logits, hidden), hidden, wanted)
    return _joined(jax.lax.map(lambda part: _entropy(config, head, *part)[0], parts), hidden.shape[1])


def _head(params: Params) -> Params:
    """The parameters that logits are made of, with an adapter's if there is one."""
    head = {"lm_head" if "lm_head" in params else "embed": params.get("lm_head", params["embed"])}
    adapter = params.get(ATTACHED, {}).get("lm_head")
    return head if adapter is None else {**head, ATTACHED: {"lm_head": adapter}}


def last_hidden(params: Params, config: LlamaConfig, batch: Batch, **forwarded: Any) -> jax.Array:
    """Hidden states [batch, len, hidden] that logits are made of."""
    _, _, seen = forward(params, config, batch.tokens, segment_ids=batch.segments, capture=("final_norm",), **forwarded)
    return seen["final_norm"]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def summed_cross_entropy(
    config: LlamaConfig, logits: int, head: Params, hidden: jax.Array, wanted: jax.Array, learned: jax.Array
) -> jax.Array:
    """Sum of the weighted cross entropy of tokens.

    Its gradient is made along with it, from the same logits: another pass would multiply by the vocabulary's weights
    again. The gradient with respect to the logits is rounded to the dtype of `hidden` before it is multiplied.

    Args:
      logits: how many of them exist at once, at most.
      head: the parameters "lm_head", or "embed" where the model ties the two, and perhaps an adapter of it.
      hidden: [batch, len, hidden]; wanted: int32 [batch, len]; learned: float32 [batch, len], the weight of each.

    Returns:
      A float32 scalar.
    """
    return jnp.sum(_entropies(config, logits, head, hidden, wanted) * learned)


def _forward(
    config: LlamaConfig, logits: int, head: Any, hidden: Any, wanted: Any, learned: Any
) -> tuple[jax.Array, Any]:
    leaves, structure = jax.tree.flatten(head, is_leaf=lambda x: hasattr(x, "perturbed"))
    moved = [i for i, leaf in enumerate(leaves) if leaf.perturbed]
    values = [leaf.value for leaf in leaves]
    hidden, wanted, learned = hidden.value, wanted.value, learned.value

    def rounded(hidden: jax.Array, chosen: list[jax.Array]) -> jax.Array:
        """Logits in the dtype of `hidden`, of which the gradient alone is wanted."""
        mixed = list(values)
        for i, value in zip(moved, chosen, strict=True):
            mixed[i] = value
        return _logits(config, jax.tree.unflatten(structure, mixed), hidden, hidden.dtype)

    def step(carry: Any, part: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        total, d_chosen = carry
        hidden, wanted, learned = part
        entropy, slope = _entropy(config, jax.tree.unflatten(structure, values), hidden, wanted)
        d_logits = (slope * learned[..., None]).astype(hidden.dtype)
        d_hidden, more = jax.vjp(rounded, hidden, [values[i] for i in moved])[1](d_logits)
        return (
            total + jnp.sum(entropy * learned),
            [a + b.astype(jnp.float32) for a, b in zip(d_chosen, more, strict=True)],
        ), d_hidden

    zeros = [jnp.zeros(values[i].shape, jnp.float32) for i in moved]
    parts = _cut(_length(config, logits, hidden), hidden, wanted, learned)
    (total, d_chosen), d_hidden = jax.lax.scan(step, (jnp.float32(0), zeros), parts)
    d_hidden = _joined(d_hidden, hidden.shape[1])
    d_leaves: list[Any] = [None] * len(values)
    for i, d in zip(moved, d_chosen, strict=True):
        d_leaves[i] = d.astype(values[i].dtype)
    return total, (d_hidden, jax.tree.unflatten(structure, d_leaves))


def _backward(config: LlamaConfig, logits: int, saved: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    d_hidden, d_head = jax.tree.map(lambda d: (cotangent * d).astype(d.dtype), saved)
    return d_head, d_hidden, None, None


summed_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _logits(config: LlamaConfig, head: Params, hidden: jax.Array, dtype: DTypeLike) -> jax.Array:
    tied = "lm_head" not in head
    found = weights.logits(hidden, head, tied=tied, activations=config.activations, dtype=dtype)
    return constrain(found, ("batch", "length", "vocab"))


def _length(config: LlamaConfig, logits: int, hidden: jax.Array) -> int:
    """Tokens of each row whose logits exist at once."""
    of_token = share("vocab", config.vocab_size) * share("batch", len(hidden))
    return max(1, min(hidden.shape[1], logits // of_token))


def _cut(length: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Parts [parts, batch, length, ...] of arrays [batch, len, ...]; what fills the last one up weighs nothing."""

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(len(x), -1, length, *x.shape[2:]), 1, 0)

    return tuple(cut(x) for x in arrays)


def _joined(parts: jax.Array, length: int) -> jax.Array:
    """The array [batch, length, ...] that parts [parts, batch, ...] were cut from."""
    joined = jnp.moveaxis(parts, 0, 1)
    return joined.reshape(len(joined), -1, *joined.shape[3:])[:, :length]


def _entropy(config: LlamaConfig, head: Params, hidden: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The cross entropy of each token, float32 [batch, length], and its gradient with respect to the token's logits."""
    logits = _logits(config, head, hidden, jnp.float32)
    # A comparison and not a gather, so that a split vocabulary stays split.
    own = jnp.arange(logits.shape[-1], dtype=jnp.int32) == wanted[..., None]
    above = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - above)
    sums = jnp.sum(exponentials, axis=-1, keepdims=True)
    entropy = jnp.log(sums[..., 0]) + above[..., 0] - jnp.sum(jnp.where(own, logits, 0), axis=-1)
    return entropy, exponentials / sums - own
