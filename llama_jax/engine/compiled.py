"""The compilation of an engine's programs, before the first request or when they are needed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import jax
import numpy as np

from llama_jax.aot.stored import compile_stored, tracing_context
from llama_jax.cache import PagedCache
from llama_jax.decode.loop import DecodeState
from llama_jax.decode.prefill import NO_ROW
from llama_jax.engine.draft_programs import DRAFT, FOLLOW, DraftParts
from llama_jax.engine.flat import flat
from llama_jax.engine.program_set import Key, masks_of, program, program_set, restricted, texts_of
from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.state import Joining, rows_alone, with_rows
from llama_jax.errors import LateCompilation
from llama_jax.kernels.dispatch import using
from llama_jax.model.loaded import Model
from llama_jax.params import Params
from llama_jax.runtime import count_compilations
from llama_jax.sharding import on

KEPT = 16
"""Engines of different shapes whose programs stay in memory."""

THREADS = min(16, os.cpu_count() or 1)


@dataclass(frozen=True)
class Compiled:
    """News of `Programs.compile_all`: a program is compiled.

    Attributes:
      seconds: that it took, beside others; from_cache: whether jax found it in its persistent cache.
      done, total: programs.
      left_s: how long the rest may take, if its programs take as long as those that are done.
    """

    key: Key
    seconds: float
    from_cache: bool
    done: int
    total: int
    left_s: float


class Programs:
    """Compiles programs, each once, and runs them. A compiled program takes arrays of its shapes only: what would need
    another one is an error, and never compiles anything.

    Attributes:
      late: what was compiled after `compile_all`: programs of the set, and whatever else jax compiled in blocks of
        `with programs`.
      from_cache: programs that `compile_all` found in jax's persistent cache.
    """

    def __init__(
        self,
        model: Model,
        settings: EngineSettings,
        state: DecodeState,
        adapters: Params | None,
        compiled: dict[Key, Any],
        draft: DraftParts | None = None,
    ):
        """Args: arrays or their shapes, and where programs are that are compiled already (`compiled_before`)."""
        self._model, self._settings, self._adapters, self._draft = model, settings, adapters, draft
        self._state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        self._compiled = compiled
        self._lock = threading.Lock()
        self._coming: dict[Key, Future[bool]] = {}
        self._ready = False
        self._counted, self._before = count_compilations(), 0
        self._no_masks: jax.Array | None = None
        self._texts: jax.Array | None = None
        self.late = self.from_cache = 0
        on_gpu = model.device.platform != "cpu"
        self.keys = program_set(settings, greedy=on_gpu if settings.greedy is None else settings.greedy)

    def compile_all(self) -> Iterator[Compiled]:
        """Compiles what is missing, several at a time and the largest first; yields news of each when it is done.

        Tracing holds Python's lock, but most of the time XLA compiles, which does not. Programs for greedy requests
        come last: XLA tries kernels out for the products of a size, and does it twice where two programs of that size
        are compiled side by side.
        """
        missing = sorted(self.missing, key=lambda key: (key.greedy, -key.size))
        began, total, spent = time.monotonic(), len(missing), 0.0
        with ThreadPoolExecutor(THREADS) as pool:
            for done, future in enumerate(as_completed([pool.submit(self._timed, key) for key in missing]), 1):
                key, seconds, from_cache = future.result()
                self.from_cache += from_cache
                spent += seconds
                expected = spent / done * total / min(THREADS, total)
                left_s = max(0.0, began + expected - time.monotonic()) if done < total else 0.0
                yield Compiled(key, seconds, from_cache, done, total, left_s)
        self._ready = True

    @property
    def missing(self) -> list[Key]:
        """Programs of the set that are not compiled yet."""
        return [key for key in self.keys if key not in self._compiled]

    @property
    def count(self) -> int:
        """Programs that are compiled."""
        return len(self.keys) - len(self.missing)

    def expect(self, name: str, least: int, *, greedy: bool) -> None:
        """Begins to compile the program that `choose` gives, in a thread, unless it has been."""
        if self._ready:
            return
        key = self.choose(name, least, greedy=greedy)
        if key not in self._compiled and key not in self._coming:
            self._coming[key] = _in_background().submit(self._compile, key)

    @property
    def coming(self) -> bool:
        """Whether a program is being compiled that was expected."""
        return any(not future.done() for future in self._coming.values())

    def __enter__(self) -> None:
        """Begins to count what jax compiles on this thread, until the end of the block."""
        self._before = self._counted.count

    def __exit__(self, error: object, *_: object) -> None:
        """Adds it to `late` if all of the set should be compiled.

        Raises:
          LateCompilation: in a strict engine, for anything.
        """
        if self._ready and (count := self._counted.count - self._before):
            self.late += count
            if self._settings.strict and error is None:
                raise _late(f"jax compiled {self._counted.last or 'something'}, which is not of the engine's programs,")

    def choose(self, name: str, least: int, *, greedy: bool) -> Key:
        """The smallest program of that name for `least` rows or tokens."""
        sizes = [key.size for key in self.keys if key.name == name and key.size >= least]
        key = Key(name, min(sizes), greedy)
        return key if key in self.keys else Key(name, key.size)

    def join(self, state: DecodeState, leaving: np.ndarray, new: Joining) -> DecodeState:
        """See `state.join`."""
        return with_rows(state, self._get(Key("join"))(rows_alone(state), flat((leaving, new))))

    def restrict(self, state: DecodeState, rows: list[int], masks: list[np.ndarray]) -> DecodeState:
        """See `state.restrict`."""
        width = restricted(self._settings)
        for start in range(0, len(rows), width):
            some = slice(start, start + width)
            padded = np.full(width, NO_ROW, np.int32)
            padded[: len(rows[some])] = rows[some]
            words = np.zeros((width, len(masks[0])), np.uint32)
            words[: len(rows[some])] = masks[some]
            state = with_rows(state, self._get(Key("restrict"))(rows_alone(state), padded, words))
        return state

    def scrub(self, state: DecodeState, pages: list[int]) -> DecodeState:
        """See `state.scrub`."""
        width = self._settings.pages_per_row
        for start in range(0, len(pages), width):
            padded = np.full(width, self._settings.pages, np.int32)
            padded[: len(pages) - start] = pages[start : start + width]
            state = self._get(Key("scrub"))(state, padded)
        return state

    def remember(self, row: int, tokens: list[int]) -> None:
        """Gives the device the text of a row, in which it is to look for drafts (`lookup`)."""
        texts = self._texts_there()
        assert texts is not None
        text = np.zeros(texts.shape[1], np.int32)
        text[: len(tokens)] = tokens
        self._texts = self._get(Key("remember"))(texts, np.int32(row), text)

    def step(
        self, key: Key, state: DecodeState, control: np.ndarray, masks: np.ndarray | None = None
    ) -> tuple[Any, ...]:
        """See `programs.decode`, `programs.verify` and `programs.mixed`.

        Args:
          masks: of `verify`; None if no row has any.
        """
        arguments = (self._model.params, state, control, self._adapters)
        run = self._get(key)
        if key.name != "verify":
            return run(*arguments)
        if masks is None and self._no_masks is None:  # what nobody reads need not be sent each time
            shape = self.masks(key)
            self._no_masks = jax.device_put(np.zeros(shape.shape, shape.dtype), run.input_shardings[0][-1])
        *drawn, self._texts = run(*arguments, self._texts_there(), self._no_masks if masks is None else masks)
        return tuple(drawn)

    def draft(self, name: str, cache: PagedCache, control: np.ndarray) -> Any:
        """See `draft_programs.draft` and `draft_programs.follow`."""
        assert self._draft is not None
        return self._get(self.choose(name, 0, greedy=False))(self._draft.model.params, cache, control)

    def masks(self, key: Key) -> jax.ShapeDtypeStruct:
        """Of a program `verify`: see there."""
        return masks_of(key, self._settings, self._model.config)

    def _texts_there(self) -> jax.Array | None:
        """The texts that rows look for drafts in, made when they are first needed; None if none does."""
        if self._texts is None and (like := texts_of(self._settings, self._state)) is not None:
            self._texts = jax.device_put(np.zeros(like.shape, like.dtype), like.sharding)
        return self._texts

    def _get(self, key: Key) -> Any:
        if key not in self._compiled:
            if self._ready and self._settings.strict:
                raise _late(f"the program {str(key)!r} would have to be compiled")
            if expected := self._coming.pop(key, None):
                expected.result()
            else:
                self._compile(key)
            self.late += self._ready
            self._before = self._counted.count
        return self._compiled[key]

    def _timed(self, key: Key) -> tuple[Key, float, bool]:
        """Compiles a program; returns it, the seconds that it took and whether it was in the persistent cache."""
        start, before = time.monotonic(), self._counted.from_cache
        read = self._compile(key)
        return key, time.monotonic() - start, read or self._counted.from_cache > before

    def _compile(self, key: Key) -> bool:
        """Compiles a program; whether it was on the disk."""
        draft = self._draft if key.name in (DRAFT, FOLLOW) else None
        model = draft.model if draft else self._model
        about = model.config, shapes_alone(self._settings), key, sorted(model.kernels.items()), draft and draft.vocab
        with on(model.mesh), using(**model.kernels):
            if draft:
                made = draft.program(key.name, self._settings)
            else:
                made = program(key, model.config, self._settings, model.params, self._state, self._adapters)
            compiled, read = compile_stored(made, about, model.devices, model.mesh)
        with self._lock:
            self._compiled[key] = compiled
        return read


def _late(what: str) -> LateCompilation:
    return LateCompilation(
        f"{what} after the engine was ready",
        hint="please report this with the engine's settings; without strict it is only counted",
    )


def shapes_alone(settings: EngineSettings) -> EngineSettings:
    """The settings without what changes no program."""
    return replace(settings, waiting=None, strict=False, constraint_s=1.0, greedy=None)


def compiled_before(
    model: Model, settings: EngineSettings, adapters: Params | None, draft: Model | None = None
) -> dict[Key, Any]:
    """Programs that engines of the same shapes have compiled in this process, and where to put more of them."""
    with on(model.mesh), using(**model.kernels):
        context = tracing_context()
    leaves, structure = jax.tree.flatten((model.params, adapters, draft and draft.params))
    arrays = tuple((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
    of_draft = draft and (draft.config, draft.kv_dtype, tuple(sorted(draft.kernels.items())))
    of_model = model.config, model.kv_dtype, shapes_alone(settings), model.mesh
    return _compiled_for((*of_model, structure, arrays, context, of_draft))


@lru_cache(maxsize=KEPT)
def _compiled_for(shapes: Hashable) -> dict[Key, Any]:
    return {}


def forget() -> None:
    """Lets go of all programs but those of engines that are in use."""
    _compiled_for.cache_clear()


@cache
def _in_background() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="llama_jax compilation")
