"""The contract of low-rank adapters in slots: what they add to a projection, or to several that share an input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from llama_jax.kernels.precision import matmul_precision

Activation = Callable[[jax.Array], jax.Array]

Slots = Mapping[str, jax.Array]
"""{"a" [slots, rank, in], "b" [slots, rank, out], "scale" [slots]}; slot 0 is none, whatever it contains."""

Part = tuple[int, int]
"""The first and one past the last index of a projection on the next to last axis of several in one array."""


def add_lora_reference(
    out: jax.Array,
    x: jax.Array,
    slots: Sequence[Slots],
    ids: jax.Array,
    *,
    parts: Sequence[Part],
    activation: Activation | None = None,
) -> jax.Array:
    """See `llama_jax.kernels.lora.add_lora`."""
    for part, of_part in zip(parts, slots, strict=True):
        out = plus(out, low_rank(x, of_part, ids), part)
    if activation is None:
        return out
    return activation(out[..., 0, :]) * out[..., 1, :]


def plus(out: jax.Array, added: jax.Array, part: Part) -> jax.Array:
    """`out` [..., heads, n, columns] or [..., n, columns] with the sum of a part of it and `added` [..., size]."""
    first, last = part
    added = added.reshape(*out.shape[:-2], last - first, out.shape[-1]).astype(out.dtype)
    if last - first == out.shape[-2]:
        return out + added
    # Zeros around it instead of an update in place: XLA fuses sums, and splits them over devices.
    return out + jnp.pad(added, [(0, 0)] * (out.ndim - 2) + [(first, out.shape[-2] - last), (0, 0)])


def low_rank(x: jax.Array, slots: Slots, ids: jax.Array) -> jax.Array:
    """scale * x a^T b^T (arXiv:2106.09685), of each token's slot.

    Where each row of a large set of slots has one, its slot is gathered: read, written and read again. Otherwise `x` is
    multiplied with `a` of all slots at once, and what is not the token's own is zeroed before `b`: that takes
    slots * rank multiplications for each number of x and of the result, beside the weight's thousands, and reads
    every slot once, however many tokens there are.

    Args:
      x: [batch, len, in] with ids [batch, len] or [batch, 1], or [tokens, in] with ids [tokens].

    Returns:
      [..., out] in x's dtype, exactly 0 for slot 0 and for ids that are none.
    """
    a, b = (slots[name].astype(x.dtype) for name in ("a", "b"))
    scale, precision = slots["scale"], matmul_precision(x.dtype)
    if ids.size == len(x) and 3 * len(x) <= len(scale):
        ids = ids.reshape(len(x))
        used = (ids > 0) & (ids < len(scale))
        ids = jnp.where(used, ids, 0)
        inner = jnp.einsum("n...i,nri->n...r", x, a[ids], precision=precision)
        to_rows = (len(x),) + (1,) * (x.ndim - 1)
        inner = jnp.where(used.reshape(to_rows), inner * scale[ids].reshape(to_rows), 0).astype(x.dtype)
        return jnp.einsum("n...r,nro->n...o", inner, b[ids], precision=precision)
    used = (ids[..., None] == jnp.arange(len(scale))) & (ids[..., None] > 0)
    inner = jnp.einsum("...i,sri->...sr", x, a, precision=precision)
    inner = jnp.where(used[..., None], inner * scale[:, None], 0).astype(x.dtype)
    return jnp.einsum("...sr,sro->...o", inner, b, precision=precision)
