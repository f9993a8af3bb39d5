"""Kinds of calls with adapters, for the tables, and small cases that show a wrong slot, token, column or sum."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from llama_jax.kernels.dispatch.cases import Case
from llama_jax.kernels.lora.reference import Slots
from llama_jax.kernels.lora.shapes import SHAPES, LoraShape
from llama_jax.targets import Target


def lora_shape(
    out: jax.Array, x: jax.Array, slots: Sequence[Slots], ids: Any, *, activation: Any = None, **kwargs: Any
) -> str:
    """For example "gate2 k4096 s9 r16 t64": projections, numbers of a token, slots, rank, tokens to a power of two."""
    number, rank, inner = slots[0]["a"].shape
    tokens = 1 << (math.prod(x.shape[:-1]) - 1).bit_length()
    return f"{'add' if activation is None else 'gate'}{len(slots)} k{inner} s{number} r{rank} t{tokens}"


def lora_candidates(
    target: Target, out: jax.Array, x: jax.Array, slots: Sequence[Slots], *args: Any, **kwargs: Any
) -> Iterator[Any]:
    """Tiles worth measuring for a call."""
    from llama_jax.kernels.lora.pallas_triton import sizes
    from llama_jax.kernels.lora.tiles import candidates

    return candidates(target, **sizes(x, slots))


def lora_models(numbers: Mapping[str, Any] | None = None) -> Sequence[Case]:
    """Decode steps of common models with adapters. A model's numbers do not tell which it will have."""
    return tuple(map(_case, SHAPES)) if numbers is None else ()


def lora_cases() -> Sequence[Case]:
    """Every kind of call, a token and several, more slots than a step takes, sizes that no tile divides."""
    shapes = (
        LoraShape("qkv", 5, 96, 32, slots=3, rank=4, heads=(2, 3)),
        LoraShape("gate", 3, 200, 72, slots=4, rank=8),
        LoraShape("one", 1, 320, 136, slots=3, rank=16),
        LoraShape("one", 19, 96, 40, slots=20, rank=16),
        LoraShape("qkv", 17, 64, 48, slots=2, rank=24, heads=(1, 2), targets=(0, 2)),
        LoraShape("one", 70, 1100, 24, slots=3, rank=5, dtype="float16"),
        LoraShape("gate", 2, 130, 64, slots=12, rank=33),
    )
    return tuple(
        _case(shape, quick=n < 3, differentiate=("out", "x", "a0", "b0") if n < 2 else ())
        for n, shape in enumerate(shapes)
    )


def _case(shape: LoraShape, **options: Any) -> Case:
    def call(out: jax.Array, x: jax.Array, ids: jax.Array, **arrays: Any) -> dict[str, Any]:
        static = {name: arrays.pop(name) for name in shape.static}
        count = len(static["parts"])
        slots = tuple({name: arrays[f"{name}{n}"] for name in ("a", "b", "scale")} for n in range(count))
        return {"out": out, "x": x, "slots": slots, "ids": ids, **static}

    return Case(shape.name, shape.example, shape.static, bytes=shape.bytes(), call=call, **options)
