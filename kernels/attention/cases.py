"""Kinds of attention calls, for the tables, and small cases that expose a wrong mask, scale or head mapping."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.kernels.attention.records import CODES, SCHEMES, KeysValues, Places, Rule, Visibility
from llama_jax.kernels.attention.shapes import (
    DECODES,
    FULL,
    MEASURED_DECODES,
    MEASURED_PREFILLS,
    PREFILLS,
    AttentionShape,
)
from llama_jax.kernels.dispatch.cases import Arrays, Case, neighbours
from llama_jax.targets import Target

STAGES = {"amd": (1, 2), "nvidia": (2, 3, 4), "cpu": ()}
"""Pipeline stages of a loop, by vendor."""
LONG = 1024
"""Number of queries from which a prefill is worth large tiles."""
SPLIT = 8192
"""Slots from which splitting a row's keys over several groups pays most."""


def arguments(
    *,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    visibility: Visibility,
    scale: float,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    page_table: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    q_index: jax.Array | None = None,
    in_order: bool = False,
    batch_invariant: bool = False,
) -> dict[str, Any]:
    """A case's arrays and options, each by its name, as the arguments of `llama_jax.kernels.attention.attention`."""
    return {
        "q": q,
        "kv": KeysValues(k, v, page_table, k_scale, v_scale),
        "places": Places(q_positions, kv_positions, q_segments, kv_segments, q_index=q_index),
        "rule": Rule(visibility, scale, soft_cap, in_order, batch_invariant=batch_invariant),
        "sinks": sinks,
    }


def flash_shape(q: jax.Array, kv: KeysValues, places: Places, *args: Any, **kwargs: Any) -> str:
    """For example "d128 long", "d64 short int8 paged"."""
    length = "long" if places.q_positions.shape[1] >= LONG else "short"
    return f"d{q.shape[3]} {length}{_of_cache(kv)}"


def decode_shape(q: jax.Array, kv: KeysValues, *args: Any, **kwargs: Any) -> str:
    """For example "d128 b8 long", "d64 b1 short paged": head_dim, rows up to a power of two, slots a row."""
    rows = 1 << (q.shape[0] - 1).bit_length()
    return f"d{q.shape[3]} b{rows} {'long' if _slots(kv) >= SPLIT else 'short'}{_of_cache(kv)}"


def _slots(kv: KeysValues) -> int:
    """Slots of a row."""
    return kv.k.shape[2] if kv.page_table is None else kv.page_table.shape[1] * kv.k.shape[2]


def _of_cache(kv: KeysValues) -> str:
    return f"{kv.scheme and ' ' + kv.scheme}{'' if kv.page_table is None else ' paged'}"


def flash_cases() -> Sequence[Case]:
    """Small prefills: padding, windows, chunks, groups of heads, pages with a prefix already in them."""
    grad = ("q", "k", "v")
    make = partial(_case, batch=2, q_len=130, prefix=0)
    return (
        make("causal d64", head_dim=64, quick=True, differentiate=grad),
        make("window d128", head_dim=128, visibility=Visibility("sliding", 37), quick=True, differentiate=grad),
        make("chunks d80", head_dim=80, visibility=Visibility("chunked", 48)),
        make("paged prefix d64", head_dim=64, prefix=93, page_size=16),
        make("block of a chunk, paged d128", head_dim=128, q_len=64, prefix=150, page_size=64),
        make("packed, paged d128", head_dim=128, q_len=64, prefix=150, page_size=64, indexed=True, quick=True),
        make("soft cap, sinks d128", head_dim=128, soft_cap=20.0, sinks=True),
        make("one head a group d256", head_dim=256, heads=2, kv_heads=2),
        make("in order d128", head_dim=128, uneven=False, quick=True, differentiate=grad),
        make("int8, paged prefix d128", head_dim=128, prefix=93, page_size=16, scheme="int8"),
        make(
            "int8, packed, soft cap d64",
            head_dim=64,
            q_len=64,
            prefix=150,
            page_size=64,
            soft_cap=20.0,
            indexed=True,
            scheme="int8",
        ),
        make("int8, window d80", head_dim=80, visibility=Visibility("sliding", 37), scheme="int8"),
        make("int4, paged prefix d128", head_dim=128, prefix=93, page_size=16, scheme="int4"),
        make(
            "int4, packed, sinks d64",
            head_dim=64,
            q_len=64,
            prefix=150,
            page_size=64,
            sinks=True,
            indexed=True,
            scheme="int4",
        ),
        make("int4, window d80", head_dim=80, visibility=Visibility("sliding", 37), scheme="int4"),
        make("k8v4, packed, paged d128", head_dim=128, q_len=64, prefix=150, page_size=64, indexed=True, scheme="k8v4"),
        make("fp8, packed, paged d128", head_dim=128, q_len=64, prefix=150, page_size=64, indexed=True, scheme="fp8"),
        make("fp8_fnuz, window d80", head_dim=80, visibility=Visibility("sliding", 37), scheme="fp8_fnuz"),
    )


