"""Kinds of products, for the tables, and small cases that show a wrong code, group, row or column."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from llama_jax.kernels.dispatch.cases import Case
from llama_jax.kernels.quantized_matmul.shapes import ROWS, SHAPES, ProductShape, layout_of
from llama_jax.quantized import Layout
from llama_jax.targets import Target

USUAL = ("int8", "int4_g64_min")
"""Layouts that a model is tuned for if it is not quantised itself: those that `quantize` makes by default."""


def product_shape(x: jax.Array, members: Mapping[str, jax.Array], *, layout: Layout, **kwargs: Any) -> str:
    """For example "int4_g128 r16 n28672 k4096": layout, rows up to a power of two, and the weight's size."""
    rows = 1 << (math.prod(x.shape[:-1]) - 1).bit_length()
    return f"{layout.name} r{rows} n{math.prod(members[layout.name].shape[:-1])} k{x.shape[-1]}"


def product_candidates(
    target: Target, x: jax.Array, members: Mapping[str, jax.Array], *, layout: Layout, **kwargs: Any
) -> Iterator[Any]:
    """Tiles worth measuring for a call."""
    from llama_jax.kernels.quantized_matmul.pallas_triton import sizes
    from llama_jax.kernels.quantized_matmul.tiles import candidates

    return candidates(target, **sizes(x, members, layout=layout))


def product_models(numbers: Mapping[str, Any] | None = None) -> Sequence[Case]:
    """Decode steps of common models, or of the one with these numbers."""
    if numbers is None:
        return tuple(map(_case, SHAPES))
    layouts = numbers.get("layouts") or USUAL
    sizes = numbers.get("products", ())
    return tuple(_case(ProductShape(name, rows, *size)) for name in layouts for size in sizes for rows in ROWS)


def product_cases() -> Sequence[Case]:
    """Every kind of layout, one row and many, sizes that no tile divides."""
    shapes = (
        ProductShape("int8", 1, 72, 512),
        ProductShape("int4_g64_min", 1, 100, 704),
        ProductShape("int4_g128_zero", 17, 96, 512),
        ProductShape("int8", 5, 100, 576),
        ProductShape("int4_g32", 2, 37, 4160),
        ProductShape("int4_g32_min", 70, 130, 288),
        ProductShape("int8_g32", 3, 64, 608, "float16"),
        ProductShape("int4_g64_zero", 40, 48, 256, "float16"),
        ProductShape("int8_g64", 16, 200, 2048),
        ProductShape("int8_g128", 48, 72, 640),
    )
    quick, differentiate = shapes[:3], ("x",)
    others = tuple(map(_case, shapes[3:]))
    return (*(_case(shape, quick=True, differentiate=differentiate) for shape in quick), *others)


def _case(shape: ProductShape, **options: Any) -> Case:
    def call(x: jax.Array, *, layout: Layout, **members: jax.Array) -> dict[str, Any]:
        return {"x": x, "members": members, "layout": layout}

    static = {"layout": layout_of(shape.layout)}
    return Case(shape.name, shape.example, static, flops=shape.flops, bytes=shape.bytes, call=call, **options)
