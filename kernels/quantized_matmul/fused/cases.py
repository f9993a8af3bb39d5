"""Kinds of fused products, for the tables, and small cases that show a wrong code, row, column, half or sum."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from llama_jax.kernels.dispatch.cases import Case
from llama_jax.kernels.quantized_matmul.fused.shapes import SHAPES, FusedShape
from llama_jax.quantized import Layout
from llama_jax.targets import Target


def fused_shape(
    x: jax.Array,
    members: Mapping[str, jax.Array],
    *,
    layout: Layout | None,
    activation: Any = None,
    residual: Any = None,
    **kwargs: Any,
) -> str:
    """For example "add int4_g128 r8 n4096 k14336": place, layout, rows up to a power of two, and the weight's size."""
    rows = 1 << (math.prod(x.shape[:-1]) - 1).bit_length()
    name = "plain" if layout is None else layout.name
    place = "gate" if activation is not None else "norm" if residual is None else "add"
    out = math.prod(members["weight" if layout is None else name].shape[:-1])
    return f"{place} {name} r{rows} n{out} k{x.shape[-1]}"


def fused_candidates(target: Target, x: jax.Array, members: Mapping[str, jax.Array], **kwargs: Any) -> Iterator[Any]:
    """Tiles worth measuring for a call."""
    from llama_jax.kernels.quantized_matmul.fused.pallas_triton import sizes
    from llama_jax.kernels.quantized_matmul.fused.tiles import candidates

    return candidates(target, **sizes(x, members, **kwargs))


def fused_models(numbers: Mapping[str, Any] | None = None) -> Sequence[Case]:
    """Decode steps of common models. A model's own are tuned as those of `quantized_matmul`."""
    return tuple(map(_case, SHAPES)) if numbers is None else ()


def fused_cases() -> Sequence[Case]:
    """Every place and kind of layout, one row and several, sizes that no tile divides."""
    shapes = (
        FusedShape("gate", "int4_g128", 1, 200, 1024),
        FusedShape("add", "int4_g64_min", 1, 104, 1152),
        FusedShape("norm", "plain", 3, 72, 576),
        FusedShape("add", "plain", 1, 136, 1024),
        FusedShape("add", "int8", 5, 136, 1024),
        FusedShape("gate", "plain", 2, 72, 512),
        FusedShape("gate", "int8", 1, 144, 2048),
        FusedShape("norm", "int4_g32_min", 2, 100, 576),
        FusedShape("add", "int4_g128_zero", 16, 40, 512),
        FusedShape("gate", "int8_g64", 9, 80, 704),
        FusedShape("add", "plain", 20, 128, 576),
        FusedShape("norm", "plain", 32, 72, 512),
    )
    return tuple(_case(shape, quick=n < 3, differentiate=("x",) if n < 4 else ()) for n, shape in enumerate(shapes))


AROUND = ("squares", "residual", "gain")


def _case(shape: FusedShape, **options: Any) -> Case:
    def call(x: jax.Array, **arrays: Any) -> dict[str, Any]:
        beside = {name: arrays.pop(name) for name in (*AROUND, *shape.static) if name in arrays}
        return {"x": x, "members": arrays, **beside}

    how: dict[str, Any] = {"flops": shape.flops, "bytes": shape.bytes, "compared": _whole_sums, "call": call}
    return Case(shape.name, shape.example, shape.static, **how, **options)


def _whole_sums(results: Any) -> Any:
    """The results with one sum of squares for each row, of however many neighbours the parts of it are."""
    if not isinstance(results, tuple):
        return results
    total, gained, squares = results
    return total, gained, squares.sum(axis=-1, keepdims=True)
