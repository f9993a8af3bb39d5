"""Compilation of an engine's programs, before the first request or on demand."""

from __future__ import annotations

import math
import os
import threading
import time
import warnings
from collections.abc import Hashable, Iterator
from collections.abc import Sequence as ListOf
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import jax
import numpy as np

from llama_jax.aot.stored import compile_stored, tracing_context
from llama_jax.cache import PagedCache
from llama_jax.decode.loop import DecodeState
from llama_jax.engine.adapter_pool import AdapterSlots
from llama_jax.engine.draft_programs import DRAFT, FOLLOW, DraftParts
from llama_jax.engine.program_set import MARKED, Key, masked, masks_of, program, program_set, sufficient, texts_of
from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.state import NO_ROW, Marked, narrow, wide, widened
from llama_jax.errors import LateCompilation
from llama_jax.kernels.dispatch import using
from llama_jax.model.loaded import Model
from llama_jax.params import Params
from llama_jax.runtime import count_compilations
from llama_jax.sampling import token_mask
from llama_jax.sharding import on

KEPT = 16
"""Number of engine shapes whose programs stay in memory."""

THREADS = min(16, os.cpu_count() or 1)


@dataclass(frozen=True)
class Compiled:
    """News of `Programs.compile_all`: a program is compiled.

    Attributes:
      seconds: its compilation time, concurrent with others; from_cache: whether it was in jax's persistent cache.
      done, total: programs.
      left_s: estimate for the rest, if its programs take as long as those done.
    """

    key: Key
    seconds: float
    from_cache: bool
    done: int
    total: int
    left_s: float


