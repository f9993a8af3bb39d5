"""Rotation and cache write in one kernel, through Pallas-Triton: each number is read once and written once.

The caches are both arguments and results in one place, so nothing of them is moved but the new tokens.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llama_jax.kernels.pallas import MAX_ELEMENTS, MIN_CONTRACTION
from llama_jax.kernels.rope import kernel
from llama_jax.kernels.rope.coding import signs
from llama_jax.kernels.rope.reference import Stored, rope_and_store_reference
from llama_jax.kernels.rope.tiles import Tiles, default_tiles
from llama_jax.targets import Target, current

__all__ = ["Tiles", "run", "unsupported"]

DTYPES = ("bfloat16", "float16", "float32")
MOST_TOKENS = 512
"""Tokens of a call above which starting kernels no longer counts, and XLA's have not been beaten."""


def unsupported(
    target: Target,
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot: jax.Array,
    page: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    *,
    interleaved: bool,
    interpret: bool = False,
) -> str | None:
    """The reason this backend cannot run a call on `target`, or None."""
    if target.vendor == "cpu" and not interpret:
        return "Pallas-Triton compiles for GPUs only; pallas_interpret runs the same kernel"
    tokens = qkv.shape[0] * qkv.shape[1]
    if not tokens or qkv.shape[-2] < 3:
        return "there are no queries"
    if not interpret and tokens > MOST_TOKENS:
        return f"{tokens} tokens are more than {MOST_TOKENS}"
    if k_scale is not None:
        if (k.dtype.name, v.dtype.name) != ("int8", "int8"):
            return f"codes are {k.dtype} and {v.dtype}, it takes those of eight bits"
        head_dim = qkv.shape[-1]
        if target.vendor == "amd" and target.wave_size == 32 and head_dim > 64:
            return f"heads of {head_dim}: with codes RDNA's registers hold 64"
        if qkv.dtype.name not in DTYPES[:2] or head_dim < 2 * MIN_CONTRACTION or head_dim & (head_dim - 1):
            return f"heads of {head_dim} in {qkv.dtype}: codes take a power of two from {2 * MIN_CONTRACTION}, 16 bits"
    elif any(x.dtype.name not in DTYPES for x in (qkv, k, v)):
        return f"dtypes {qkv.dtype}, {k.dtype} and {v.dtype}, it takes {', '.join(DTYPES)}"
    if max(k.size, v.size, qkv.size) > MAX_ELEMENTS:
        return f"an array has more than {MAX_ELEMENTS} elements"
    return None


def run(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot: jax.Array,
    page: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    *,
    interleaved: bool,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Stored:
    """See `llama_jax.kernels.rope.rope_and_store`; differentiable as the reference is.

    Args:
      tiles: default: `default_tiles` of the current target.
      interpret: runs as plain JAX operations, on any device.
    """
    if tiles is None:
        sizes = {"group": qkv.shape[-2] - 2, "head_dim": qkv.shape[-1]}
        tiles = default_tiles(current(), **sizes, coded=k_scale is not None)
    forward = jax.custom_vjp(partial(_forward, interleaved=interleaved, tiles=tiles, interpret=interpret))

    def save(*args: Any) -> Any:
        return forward(*args), args

    def backward(args: Any, gradients: Any) -> Any:
        _, pull = jax.vjp(partial(rope_and_store_reference, interleaved=interleaved), *args)
        return pull(gradients)

    forward.defvjp(save, backward)
    out: Stored = forward(qkv, cos, sin, k, v, slot, page, k_scale, v_scale)
    return out


def _forward(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot: jax.Array,
    page: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    *,
    interleaved: bool,
    tiles: Tiles,
    interpret: bool,
) -> Stored:
    batch, length, kv_heads, parts, head_dim = qkv.shape
    tokens, group = batch * length, parts - 2
    shape = kernel.Shape(length, group, head_dim, k.shape[0], k.shape[2], interleaved, page is not None, interpret)
    caches = [k, v] if k_scale is None or v_scale is None else [k, v, k_scale, v_scale]
    coded = len(caches) > 2
    arguments = [qkv.reshape(tokens, kv_heads, parts, head_dim), *(x.reshape(tokens, -1) for x in (cos, sin))]
    arguments += [slot.reshape(-1)] + ([] if page is None else [page.reshape(tokens)])
    arguments += [signs(head_dim // 2, qkv.dtype)] if coded else []

    # Said at every lowering, see `kernels.pallas.launch`.
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    q, *stored = pl.pallas_call(
        shape.coded() if coded else shape.plain(),
        grid=(tokens, kv_heads),
        out_shape=(
            jax.ShapeDtypeStruct((tokens, kv_heads, group, head_dim), qkv.dtype),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in caches),
        ),
        input_output_aliases={len(arguments) + i: 1 + i for i in range(len(caches))},
        compiler_params=plgpu.CompilerParams(num_warps=tiles.num_warps, num_stages=1),
        interpret=interpret,
    )(*arguments, *caches)
    q = q.reshape(batch, length, kv_heads * group, head_dim)
    if not coded:
        return q, stored[0], stored[1], None, None
    return q, stored[0], stored[1], stored[2], stored[3]
