"""Small calls that show a wrong code, group, row or column, and calls of real models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from llama_jax.kernels.dispatch.cases import Case
from llama_jax.kernels.quantized_matmul.cases import USUAL
from llama_jax.kernels.quantized_matmul.shapes import LLAMA_8B, ROWS, ProductShape, layout_of
from llama_jax.quantized import Layout, layout_named

SHAPES = (
    *(ProductShape("int8", rows, *size) for size in LLAMA_8B for rows in ROWS),
    ProductShape("int8", 512, 28672, 4096),
    ProductShape("int4_g64_min", 1, 28672, 4096),
    ProductShape("int4_g32_min", 1, 3072, 576, "float32"),  # SmolLM2 135M
    ProductShape("int8_g32", 1, 49152, 576, "float32"),
)
"""Decode steps, and a prompt, of common models."""


def integer_models(numbers: Mapping[str, Any] | None = None) -> Sequence[Case]:
    """Calls of common models, or of the one with these numbers."""
    if numbers is None:
        return tuple(map(_case, SHAPES))
    names = [n for n in numbers.get("layouts") or USUAL if (layout := layout_named(n)) and layout.kind != "fp8"]
    sizes = numbers.get("products", ())
    return tuple(_case(ProductShape(name, rows, *size)) for name in names for size in sizes for rows in ROWS)


def integer_cases() -> Sequence[Case]:
    """Every kind of layout, one row and many."""
    shapes = (
        ProductShape("int4_g32_min", 1, 100, 608, "float32"),
        ProductShape("int8_g32", 5, 72, 544, "float32"),
        ProductShape("int8", 3, 64, 576, "float32"),
        ProductShape("int8", 1, 72, 512),
        ProductShape("int4_g64_min", 17, 100, 704, "float32"),
        ProductShape("int4_g128_zero", 2, 96, 640),
        ProductShape("int4_g32", 9, 37, 4160, "float32"),
        ProductShape("int4_g32_min_f32", 70, 130, 288),
        ProductShape("int8_g32_min", 2, 40, 320, "float32"),
        ProductShape("int8_g64_zero", 1, 40, 320),
    )
    quick = 3
    return tuple(_case(shape, quick=i < quick) for i, shape in enumerate(shapes))


def _case(shape: ProductShape, **options: Any) -> Case:
    def call(x: jax.Array, *, layout: Layout, **members: jax.Array) -> dict[str, Any]:
        return {"x": x, "members": members, "layout": layout}

    static = {"layout": layout_of(shape.layout)}
    return Case(shape.name, shape.example, static, flops=shape.flops, bytes=shape.bytes, call=call, **options)
