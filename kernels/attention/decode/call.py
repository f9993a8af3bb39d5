"""A call of decode attention: what is known of it when it is compiled, its two kernels, and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.attention.decode import MAX_QUERIES
from llama_jax.kernels.attention.decode.partition import Cut, fixed_length, shares, visible_slots
from llama_jax.kernels.attention.decode.tiles import Tiles, default_tiles, padded_rows
from llama_jax.kernels.attention.records import KeysValues, Places, Rule, beyond_kernels, refuse_gradients
from llama_jax.kernels.attention.reference import attention_reference, visible
from llama_jax.kernels.pallas import next_power_of_2, tile_width
from llama_jax.targets import current

MAX_HEAD_DIM = 256
DTYPES = ("bfloat16", "float16", "float32")
# Shares that a program of the second kernel reads at a time, at most: 16 KiB of float32 for a head_dim of 128.
COMBINED = 32


@dataclass(frozen=True)
class Call:
    """The static part of a call, known when it is compiled.

    Attributes:
      group: query heads of one key/value head.
      slots: of each row of the cache.
      page_size: slots of a page; 0 without pages.
      cut: how it is cut into shares, for each key/value head.
    """

    batch: int
    queries: int
    group: int
    head_dim: int
    slots: int
    page_size: int
    cut: Cut
    rule: Rule
    tiles: Tiles
    interpret: bool

    @classmethod
    def of(
        cls, rule: Rule, tiles: Tiles, q: jax.Array, kv: KeysValues, places: Places, *, interpret: bool = False
    ) -> Call:
        """For arrays or their shapes, on the current target."""
        kv_heads = kv.k.shape[1]
        rows = q.shape[2] // kv_heads * q.shape[1]
        programs = kv_heads * -(-rows // padded_rows(rows, tiles.block_rows))
        wanted = max(max(current().compute_units, 1) * tiles.programs_per_unit // programs, 1)
        slots = places.kv_positions.shape[1]
        return cls(
            batch=q.shape[0],
            queries=q.shape[1],
            group=q.shape[2] // kv_heads,
            head_dim=q.shape[3],
            slots=slots,
            page_size=0 if kv.page_table is None else kv.k.shape[2],
            cut=Cut(tiles.block_k, wanted, fixed_length(slots, tiles.block_k) if rule.batch_invariant else 0),
            rule=rule,
            tiles=tiles,
            interpret=interpret,
        )

    @property
    def rows(self) -> int:
        """Query rows that share a key/value head."""
        return self.group * self.queries

    @property
    def height(self) -> int:
        """Query rows of one program."""
        return padded_rows(self.rows, self.tiles.block_rows)

    @property
    def width(self) -> int:
        """Columns of a tile."""
        return tile_width(self.head_dim)

    @property
    def most_shares(self) -> int:
        """As many shares as there can be."""
        return self.cut.most_shares(self.batch, self.slots)

    @property
    def combined(self) -> int:
        """Shares that are combined at a time: those of a row, if the rows are of one length."""
        return min(next_power_of_2(-(-self.most_shares // self.batch)), COMBINED)


@dataclass(frozen=True)
class Kernels:
    """The kernels of a backend.

    Attributes:
      shares: of `(call, cut, q, kv, places)`, the attention within each share (`kernel.shares`).
      combine: of `(call, cut, part, lse, sinks, out)`, the result from these (`kernel.combine`).
    """

    shares: Callable[..., tuple[jax.Array, jax.Array]]
    combine: Callable[..., jax.Array]


@dataclass(frozen=True)
class Program:
    """The static part of a call."""

    kernels: Kernels
    rule: Rule
    tiles: Tiles
    interpret: bool


def unsupported(
    q: jax.Array, kv: KeysValues, places: Places, rule: Rule, *, sinks: jax.Array | None = None
) -> str | None:
    """The reason no kernel can run these arguments on any target, or None."""
    if not 0 < q.shape[1] <= MAX_QUERIES:
        return f"{q.shape[1]} queries a row, it takes 1 to {MAX_QUERIES}"
    if q.shape[3] > MAX_HEAD_DIM:
        return f"head_dim {q.shape[3]} is more than {MAX_HEAD_DIM}"
    if not places.kv_positions.shape[1]:
        return "the cache has no slots"
    for x in (q,) if kv.quantised else (q, kv.k, kv.v):
        if x.dtype.name not in DTYPES:
            return f"dtype {x.dtype.name}, it takes {', '.join(DTYPES)}"
    return beyond_kernels(kv, places, rule)


def run(
    kernels: Kernels,
    q: jax.Array,
    kv: KeysValues,
    places: Places,
    rule: Rule,
    *,
    sinks: jax.Array | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `llama_jax.kernels.attention.attention`.

    Queries that see nothing give zeros. Slots that nothing sees may be read, as padding of a block: what they hold must
    be finite. The gradient is that of the reference, which computes everything again: what is trained on is a text of a
    few tokens, so its cost does not matter.

    Args:
      tiles: default: `default_tiles` of the current target.
      interpret: runs as plain JAX operations, on any device.
    """
    if tiles is None:
        itemsize = max(q.dtype.itemsize, kv.k.dtype.itemsize)
        rows = q.shape[2] // kv.k.shape[1] * q.shape[1]
        tiles = default_tiles(
            current(),
            rows=rows,
            head_dim=q.shape[3],
            itemsize=itemsize,
            slots=places.kv_positions.shape[1],
            codes=kv.quantised,
        )
    return _attend(Program(kernels, rule, tiles, interpret), q, kv, sinks, places)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(program: Program, q: jax.Array, kv: KeysValues, sinks: jax.Array | None, places: Places) -> jax.Array:
    call = Call.of(program.rule, program.tiles, q, kv, places, interpret=program.interpret)
    ranges = visible_slots(places.q_positions, places.kv_positions, program.rule.visibility)
    cut = shares(*ranges, call.cut, call.most_shares)
    part, lse = program.kernels.shares(call, cut, q, kv, places)
    return program.kernels.combine(call, cut, part, lse, sinks, jax.ShapeDtypeStruct(q.shape, q.dtype))


def _forward(program: Program, *args: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    refuse_gradients(args[1])
    return _attend(program, *args), args


def _backward(program: Program, saved: tuple[Any, ...], out_grad: jax.Array) -> tuple[Any, ...]:
    rule = program.rule
    q, kv, sinks, places = saved

    def reference(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> jax.Array:
        rounded = replace(kv, k=k.astype(q.dtype), v=v.astype(q.dtype))  # as the kernel does
        return attention_reference(q, rounded, places, rule, sinks=sinks)

    # The zeros of queries that see nothing depend on nothing.
    see = visible(places, rule.visibility)
    out_grad = jnp.where(see.any(axis=2)[:, :, None, None], out_grad, 0)
    _, pull = jax.vjp(reference, q, kv.k, kv.v, sinks)
    dq, dk, dv, d_sinks = pull(out_grad)
    return dq, replace(kv, k=dk, v=dv, page_table=None), d_sinks, None


_attend.defvjp(_forward, _backward)
