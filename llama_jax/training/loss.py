"""Next-token cross entropy. Logits exist for some tokens at a time, and never as float32 [batch, len, vocab]."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig
from llama_jax.model import forward, unembed
from llama_jax.model.weights import linear
from llama_jax.params import Params
from llama_jax.training.batch import Batch, targets

LOGITS = 2**28
"""Logits that exist at once, at most: 1 GiB."""


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
      logits: logits that exist at once, at most, on all devices together.
      forwarded: further arguments of `forward`, such as `adapters` and `adapter_ids`.

    Returns:
      float32 scalars.
    """
    hidden = last_hidden(params, config, batch, remat=remat, **forwarded)
    wanted, learned = targets(batch)
    head = {name: params[name] for name in ("embed", "lm_head", "final_norm") if name in params}
    total = summed_cross_entropy(config, logits, head, hidden, wanted, learned.astype(jnp.float32))
    return total, jnp.sum(learned, dtype=jnp.float32)


def last_hidden(params: Params, config: LlamaConfig, batch: Batch, **forwarded: Any) -> jax.Array:
    """Hidden states [batch, len, hidden] that logits are made of."""
    _, _, seen = forward(
        params, config, batch.tokens, segment_ids=batch.segments, capture=("final_norm",), **forwarded
    )
    return seen["final_norm"]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def summed_cross_entropy(
    config: LlamaConfig, logits: int, head: Params, hidden: jax.Array, wanted: jax.Array, weights: jax.Array
) -> jax.Array:
    """Sum of the weighted cross entropy of tokens.

    Its gradient is made along with it, from the same logits: another pass would multiply by the vocabulary's weights
    again. The gradient with respect to the logits is rounded to the dtype of `hidden` before it is multiplied.

    Args:
      logits: how many of them exist at once, at most.
      head: the parameters "embed", "lm_head" and "final_norm".
      hidden: [batch, len, hidden]; wanted: int32 [batch, len]; weights: float32 [batch, len].

    Returns:
      A float32 scalar.
    """
    parts = _cut(hidden, wanted, weights, _length(config, logits, hidden))
    return jnp.sum(jax.lax.map(lambda part: _entropy(config, head, *part)[0], parts))


def _forward(
    config: LlamaConfig, logits: int, head: Any, hidden: Any, wanted: Any, weights: Any
) -> tuple[jax.Array, Any]:
    name = "embed" if config.tie_word_embeddings else "lm_head"
    learns = any(leaf.perturbed for leaf in jax.tree.leaves(head[name], is_leaf=_is_primal))
    head = jax.tree.map(lambda leaf: leaf.value, head, is_leaf=_is_primal)
    hidden, wanted, weights = hidden.value, wanted.value, weights.value

    def step(carry: tuple[jax.Array, Any], part: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, Any], jax.Array]:
        total, d_leaf = carry
        entropy, d_logits = _entropy(config, head, *part)
        if learns:
            _, pull = jax.vjp(linear, part[0], head[name])
            d_hidden, more = pull(d_logits)
            d_leaf = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), d_leaf, more)
        else:
            (d_hidden,) = jax.vjp(lambda hidden: linear(hidden, head[name]), part[0])[1](d_logits)
        return (total + entropy, d_leaf), d_hidden

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head[name]) if learns else None
    parts = _cut(hidden, wanted, weights, _length(config, logits, hidden))
    (total, d_leaf), d_hidden = jax.lax.scan(step, (jnp.float32(0), zeros), parts)
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(len(hidden), -1, hidden.shape[-1])[:, : hidden.shape[1]]
    return total, (d_hidden, d_leaf, head)


def _backward(config: LlamaConfig, logits: int, saved: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    d_hidden, d_leaf, head = saved
    name = "embed" if config.tie_word_embeddings else "lm_head"
    d_head = jax.tree.map(lambda _: None, head)
    if d_leaf is not None:
        d_head[name] = jax.tree.map(lambda d, leaf: (cotangent * d).astype(leaf.dtype), d_leaf, head[name])
    return d_head, (cotangent * d_hidden).astype(d_hidden.dtype), None, None


summed_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _is_primal(x: Any) -> bool:
    return hasattr(x, "perturbed")


def _length(config: LlamaConfig, logits: int, hidden: jax.Array) -> int:
    """Tokens of each row whose logits exist at once."""
    return max(1, min(hidden.shape[1], logits // (config.vocab_size * len(hidden))))


def _cut(hidden: jax.Array, wanted: jax.Array, weights: jax.Array, length: int) -> tuple[jax.Array, ...]:
    """Parts [parts, batch, length, ...] of arrays [batch, len, ...]; what fills the last one up weighs nothing."""

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(len(x), -1, length, *x.shape[2:]), 1, 0)

    return cut(hidden), cut(wanted), cut(weights)


def _entropy(
    config: LlamaConfig, head: Params, hidden: jax.Array, wanted: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum, and its gradient with respect to the logits in the dtype of `hidden`."""
    logits = unembed(head, config, hidden)
    # A comparison and not a gather, so that a split vocabulary stays split.
    own = jnp.arange(logits.shape[-1], dtype=jnp.int32) == wanted[..., None]
    above = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - above)
    sums = jnp.sum(exponentials, axis=-1, keepdims=True)
    entropy = jnp.log(sums[..., 0]) + above[..., 0] - jnp.sum(jnp.where(own, logits, 0), axis=-1)
    d_logits = (exponentials / sums - own) * weights[..., None]
    return jnp.sum(entropy * weights), d_logits.astype(hidden.dtype)
