"""The engine's state on the device, and the pure functions that change it between steps.

The state is a `DecodeState` over a `PagedCache` with a fixed number of rows. Its shapes never change, so that every
program is compiled once. Only the host knows which sequence is in which row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.cache import PagedCache, protocol, stored
from llama_jax.config import LlamaConfig
from llama_jax.decode.loop import DecodeState, by_rows, idle_state
from llama_jax.engine.settings import EngineSettings
from llama_jax.sampling import FULL, WIDE, SamplerState, SamplingParams, make_sampler
from llama_jax.sharding import constrain

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
class Joining:
    """Sequences that begin in rows without one, or resume there after preemption; arrays [n] unless noted.

    Attributes:
      rows: int32, the row of each; NO_ROW is padding.
      pages: int32 [n, pages_per_row], the row's entries in the page table.
      shared: int32, number of tokens already in these pages.
      length: int32, number of tokens to compute before one is drawn.
      limit: int32, the most tokens to draw, including those drawn before (`sampler.count`).
      rope_lengths, adapter_ids: int32, see `DecodeState`.
      sampler: of these rows, without the arrays over the vocabulary, which `mark` has prepared.
    """

    rows: Any
    pages: Any
    shared: Any
    length: Any
    limit: Any
    rope_lengths: Any
    adapter_ids: Any
    sampler: SamplerState


@jax.jit
def join(state: DecodeState, new: Joining) -> DecodeState:
    """Begins sequences in rows, whatever these held before. Jitted, so that it is traced once for all programs."""
    cache = paged(state).book(new.rows, new.pages, new.shared)
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
    rows = {name: protocol.put_rows(getattr(state, name), new.rows, value) for name, value in begun.items()}
    sampler: dict[str, Any] = {
        field.name: protocol.put_rows(getattr(state.sampler, field.name), new.rows, value)
        for field in dataclasses.fields(state.sampler)
        if (value := getattr(new.sampler, field.name)) is not None
    }
    sampler_of_all = dataclasses.replace(state.sampler, **sampler)
    return by_rows(dataclasses.replace(state, cache=cache, sampler=sampler_of_all, **rows))


def wide(sampler: SamplerState) -> dict[str, Any]:
    """The arrays over the vocabulary by name. `mark` takes no others: each array passed to a program costs time."""
    return {name: getattr(sampler, name) for name in WIDE}


def narrow(state: DecodeState) -> DecodeState:
    """The state without the arrays over the vocabulary, as programs for greedy requests take it: their rows have no
    mask or penalty, and it costs time to take a row's part of these arrays out and to put it back."""
    return _with_wide(state, dict.fromkeys(WIDE))


def widened(state: DecodeState, other: DecodeState) -> DecodeState:
    """A state from `narrow`, with the arrays over the vocabulary of another."""
    return _with_wide(state, wide(other.sampler))


def _with_wide(state: DecodeState, arrays: dict[str, Any]) -> DecodeState:
    return dataclasses.replace(state, sampler=dataclasses.replace(state.sampler, **arrays))


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


def mark(arrays: dict[str, Any], rows: jax.Array, masks: jax.Array, begun: jax.Array, marked: Marked) -> dict[str, Any]:
    """Prepares the arrays over the vocabulary (`wide`) for the next step; NO_ROW is padding among rows.

    Args:
      rows: int32 [n], those that get masks uint32 [n, ceil(vocab / 32)]; they draw other tokens only where `restricted`
        is off.
      begun: int32 [m], rows whose tokens so far are forgotten, before the marked ones are counted.
    """
    in_prompt = protocol.put_rows(arrays["in_prompt"], begun, jnp.zeros((), bool))
    seen = protocol.put_rows(arrays["seen"], begun, jnp.zeros((), jnp.int32))
    of_prompt, drawn = (jnp.where(marked.drawn == own, marked.rows, NO_ROW) for own in (False, True))
    changed = {
        "allowed": protocol.put_rows(arrays["allowed"], rows, masks),
        "in_prompt": in_prompt.at[of_prompt, marked.tokens].set(True, mode="drop"),
        "seen": seen.at[drawn, marked.tokens].add(1, mode="drop"),
    }
    axes: dict[str, Any] = {name: ("batch",) if name == "allowed" else ("batch", "vocab") for name in WIDE}
    return {name: constrain(x, axes[name]) for name, x in changed.items()}


def scrub(state: DecodeState, pages: jax.Array) -> DecodeState:
    """Zeroes pages int32 [n] of the state; numbers of no page are padding.

    Attention gives zero weight to leftovers in a page past its row's last token, but NaN times zero is NaN.
    """
    cache = paged(state)
    cleared = stored.changed(cache, lambda x: x.at[pages].set(0, mode="drop"))
    return by_rows(dataclasses.replace(state, cache=dataclasses.replace(cache, **cleared)))


def paged(state: DecodeState) -> PagedCache:
    """The cache of a state from `new_state`."""
    assert isinstance(state.cache, PagedCache)
    return state.cache


def take_rows(state: DecodeState, rows: jax.Array) -> DecodeState:
    """Extracts rows int32 [n] as a separate state; NO_ROW is a row that has ended."""
    all_but_cache = {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "cache"}
    part: dict[str, Any] = {
        name: jax.tree.map(lambda x, empty=int(name == "done"): protocol.take_rows(x, rows, empty), value)
        for name, value in all_but_cache.items()
    }
    return dataclasses.replace(state, cache=state.cache.select(rows), **part)


def put_rows(state: DecodeState, rows: jax.Array, part: DecodeState) -> DecodeState:
    """Puts back into the state what steps have changed of the rows of `take_rows`."""

    def put(into: Any, of: Any, names: Iterable[str]) -> dict[str, Any]:
        changed = {name: (getattr(into, name), getattr(of, name)) for name in names}
        return {name: None if x is None else protocol.put_rows(x, rows, y) for name, (x, y) in changed.items()}

    sampler = dataclasses.replace(state.sampler, **put(state.sampler, part.sampler, ("count", "seen")))
    of_rows = put(state, part, ("tokens", "positions", "done", "finished_by_stop", "failed"))
    return by_rows(dataclasses.replace(state, cache=state.cache.put(rows, part.cache), sampler=sampler, **of_rows))
