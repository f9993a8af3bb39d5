"""Kinds of calls of a sum and norm, for the tables, and small cases that expose a wrong row, column or rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.dispatch.cases import Arrays, Case
from llama_jax.kernels.norm.shapes import ROWS, SHAPES, NormShape
from llama_jax.targets import Target

MANY = 512
"""Rows from which a call is bound by bandwidth, not by how long one row takes."""


def norm_shape(x: jax.Array, *args: Any, **kwargs: Any) -> str:
    """For example "h4096 few"."""
    return f"h{x.shape[-1]} {'many' if math.prod(x.shape[:-1]) >= MANY else 'few'}"


def norm_candidates(target: Target, x: jax.Array, *args: Any, **kwargs: Any) -> Iterator[Any]:
    """Tiles worth measuring for a call."""
    from llama_jax.kernels.norm.tiles import candidates

    return candidates(target, rows=math.prod(x.shape[:-1]), hidden=x.shape[-1])


def norm_models(numbers: Mapping[str, Any] | None = None) -> Sequence[Case]:
    """Decode steps and prefills of common models, or of the one with these numbers."""
    found = SHAPES if numbers is None else tuple(NormShape(rows, numbers["hidden"]) for rows in ROWS)
    return tuple(Case(shape.name, shape.example, {"eps": 1e-5}, bytes=shape.bytes()) for shape in found)


def norm_cases() -> Sequence[Case]:
    """Few and many rows, columns that are no power of two, a norm that eps decides, a sum that rounding decides."""
    grad = ("x", "delta", "weight")
    return (
        _case("h576", shape=(2, 3, 576), quick=True, differentiate=grad),
        _case("h4096", shape=(5, 4096), quick=True),
        _case("many rows h96", shape=(5001, 96), differentiate=grad),
        _case("small numbers h128", shape=(7, 128), scale=1e-3, eps=1e-5, quick=True),
        _case("cancelling h320", shape=(9, 320), cancelling=True),
        _case("float16 h2048", shape=(3, 2048), dtype="float16"),
        _case("float32 h1000", shape=(6, 1000), dtype="float32", differentiate=grad),
    )


def _case(
    name: str,
    *,
    shape: tuple[int, ...],
    dtype: str = "bfloat16",
    scale: float = 1.0,
    eps: float = 1e-6,
    cancelling: bool = False,
    quick: bool = False,
    differentiate: tuple[str, ...] = (),
) -> Case:
    """`cancelling`: delta is nearly -x."""

    def arrays(key: jax.Array) -> Arrays:
        keys = jax.random.split(key, 3)
        x, delta = (jax.random.normal(k, shape) * scale for k in keys[:2])
        weight = jax.random.uniform(keys[2], shape[-1:], jnp.float32, 0.5, 1.5)
        made = {"x": x, "delta": 0.1 * delta - x if cancelling else delta, "weight": weight}
        return {name: array.astype(dtype) for name, array in made.items()}

    return Case(name, arrays, {"eps": eps}, quick=quick, differentiate=differentiate)
