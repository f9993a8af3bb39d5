"""Fused products on any GPU through Pallas-Triton, for a few rows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.pallas import MAX_ELEMENTS
from llama_jax.kernels.quantized_matmul import kernel
from llama_jax.kernels.quantized_matmul import pallas_triton as plain
from llama_jax.kernels.quantized_matmul.fused.reference import Activation, fused_matmul_reference
from llama_jax.kernels.quantized_matmul.fused.tiles import Tiles, default_tiles, least_columns
from llama_jax.kernels.quantized_matmul.kernel import Around
from llama_jax.kernels.quantized_matmul.operands import SQUARED, Weight
from llama_jax.kernels.quantized_matmul.unpack import unpack_for
from llama_jax.quantized import Layout
from llama_jax.targets import Target, current

__all__ = ["Tiles", "run", "unsupported"]

MOST_ROWS = 32
"""Number of rows up to which a product is bound by reading its weight, and what is around it by launches."""
PLAIN_STEP = 64
"""Numbers of a weight without a layout that rows must be multiples of."""


def unsupported(
    target: Target,
    x: jax.Array,
    members: Mapping[str, jax.Array],
    *,
    layout: Layout | None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    gain: jax.Array | None = None,
    interpret: bool = False,
    **options: Any,
) -> str | None:
    """The reason this backend cannot run a call on `target`, or None."""
    if target.vendor == "cpu" and not interpret:
        return "Pallas-Triton compiles for GPUs only; pallas_interpret runs the same kernels"
    if x.dtype != jnp.bfloat16:
        return f"dtype {x.dtype.name}: rows that are yet to be divided may be too large for any but bfloat16"
    rows = math.prod(x.shape[:-1])
    if rows > MOST_ROWS:
        return f"{rows} rows are more than {MOST_ROWS}"
    if layout is not None and (reason := plain.unsupported(target, x, members, layout=layout, interpret=interpret)):
        return reason
    if layout is None:
        weight = members["weight"]
        if weight.dtype != x.dtype:
            return f"a weight in {weight.dtype.name}"
        if not rows or not weight.size or weight.shape[-1] % PLAIN_STEP:
            return f"there are no rows, or they are not a multiple of {PLAIN_STEP} numbers"
        if weight.size > MAX_ELEMENTS:
            return f"the weight has more than {MAX_ELEMENTS} elements"
    if (residual is None) != (gain is None) or (residual is not None and activation is not None):
        return "it adds a residual with the gain that follows, and not behind an activation"
    if residual is not None and residual.shape[-1] % SQUARED:
        return f"rows of {residual.shape[-1]} are not a multiple of {SQUARED}"
    # Triton's dialect has no error function (gelu without the tanh approximation).
    if activation is not None and not interpret:
        program = str(jax.make_jaxpr(activation)(jax.ShapeDtypeStruct((), "float32")))
        return "the activation uses erf" if re.search(r"\berfc?\b", program) else None
    return None


def run(
    x: jax.Array,
    members: Mapping[str, jax.Array],
    *,
    layout: Layout | None,
    squares: jax.Array | None = None,
    eps: float = 0.0,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    gain: jax.Array | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Any:
    """See `llama_jax.kernels.quantized_matmul.fused.fused_matmul`.

    Args:
      tiles: by default `default_tiles` of the current target.
      interpret: runs as plain JAX operations, on any device.
    """
    if tiles is None:
        tiles = default_tiles(current(), **sizes(x, members, layout=layout, activation=activation, residual=residual))
    reference = partial(fused_matmul_reference, layout=layout, eps=eps, activation=activation)
    floating, codes = ({}, dict(members)) if layout is not None else (dict(members), {})

    # Quantised weights are not trained.
    @jax.custom_vjp
    def fused(x: jax.Array, around: dict[str, Any], floating: dict[str, Any], codes: dict[str, Any]) -> Any:
        weight = Weight.of(layout, {**floating, **codes})
        flat = {name: None if array is None else array.reshape(-1, array.shape[-1]) for name, array in around.items()}
        gain = None if around["gain"] is None else around["gain"].reshape(-1)
        how = Around(eps=eps, activation=activation, **{**flat, "gain": gain})
        x2 = x.reshape(-1, x.shape[-1])
        unpack = unpack_for(current(), layout, one_row=len(x2) == 1, interpret=interpret)
        found = kernel.fused_product(x2, weight, tiles, x.dtype, unpack, how, interpret=interpret)
        if residual is not None:
            return tuple(each.reshape(*x.shape[:-1], -1) for each in found)
        shape = next(iter(members.values())) if layout is None else members[layout.name]
        out = shape.shape[1 if activation is not None else 0 : -1]
        return found[0].reshape(*x.shape[:-1], *out)

    def save(*args: Any) -> tuple[Any, Any]:
        return fused(*args), args

    def backward(saved: Any, gradients: Any) -> Any:
        x, around, floating, codes = saved
        if residual is not None:  # of sums of more squares than the reference adds to one
            *others, of_squares = gradients
            times = residual.shape[-1] // SQUARED // of_squares.shape[-1]
            gradients = *others, jnp.repeat(of_squares, times, axis=-1)

        def again(x: jax.Array, around: dict[str, Any], floating: dict[str, Any]) -> Any:
            return reference(x, {**floating, **codes}, **around)

        _, pull = jax.vjp(again, x, around, floating)
        return *pull(gradients), None

    fused.defvjp(save, backward)
    return fused(x, {"squares": squares, "residual": residual, "gain": gain}, floating, codes)


def sizes(
    x: jax.Array,
    members: Mapping[str, jax.Array],
    *,
    layout: Layout | None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The sizes that tiles depend on."""
    *out, row_bytes = members["weight" if layout is None else layout.name].shape
    least = least_columns(gated=activation is not None, adds=residual is not None)
    rows = math.prod(x.shape[:-1])
    return {"rows": rows, "out": math.prod(out), "row_bytes": row_bytes, "layout": layout, "least": least}