class Programs:
    """Compiles programs, each once, and runs them. A compiled program takes only arrays of its shapes: others are an
    error and never trigger compilation.

    Attributes:
      late: compilations after `compile_all`: programs of the set, and anything else that jax compiled in
        `with programs` blocks.
      from_cache: number of programs that `compile_all` found in jax's persistent cache.
    """

    def __init__(
        self,
        model: Model,
        settings: EngineSettings,
        state: DecodeState,
        adapters: AdapterSlots | None,
        compiled: dict[Key, Any],
        draft: DraftParts | None = None,
    ):
        """Args: arrays or their shapes, and the store of programs compiled already (`compiled_before`)."""
        self._model, self._settings, self._adapters, self._draft = model, settings, adapters, draft
        self._state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        self._compiled = compiled
        self._lock = threading.Lock()
        self._coming: dict[Key, Future[bool]] = {}
        self._ready = False
        self._counted, self._before = count_compilations(), 0
        self._no_masks: jax.Array | None = None
        self._texts: jax.Array | None = None
        self._words = masked(settings), token_mask.all_allowed(model.config.vocab_size).size
        self.late = self.from_cache = 0
        self.keys = program_set(settings, on_cpu=model.device.platform == "cpu")

    def compile_all(self, *, early: bool = False) -> Iterator[Compiled]:
        """Compiles missing programs, several at a time and the largest first; yields progress as each is done.

        Programs are traced one by one (`Program.lower`), while XLA compiles those before. Those of a size that another
        has come last: XLA autotunes the products of a size, and would do so twice if two were compiled concurrently.

        Args:
          early: whether to end with those that are `sufficient`; the others are then compiled in the background.
        """
        missing = self.awaited(early=early)
        began, total, spent = time.monotonic(), len(missing), 0.0
        with ThreadPoolExecutor(THREADS) as pool:
            for done, future in enumerate(as_completed([pool.submit(self._timed, key) for key in missing]), 1):
                key, seconds, from_cache = future.result()
                self.from_cache += from_cache
                spent += seconds
                expected = spent / done * total / min(THREADS, total)
                left_s = max(0.0, began + expected - time.monotonic()) if done < total else 0.0
                yield Compiled(key, seconds, from_cache, done, total, left_s)
        self._coming |= {key: _in_background().submit(self._compile_behind, key) for key in self.awaited()}
        self._ready = True

    @property
    def _slots(self) -> Params | None:
        return None if self._adapters is None else self._adapters.tree

    def awaited(self, *, early: bool = False) -> list[Key]:
        """Missing programs that `compile_all` waits for, in the order of their compilation."""
        wanted = sufficient(self.keys) if early else self.keys
        missing = [key for key in wanted if key not in self._compiled]
        return sorted(missing, key=lambda key: (key.greedy or key.rows > 0 or key.name == "scored", -key.size))

    @property
    def count(self) -> int:
        """Number of compiled programs."""
        return len(self.keys) - len(self.awaited())

    @property
    def behind(self) -> int:
        """Number of programs that are still compiled in the background of an engine that is ready; from any thread."""
        return sum(not future.done() for future in list(self._coming.values())) if self._ready else 0

    def leave_behind(self) -> None:
        """Gives up the programs that the background has not begun."""
        for future in list(self._coming.values()):
            future.cancel()

    def expect(self, name: str, least: int, *, greedy: bool) -> None:
        """Starts compiling the program that `choose` returns in a thread, unless that has been done."""
        if self._ready:
            return
        key = self.choose(name, least, greedy=greedy)
        if key not in self._compiled and key not in self._coming:
            self._coming[key] = _in_background().submit(self._compile, key)

    @property
    def coming(self) -> bool:
        """Whether an expected program is still being compiled, and the engine has no other for it."""
        return not self._ready and any(not future.done() for future in self._coming.values())

    def __enter__(self) -> None:
        """Counts jax's compilations on this thread until the end of the block."""
        self._before = self._counted.count

    def __exit__(self, error: object, *_: object) -> None:
        """Adds them to `late` if the whole set should be compiled already.

        Raises:
          LateCompilation: there were any, and the engine is strict.
        """
        if self._ready and (count := self._counted.count - self._before):
            self.late += count
            if self._settings.strict and error is None:
                raise _late(f"jax compiled {self._counted.last or 'something'}, which is not of the engine's programs,")

    def choose(self, name: str, least: int, *, greedy: bool, rows: int = 0) -> Key:
        """The smallest program of that name for at least `least` rows or tokens, or while that is compiled in the
        background another that can do the same.

        Args:
          rows: of a step with prompts.
        """
        able = [
            key
            for key in self.keys
            if key.name == name and key.size >= least and key.greedy <= greedy and (not key.rows or key.rows >= rows)
        ]
        best = min(able, key=_cost)
        if self._ready and best not in self._compiled:
            best = min((key for key in able if key in self._compiled), key=_cost, default=best)
        return best

    def mark(
        self,
        state: DecodeState,
        masks: ListOf[tuple[int, np.ndarray]],
        begun: ListOf[int] = (),
        marks: ListOf[tuple[int, int, bool]] = (),
    ) -> DecodeState:
        """See `state.mark`: masks by row, rows that begin, and (row, token, drawn) of each marked token."""
        settings, width = self._settings, masked(self._settings)
        while masks or begun or marks:
            rows, words = np.full(width, NO_ROW, np.int32), np.zeros(self._words, np.uint32)
            for i, (row, mask) in enumerate(masks[:width]):
                rows[i], words[i] = row, mask
            first = np.full(settings.chunk_rows, NO_ROW, np.int32)
            first[: len(begun)] = begun
            marked = Marked(np.full(MARKED, NO_ROW, np.int32), np.zeros(MARKED, np.int32), np.zeros(MARKED, bool))
            for i, mark in enumerate(marks[:MARKED]):
                marked.rows[i], marked.tokens[i], marked.drawn[i] = mark
            new = self._get(Key("mark"))(wide(state.sampler), rows, words, first, marked)
            state = replace(state, sampler=replace(state.sampler, **new))
            masks, begun, marks = masks[width:], (), marks[MARKED:]
        return state

    def scrub(self, state: DecodeState, pages: list[int]) -> DecodeState:
        """See `state.scrub`. Does nothing where attention has no need of it."""
        if Key("scrub") not in self.keys:
            return state
        width = self._settings.pages_per_row
        for start in range(0, len(pages), width):
            padded = np.full(width, self._settings.pages, np.int32)
            padded[: len(pages) - start] = pages[start : start + width]
            state = self._get(Key("scrub"))(state, padded)
        return state

    def remember(self, row: int, tokens: list[int]) -> None:
        """Sends the device a row's text, to look for drafts in (`lookup`)."""
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
        run = self._get(key)
        arguments: list[Any] = [self._model.params, narrow(state) if key.greedy else state, control, self._slots]
        verifies = key.name == "verify"
        if verifies:
            arguments += [self._texts_there(), self._unused_masks(key, run) if masks is None else masks]
        new, *told = run(*arguments)
        if verifies:
            self._texts = told.pop()
        return widened(new, state) if key.greedy else new, *told

    def draft(self, name: str, cache: PagedCache, control: np.ndarray) -> Any:
        """See `draft_programs.draft` and `draft_programs.follow`."""
        assert self._draft is not None
        return self._get(self.choose(name, 0, greedy=False))(self._draft.model.params, cache, control)

    def masks(self, key: Key) -> jax.ShapeDtypeStruct:
        """Masks of `programs.verify`."""
        return masks_of(key, self._settings, self._model.config)

    def _unused_masks(self, key: Key, run: Any) -> jax.Array | None:
        """Masks for a step without any, sent once; None for a program without masks."""
        if key.greedy:
            return None
        if self._no_masks is None:
            like = self.masks(key)
            self._no_masks = jax.device_put(np.zeros(like.shape, like.dtype), run.input_shardings[0][-1])
        return self._no_masks

    def _texts_there(self) -> jax.Array | None:
        """Texts in which rows look for drafts, made at first use; None if no row does."""
        if self._texts is None and (like := texts_of(self._settings, self._state)) is not None:
            self._texts = jax.device_put(np.zeros(like.shape, like.dtype), like.sharding)
        return self._texts

    def _get(self, key: Key) -> Any:
        if key not in self._compiled:
            if self._ready and self._settings.strict and key not in self._coming:
                raise _late(f"the program {str(key)!r} would have to be compiled")
            expected = self._coming.pop(key, None)
            if expected is None or expected.cancel():
                self._compile(key)
            else:
                expected.result()
            self.late += self._ready and expected is None
            self._before = self._counted.count
        return self._compiled[key]

    def _timed(self, key: Key) -> tuple[Key, float, bool]:
        """Compiles a program; returns it, the seconds taken and whether it was in the persistent cache."""
        start, before = time.monotonic(), self._counted.from_cache
        read = self._compile(key)
        return key, time.monotonic() - start, read or self._counted.from_cache > before

    def _compile(self, key: Key) -> bool:
        """Compiles a program; returns whether it was on disk."""
        draft = self._draft if key.name in (DRAFT, FOLLOW) else None
        model = draft.model if draft else self._model
        about = model.config, shapes_alone(self._settings), key, sorted(model.kernels.items()), draft and draft.vocab
        with on(model.mesh), using(**model.kernels):
            if draft:
                made = draft.program(key.name, self._settings)
            else:
                made = program(key, model.config, self._settings, model.params, self._state, self._slots)
            compiled, read = compile_stored(made, about, model.devices, model.mesh)
        with self._lock:
            self._compiled[key] = compiled
        return read

    def _compile_behind(self, key: Key) -> bool:
        """Compiles a program that others replace meanwhile: nobody waits for it, so a failure must be told."""
        try:
            return self._compile(key)
        except Exception as error:
            text = f"the program {str(key)!r} cannot be compiled, so that others are used in its place: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
            raise


def _cost(key: Key) -> tuple[float, ...]:
    """Orders programs by what a step costs."""
    return key.size, key.rows or math.inf, not key.greedy


def _late(what: str) -> LateCompilation:
    return LateCompilation(
        f"{what} after the engine was ready",
        hint="please report this with the engine's settings; without strict it is only counted",
    )


def shapes_alone(settings: EngineSettings) -> EngineSettings:
    """The settings without those that change no program."""
    return replace(settings, waiting=None, strict=False, constraint_s=1.0, greedy=None)


def compiled_before(
    model: Model, settings: EngineSettings, adapters: Params | None, draft: Model | None = None
) -> dict[Key, Any]:
    """The store of programs that engines of the same shapes have compiled in this process; more are added to it."""
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
    """Drops all programs except those of engines in use."""
    _compiled_for.cache_clear()


@cache
def _in_background() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="llama_jax compilation")