def decode_cases() -> Sequence[Case]:
    """Small decode steps: rows of different lengths, several queries, windows, pages in any order."""
    make = partial(_case, batch=3, q_len=1, prefix=300)
    return (
        make("d64", head_dim=64, quick=True),
        make("paged d128", head_dim=128, page_size=64, quick=True),
        make("window, 4 queries d128", head_dim=128, q_len=4, visibility=Visibility("sliding", 100)),
        make(
            "chunks, soft cap, sinks d64", head_dim=64, visibility=Visibility("chunked", 128), soft_cap=9.0, sinks=True
        ),
        make("paged, 8 queries d80", head_dim=80, q_len=8, page_size=16),
        make("one key/value head d128", head_dim=128, heads=8, kv_heads=1),
        make("one row, paged d128", batch=1, head_dim=128, page_size=64),
        make("one row, window, sinks d64", batch=1, head_dim=64, visibility=Visibility("sliding", 100), sinks=True),
        make("shares of fixed length, paged d128", head_dim=128, prefix=1100, page_size=64, batch_invariant=True),
        make("int8, paged d128", head_dim=128, page_size=64, scheme="int8", quick=True),
        make("int8, 4 queries, soft cap, sinks d80", head_dim=80, q_len=4, soft_cap=9.0, sinks=True, scheme="int8"),
        make("int4, paged d128", head_dim=128, page_size=64, scheme="int4", quick=True),
        make("k8v4, paged d64", head_dim=64, page_size=16, scheme="k8v4"),
        make("int4, 4 queries, soft cap, sinks d80", head_dim=80, q_len=4, soft_cap=9.0, sinks=True, scheme="int4"),
        make("fp8, paged d128", head_dim=128, page_size=64, scheme="fp8"),
        make("fp8, 4 queries, soft cap, sinks d80", head_dim=80, q_len=4, soft_cap=9.0, sinks=True, scheme="fp8"),
        make("fp8_fnuz, paged d64", head_dim=64, page_size=16, scheme="fp8_fnuz"),
    )


def flash_models(numbers: Mapping[str, Any] | None = None) -> Sequence[Case]:
    """Prefills of common models, or of the one with these numbers."""
    found = PREFILLS if numbers is None else _with_heads(MEASURED_PREFILLS, numbers)
    grad = ("q", "k", "v")
    return tuple(
        Case(
            shape.name,
            shape.example,
            shape.options(),
            differentiate=grad if shape.backward else (),
            flops=shape.flops(),
            bytes=shape.bytes(),
            call=arguments,
        )
        for shape in found
    )


