"""The engine's state on the device, and the pure functions that change it between steps.

The state is a `DecodeState` over a `PagedCache` with a fixed number of rows. Its shapes never change, so that every
program is compiled once. Only the host knows which sequence is in which row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.cache import PagedCache, protocol, stored
from llama_jax.config import LlamaConfig
from llama_jax.decode.loop import DecodeState, by_rows, idle_state
from llama_jax.engine.settings import EngineSettings
from llama_jax.sampling import FULL, SamplerState, SamplingParams, make_sampler

NO_ROW = np.iinfo(np.int32).max
"""An index past the last row of every cache: padding among row indices."""


def new_state(config: LlamaConfig, settings: EngineSettings, dtype: jnp.dtype) -> DecodeState:
    """Makes a state in which no row has begun and no page is booked; `dtype` is the cache's."""
    cache = PagedCache.create(
        config, settings.rows, settings.context, dtype, page_size=settings.page_size, pages=settings.pages
    )
    # For one row, repeated on the device: arrays over rows and vocabulary would be constants of the program.
    _, idle = make_sampler(
        [SamplingParams(temperature=0.0, seed=0)],
        [()],
        config.vocab_size,
        profile=FULL,
        stop_width=settings.stop_ids,
        bias_width=settings.biases,
    )
    sampler = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), settings.rows, axis=0), idle)
    return by_rows(idle_state(cache, sampler))


def shapes_of(begin: Any) -> Any:
    """Shapes, dtypes and shardings of a compiled program's outputs, such as those of `new_state`."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        begin.out_info,
        begin.output_shardings,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Marked:
    """Tokens that rows have had; arrays [m].

    Attributes:
      rows: int32, the row of each token; NO_ROW is padding.
      tokens: int32. drawn: bool, whether it was drawn (before a preemption) rather than part of the prompt.
    """

    rows: Any
    tokens: Any
    drawn: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Joining:
    """Sequences that begin in idle rows, or resume there after preemption; arrays [n] unless noted.

    Attributes:
      rows: int32, the row of each; NO_ROW is padding.
      pages: int32 [n, pages_per_row], the row's entries in the page table.
      shared: int32, number of tokens already in these pages.
      length: int32, number of tokens to compute before one is drawn.
      limit: int32, the most tokens to draw, including those drawn before (`sampler.count`).
      rope_lengths, adapter_ids: int32, see `DecodeState`.
      sampler: of these rows; without the arrays over the vocabulary, which start empty (`restrict` sends masks).
      marked: tokens that they have had, for penalties.
    """

    rows: Any
    pages: Any
    shared: Any
    length: Any
    limit: Any
    rope_lengths: Any
    adapter_ids: Any
    sampler: SamplerState
    marked: Marked


def join(state: DecodeState, leaving: jax.Array, new: Joining) -> DecodeState:
    """Empties rows `leaving` bool [rows] of the state and begins others; with or without its keys and values
    (`rows_alone`)."""
    cache = paged(state).release(leaving).book(new.rows, new.pages, new.shared)
    begun = {
        "tokens": jnp.zeros_like(new.length),
        "positions": new.length - 1,
        "done": new.limit <= new.sampler.count,
        "finished_by_stop": jnp.zeros_like(new.length, bool),
        "failed": jnp.zeros_like(new.length, bool),
        "limit": new.limit,
        "rope_lengths": new.rope_lengths,
        "adapter_ids": new.adapter_ids,
    }
    state = dataclasses.replace(state, done=state.done | leaving)
    rows = {name: protocol.put_rows(getattr(state, name), new.rows, value) for name, value in begun.items()}
    sampler: dict[str, Any] = {}
    for field in dataclasses.fields(state.sampler):
        into, value = getattr(state.sampler, field.name), getattr(new.sampler, field.name)
        value = jnp.zeros((), into.dtype) if value is None else value
        sampler[field.name] = protocol.put_rows(into, new.rows, value)
    state = dataclasses.replace(state, cache=cache, sampler=SamplerState(**_marked(sampler, new.marked)), **rows)
    return by_rows(state)


def rows_alone(state: DecodeState) -> DecodeState:
    """The state without keys and values. `join` and `restrict` do not need them, and each array passed to a program
    costs host time."""
    none: dict[str, Any] = dict.fromkeys(stored.FIELDS, ())
    return dataclasses.replace(state, cache=dataclasses.replace(paged(state), **none))


def with_rows(state: DecodeState, rows: DecodeState) -> DecodeState:
    """The state with its rows replaced by those of a `rows_alone` state."""
    slots = {name: getattr(paged(state), name) for name in stored.FIELDS}
    return dataclasses.replace(rows, cache=dataclasses.replace(paged(rows), **slots))


def scrub(state: DecodeState, pages: jax.Array) -> DecodeState:
    """Zeroes pages int32 [n] of the state; numbers of no page are padding.

    Attention gives zero weight to leftovers in a page past its row's last token, but NaN times zero is NaN.
    """
    cache = paged(state)
    cleared = stored.changed(cache, lambda x: x.at[pages].set(0, mode="drop"))
    return by_rows(dataclasses.replace(state, cache=dataclasses.replace(cache, **cleared)))


def restrict(state: DecodeState, rows: jax.Array, masks: jax.Array) -> DecodeState:
    """Restricts rows int32 [n] of the state, with or without its keys and values, to the tokens of their masks uint32
    [n, ceil(vocab / 32)]; NO_ROW is padding."""
    sampler = state.sampler
    assert sampler.restricted is not None and sampler.allowed is not None
    restricted = protocol.put_rows(sampler.restricted, rows, jnp.ones_like(rows, bool))
    allowed = protocol.put_rows(sampler.allowed, rows, masks)
    return by_rows(
        dataclasses.replace(state, sampler=dataclasses.replace(sampler, restricted=restricted, allowed=allowed))
    )


def paged(state: DecodeState) -> PagedCache:
    """The cache of a state from `new_state`."""
    assert isinstance(state.cache, PagedCache)
    return state.cache


def _marked(sampler: dict[str, Any], marked: Marked) -> dict[str, Any]:
    """The sampler's arrays over the vocabulary, with these tokens marked."""
    rows, drawn = marked.rows, marked.drawn
    seen = sampler["seen"].at[jnp.where(drawn, rows, NO_ROW), marked.tokens].add(1, mode="drop")
    of_prompt = sampler["in_prompt"].at[jnp.where(drawn, NO_ROW, rows), marked.tokens].set(True, mode="drop")
    return sampler | {"seen": seen, "in_prompt": of_prompt}


def take_rows(state: DecodeState, rows: jax.Array) -> DecodeState:
    """Extracts rows int32 [n] as a separate state; NO_ROW is a row that has ended."""
    part: dict[str, Any] = {
        name: jax.tree.map(lambda x, empty=int(name == "done"): protocol.take_rows(x, rows, empty), value)
        for name, value in _but_cache(state).items()
    }
    return dataclasses.replace(state, cache=state.cache.select(rows), **part)


def put_rows(state: DecodeState, rows: jax.Array, part: DecodeState) -> DecodeState:
    """Puts the rows of `take_rows` back into the state."""
    written: dict[str, Any] = jax.tree.map(
        lambda into, x: protocol.put_rows(into, rows, x), _but_cache(state), _but_cache(part)
    )
    return by_rows(dataclasses.replace(state, cache=state.cache.put(rows, part.cache), **written))


def _but_cache(state: DecodeState) -> dict[str, Any]:
    """Everything with an entry per row; the cache extracts its own rows."""
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "cache"}
