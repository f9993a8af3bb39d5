"""Kinds of calls of routed experts with quantised weights, and small cases that expose a wrong expert, group or row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from llama_jax.kernels.dispatch.cases import Case
from llama_jax.kernels.moe.shapes import MoeShape
from llama_jax.kernels.quantized_matmul.shapes import layout_of
from llama_jax.kernels.quantized_moe.shapes import SHAPES, TOKENS, ExpertsShape
from llama_jax.quantized import Layout
from llama_jax.targets import Target

USUAL = ("int8", "int4_g64_min")
"""Layouts that a model is tuned for if it is not quantised itself."""


def experts_shape(
    x: jax.Array,
    expert_ids: jax.Array,
    gate: Mapping[str, jax.Array],
    up: Mapping[str, jax.Array],
    down: Mapping[str, jax.Array],
    *,
    layouts: tuple[Layout, Layout],
    **kwargs: Any,
) -> str:
    """For example "int4_g128 e8 top2 r16": layout of gate and up, experts, those of a token, rows of all experts up to
    a power of two."""
    rows = 1 << (expert_ids.size - 1).bit_length()
    return f"{layouts[0].name} e{len(gate[layouts[0].name])} top{expert_ids.shape[1]} r{rows}"


def experts_candidates(
    target: Target, x: jax.Array, expert_ids: jax.Array, gate: Any, up: Any, down: Any, *, layouts: Any, **kwargs: Any
) -> Iterator[Any]:
    """Tiles worth measuring for a call."""
    from llama_jax.kernels.quantized_moe.pallas_triton import sizes
    from llama_jax.kernels.quantized_moe.tiles import candidates

    return candidates(target, **sizes(expert_ids, down, layouts[1]))


def experts_models(numbers: Mapping[str, Any] | None = None) -> Sequence[Case]:
    """Decode steps of common models, or of the one with these numbers."""
    if numbers is None:
        return tuple(map(_case, SHAPES))
    if not numbers.get("experts"):
        return ()
    sizes = (numbers[name] for name in ("experts", "top_k", "hidden", "intermediate", "scaled"))
    model = MoeShape(*sizes)
    shapes = (ExpertsShape(model, layout, n) for layout in numbers.get("layouts") or USUAL for n in TOKENS)
    return tuple(_case(shape) for shape in shapes if shape.fits())


def experts_cases() -> Sequence[Case]:
    """Every kind of layout, one token and many, experts without a token, widths that no tile divides."""
    two, one = MoeShape(8, 2, 256, 192, "output"), MoeShape(5, 1, 128, 320, "input")
    return (
        _case(ExpertsShape(two, "int4_g64_min", 1), quick=True, differentiate=("x",)),
        _case(ExpertsShape(one, "int8", 7), quick=True),
        _case(ExpertsShape(two, "int4_g64", 20, "float16")),
        _case(ExpertsShape(one, "int4_g64_zero", 3)),
        _case(ExpertsShape(MoeShape(4, 2, 160, 96, "output"), "int8_g32", 9)),
        _case(ExpertsShape(two, "int4_g32", 5)),
        _case(ExpertsShape(one, "int8_g64_min", 2)),
    )


def _case(shape: ExpertsShape, **options: Any) -> Case:
    def call(*, layouts: Any, activation: Any, **arrays: Any) -> dict[str, Any]:
        plain = {name: array for name, array in arrays.items() if "." not in name}
        for weight in ("gate", "up", "down"):
            mine = {n.partition(".")[2]: a for n, a in arrays.items() if n.startswith(f"{weight}.")}
            plain[weight] = mine
        ordered = {name: plain.pop(name) for name in ("x", "expert_ids", "gate", "up", "down")}
        return ordered | plain | {"layouts": layouts, "activation": activation}

    layout = layout_of(shape.layout)
    static = {"layouts": (layout, layout), "activation": jax.nn.silu}
    return Case(shape.name, shape.example, static, flops=shape.flops(), bytes=shape.bytes(), call=call, **options)