def flash_candidates(
    target: Target, q: jax.Array, kv: KeysValues, places: Places, *args: Any, **kwargs: Any
) -> Iterator[Any]:
    """Tiles worth measuring for a call: the default and its neighbours in the forward kernel."""
    from llama_jax.kernels.attention.flash.tiles import default_tiles

    (q_len, kv_len), group = (
        (x.shape[1] for x in (places.q_positions, places.kv_positions)),
        q.shape[2] // kv.k.shape[1],
    )
    sizes = {"q_len": q_len, "kv_len": kv_len, "group": group, "text": q.shape[1]}
    tiles = default_tiles(target, head_dim=q.shape[3], dtype=q.dtype, **sizes)
    return neighbours(
        tiles,
        block_k=[n for n in (2 * tiles.block_k, tiles.block_k // 2) if n >= 16],
        block_q=[n for n in (2 * tiles.block_q, tiles.block_q // 2) if n >= 16 * tiles.heads],
        num_warps=(2 * tiles.num_warps, tiles.num_warps // 2 or 1),
        num_stages=STAGES[target.vendor],
    )


def decode_models(numbers: Mapping[str, Any] | None = None) -> Sequence[Case]:
    """Decode steps of common models, or of the one with these numbers."""
    found = DECODES if numbers is None else _with_heads(MEASURED_DECODES, numbers)
    return tuple(
        Case(shape.name, shape.example, shape.options(), bytes=shape.bytes(), call=arguments) for shape in found
    )


def decode_candidates(target: Target, q: jax.Array, kv: KeysValues, *args: Any, **kwargs: Any) -> Iterator[Any]:
    """Tiles worth measuring for a call."""
    from llama_jax.kernels.attention.decode.tiles import candidates

    rows, itemsize = q.shape[2] // kv.k.shape[1] * q.shape[1], max(q.dtype.itemsize, kv.k.dtype.itemsize)
    slots = _slots(kv)
    return candidates(target, rows=rows, head_dim=q.shape[3], itemsize=itemsize, slots=slots, codes=kv.quantised)


def _with_heads(shapes: Iterable[AttentionShape], numbers: Mapping[str, Any]) -> list[AttentionShape]:
    """The shapes with a model's heads, each of them once."""
    heads = {"q_heads": numbers["heads"], "kv_heads": numbers["kv_heads"], "head_dim": numbers["head_dim"]}
    named: dict[AttentionShape, AttentionShape] = {}
    for shape in shapes:
        changed = replace(shape, **heads)
        named.setdefault(replace(changed, name=""), changed)
    return list(named.values())


def _case(
    name: str,
    *,
    batch: int,
    q_len: int,
    prefix: int,
    head_dim: int,
    heads: int = 8,
    kv_heads: int = 2,
    visibility: Visibility = FULL,
    soft_cap: float | None = None,
    sinks: bool = False,
    page_size: int | None = None,
    uneven: bool = True,
    batch_invariant: bool = False,
    indexed: bool = False,
    scheme: str = "",
    quick: bool = False,
    differentiate: tuple[str, ...] = (),
) -> Case:
    """Every row has `prefix` tokens in its cache, then its queries. If `uneven`, row i has 7 i fewer in its cache, and
    some queries fewer, which are padding on the left. If `indexed`, the queries are packed in any order. With a
    `scheme`, keys and values are codes, with scales that differ by factors from one token and head to the next."""
    step, pad = (7, 3) if uneven else (0, 0)
    slots = prefix + q_len
    if page_size is not None:
        slots = -(-slots // page_size) * page_size

    def arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32).astype(jnp.bfloat16)

        rows = np.arange(batch)[:, None]
        lengths = np.maximum(prefix - step * rows, 0)
        padding = np.minimum(pad * rows, q_len - 1)
        at = np.arange(q_len)[None] - padding
        slot = np.arange(slots)[None]
        pages = 0 if page_size is None else batch * slots // page_size
        cache = (batch, kv_heads, slots) if page_size is None else (pages, kv_heads, page_size)
        made = {
            "q": normal(*((1, batch * q_len) if indexed else (batch, q_len)), heads, head_dim),
            "k": normal(*cache, head_dim),
            "v": normal(*cache, head_dim),
            "q_positions": np.where(at >= 0, lengths + at, -1).astype(np.int32),
            "kv_positions": np.where(slot < lengths + q_len - padding, slot, -1).astype(np.int32),
        }
        for name, kind in zip("kv", (CODES[kind] for kind in SCHEMES.get(scheme, ())), strict=False):
            shape, scales = (*cache, head_dim // kind.per_byte), rng.uniform(0.2, 3, cache) * 2 / kind.largest
            if kind.dtype.startswith("float"):
                made[name] = rng.uniform(-1, 1, shape).astype(kind.dtype)
            else:
                limit = np.iinfo(kind.dtype)
                made[name] = rng.integers(max(limit.min, -kind.largest), limit.max + 1, shape, kind.dtype)
            made[f"{name}_scale"] = scales.astype(jnp.bfloat16)
        if indexed:
            made["q_index"] = rng.permutation(batch * q_len).reshape(batch, q_len).astype(np.int32)
        if sinks:
            made["sinks"] = rng.standard_normal(heads, np.float32)
        if pages:
            made["page_table"] = rng.permutation(pages).reshape(batch, -1).astype(np.int32)
        return made

    static = {"visibility": visibility, "scale": head_dim**-0.5, "soft_cap": soft_cap}
    if q_len > 8 and not prefix and not uneven:
        static["in_order"] = True
    if batch_invariant:
        static["batch_invariant"] = True
    return Case(name, arrays, static, _is_no_padding, quick, differentiate, numpy=True, call=arguments)


def _is_no_padding(arrays: Arrays) -> jax.Array:
    real = arrays["q_positions"] >= 0
    if (index := arrays.get("q_index")) is not None:
        real = jnp.zeros((1, index.size), bool).at[0, index].set(real)
    return real[:, :, None, None]
