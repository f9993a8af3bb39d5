"""Kinds of calls of a rotation and cache write, for the tables, and small cases that expose a wrong slot or pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.dispatch.cases import Case
from llama_jax.kernels.rope.shapes import ROWS, SHAPES, RopeShape
from llama_jax.targets import Target

MANY = 512


def rope_shape(qkv: jax.Array, *args: Any, page: Any = None, k_scale: Any = None, **kwargs: Any) -> str:
    """For example "d128 g4 paged codes few": head_dim, query heads of a key/value head, up to 512 tokens."""
    found = args[5] if len(args) > 5 else page
    codes = " codes" if (args[6] if len(args) > 6 else k_scale) is not None else ""
    many = "many" if qkv.shape[0] * qkv.shape[1] > MANY else "few"
    return f"d{qkv.shape[-1]} g{qkv.shape[-2] - 2} {'dense' if found is None else 'paged'}{codes} {many}"


def rope_candidates(target: Target, qkv: jax.Array, *args: Any, k_scale: Any = None, **kwargs: Any) -> Iterator[Any]:
    """Tiles worth measuring for a call."""
    from llama_jax.kernels.rope.tiles import candidates

    coded = (args[6] if len(args) > 6 else k_scale) is not None
    return candidates(target, group=qkv.shape[-2] - 2, head_dim=qkv.shape[-1], coded=coded)


def rope_models(numbers: Mapping[str, Any] | None = None) -> Sequence[Case]:
    """Decode steps of common models, or of the one with these numbers."""
    found = SHAPES
    if numbers is not None:
        heads = (numbers["heads"], numbers["kv_heads"], numbers["head_dim"])
        found = tuple(RopeShape(rows, *heads, page_size=size) for rows in ROWS for size in (None, 64))
    return tuple(
        Case(shape.name, shape.example, {"interleaved": shape.interleaved}, bytes=shape.bytes()) for shape in found
    )


def rope_cases() -> Sequence[Case]:
    """Dense and paged, several tokens of a row, tokens without a page, both pairings, odd heads."""
    return (
        _case("dense d64", rows=3, length=1, heads=(2, 4, 64), quick=True),
        _case("paged d128", rows=5, length=1, heads=(2, 4, 128), paged=True, quick=True),
        _case("dense chunk d96 g3", rows=2, length=5, heads=(3, 3, 96), differentiate=("qkv", "k", "v")),
        _case("paged chunk d80 interleaved", rows=2, length=7, heads=(1, 5, 80), paged=True, interleaved=True),
        _case("one row g1 float16", rows=1, length=1, heads=(4, 1, 128), paged=True, dtype="float16"),
        _case("codes d64", rows=3, length=1, heads=(2, 4, 64), codes=True, quick=True),
        _case("codes paged interleaved", rows=5, length=2, heads=(3, 1, 32), paged=True, interleaved=True, codes=True),
        _case("wider cache", rows=4, length=1, heads=(2, 2, 32), dtype="bfloat16", cache="float32"),
    )


def _case(
    name: str,
    *,
    rows: int,
    length: int,
    heads: tuple[int, int, int],
    paged: bool = False,
    interleaved: bool = False,
    dtype: str = "bfloat16",
    cache: str = "",
    codes: bool = False,
    quick: bool = False,
    differentiate: tuple[str, ...] = (),
) -> Case:
    """`heads`: key/value heads, query heads of each, head_dim. Pages are in reverse; the first token has none."""
    kv_heads, group, head_dim = heads

    def arrays(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, 4)
        turns = jax.random.uniform(keys[1], (rows, length, head_dim // 2), jnp.float32, 0, 4)
        # Of codes by right angles, which round nothing: else some would be the neighbours of the reference's.
        angles = (jnp.floor(turns) if codes else turns) * (jnp.pi / 2)
        cos, sin = (jnp.round(x) if codes else x for x in (jnp.cos(angles), jnp.sin(angles)))
        tokens = jnp.arange(rows * length, dtype=jnp.int32).reshape(rows, length)
        pages, slots = (rows * length, 16) if paged else (rows, 24)
        stored = (pages, kv_heads, slots, head_dim)

        def rows_of_cache(key: jax.Array) -> jax.Array:
            if codes:
                return jax.random.randint(key, stored, -127, 128, jnp.int8)
            return jax.random.normal(key, stored, cache or dtype)

        scales = {n: jnp.ones(stored[:-1], jnp.bfloat16) for n in ("k_scale", "v_scale")} if codes else {}
        return {
            "qkv": jax.random.normal(keys[0], (rows, length, kv_heads, group + 2, head_dim), dtype),
            "cos": cos,
            "sin": sin,
            "k": rows_of_cache(keys[2]),
            "v": rows_of_cache(keys[3]),
            **scales,
            **({"page": pages - tokens, "slot": 3 * tokens % slots} if paged else {"slot": jnp.int32(11)}),
        }

    return Case(name, arrays, {"interleaved": interleaved}, quick=quick, differentiate=differentiate)
