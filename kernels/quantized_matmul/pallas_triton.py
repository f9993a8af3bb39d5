"""Products with quantised weights on any GPU through Pallas-Triton; differentiable by the input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.kernels.pallas import MAX_ELEMENTS
from llama_jax.kernels.precision import matmul_precision
from llama_jax.kernels.quantized_matmul import kernel, scaled
from llama_jax.kernels.quantized_matmul.decoding import decoded
from llama_jax.kernels.quantized_matmul.operands import Weight
from llama_jax.kernels.quantized_matmul.reference import quantized_matmul_reference
from llama_jax.kernels.quantized_matmul.tiles import CHUNK, Tiles, default_tiles
from llama_jax.kernels.quantized_matmul.unpack import unpack_for
from llama_jax.quantized import Layout
from llama_jax.targets import Target, current

__all__ = ["Tiles", "run", "unsupported"]

DTYPES = ("bfloat16", "float16")
MOST_ROWS = 128
"""Number of rows above which codes would be decoded so often that decoding the weight once, to memory, is faster."""
GROUPS = (32, 64, 128, 256, 512, 1024)


def unsupported(
    target: Target,
    x: jax.Array,
    members: Mapping[str, jax.Array],
    *,
    layout: Layout,
    dtype: DTypeLike | None = None,
    interpret: bool = False,
) -> str | None:
    """The reason this backend cannot run a call on `target`, or None."""
    if target.vendor == "cpu" and not interpret:
        return "Pallas-Triton compiles for GPUs only; pallas_interpret runs the same kernels"
    rows, codes = math.prod(x.shape[:-1]), members[layout.name]
    if not rows or not codes.size:
        return "there are no rows"
    if layout.kind == "fp8":
        return "codes are 8-bit floats, it takes integers"
    if x.dtype.name not in DTYPES:
        return f"dtype {x.dtype.name}, it takes {' and '.join(DTYPES)}"
    if rows > MOST_ROWS and layout.group is None:
        return f"{rows} rows are more than {MOST_ROWS}, and XLA reads codes without groups itself"
    if layout.group is None and layout.offset is not None:
        return "rows have one scale and are asymmetric"
    if layout.group is not None and layout.group not in GROUPS:
        return f"groups of {layout.group}, it takes {', '.join(map(str, GROUPS))}"
    if codes.shape[-1] % CHUNK:
        return f"rows of {codes.shape[-1]} bytes are not a multiple of {CHUNK}"
    if codes.size > MAX_ELEMENTS:
        return f"the weight has more than {MAX_ELEMENTS} bytes"
    return None


def run(
    x: jax.Array,
    members: Mapping[str, jax.Array],
    *,
    layout: Layout,
    dtype: DTypeLike | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `llama_jax.kernels.quantized_matmul.quantized_matmul`.

    Args:
      tiles: by default `default_tiles` of the current target for up to `MOST_ROWS` rows; with more, a kernel of its own
        decodes the weight once (`decoding.decoded`), and XLA multiplies.
      interpret: runs as plain JAX operations, on any device.
    """
    shape = sizes(x, members, layout=layout)
    if tiles is None and shape["rows"] <= MOST_ROWS:
        tiles = default_tiles(current(), **shape)
    return _product(_Call(layout, jnp.dtype(dtype or x.dtype), tiles, interpret), x, dict(members))


def sizes(x: jax.Array, members: Mapping[str, jax.Array], *, layout: Layout) -> dict[str, Any]:
    """The sizes that tiles depend on."""
    *out, row_bytes = members[layout.name].shape
    rows = math.prod(x.shape[:-1])
    return {"rows": rows, "out": math.prod(out), "row_bytes": row_bytes, "layout": layout}


@dataclass(frozen=True)
class _Call:
    """The static part of a call; no tiles where the weight is decoded once."""

    layout: Layout
    dtype: jnp.dtype
    tiles: Tiles | None
    interpret: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(call: _Call, x: jax.Array, members: dict[str, jax.Array]) -> jax.Array:
    weight, flat = Weight.of(call.layout, members), x.reshape(-1, x.shape[-1])
    if call.tiles is None:
        out = matmul(flat, decoded(weight, x.dtype, interpret=call.interpret), call.dtype)
    elif call.tiles.scaled:
        numbers = scaled.plain if call.interpret else scaled.nvidia
        out = scaled.product(flat, weight, call.tiles, call.dtype, numbers, interpret=call.interpret)
    else:
        unpack = unpack_for(current(), call.layout, one_row=len(flat) == 1, interpret=call.interpret)
        out = kernel.product(flat, weight, call.tiles, call.dtype, unpack, interpret=call.interpret)
    return out.reshape(*x.shape[:-1], *members[call.layout.name].shape[:-1])


def _forward(call: _Call, x: jax.Array, members: dict[str, jax.Array]) -> tuple[jax.Array, tuple[Any, ...]]:
    return _product(call, x, members), (x, members)


def _backward(call: _Call, saved: tuple[Any, ...], gradient: jax.Array) -> tuple[Any, None]:
    """The gradient of the reference, with respect to x only: quantised weights are not trained."""
    x, members = saved
    _, pull = jax.vjp(partial(quantized_matmul_reference, members=members, layout=call.layout, dtype=call.dtype), x)
    return *pull(gradient), None


_product.defvjp(_forward, _backward)


def matmul(x: jax.Array, weight: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x [rows, in] times weight [out, in], by XLA: [rows, out] in `dtype`."""
    last = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, last, precision=matmul_precision(x.dtype), preferred_element_type=dtype)
