"""The engine's loop: plan, dispatch, and read what the dispatch before has drawn.

One dispatch is always ahead: the device computes step k + 1 while the host reads step k, so that planning, texts and
answers cost the device nothing. Rows end by themselves on the device; the host learns of it one step later.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.decode.loop import DecodeState
from llama_jax.engine import programs
from llama_jax.engine.compiled import MARKED, Key, Programs, without_vocabulary
from llama_jax.engine.scheduler import Limits, Scheduler
from llama_jax.engine.sequence import Sequence
from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.state import NO_ROW, Joining, new_state
from llama_jax.engine.steps import Step
from llama_jax.kernels.dispatch import using
from llama_jax.model.loaded import Model
from llama_jax.params import Params
from llama_jax.sampling import FULL, GREEDY, SamplerProfile, SamplingParams, make_sampler
from llama_jax.sharding import on

Ending = Literal["stop", "length", "failed"]


@dataclass(frozen=True)
class Drawn:
    """New tokens of one sequence.

    Attributes:
      logprobs: for each token, its log-probability and the most likely ids with theirs; None unless asked for.
      ending: why the sequence has ended, if it has. "failed": its logits were no numbers.
    """

    id: int
    tokens: tuple[int, ...]
    logprobs: tuple[tuple[float, np.ndarray, np.ndarray], ...] | None
    ending: Ending | None


@dataclass
class _Flight:
    """A step that the device has not ended yet, and who drew in it: (index in the report, sequence)."""

    step: Step
    drawing: list[tuple[int, Sequence]]
    report: jax.Array
    logprobs: Any


@dataclass(eq=False)
class _Asked:
    """What a sequence was asked for with."""

    params: SamplingParams
    sequence: Sequence
    adapter: int
    ended: bool = False


class Core:
    """Runs sequences of token ids on one replica of a model; not safe for threads."""

    def __init__(self, model: Model, settings: EngineSettings, *, adapters: Params | None = None):
        self.model, self.settings = model, settings
        self.scheduler = Scheduler(
            Limits(
                rows=settings.rows,
                pages=settings.pages,
                page_size=settings.page_size,
                pages_per_row=settings.pages_per_row,
                budget=settings.budget,
                chunk_rows=settings.chunk_rows,
                waiting=settings.waiting,
                steps=settings.steps,
                prefix_cache=settings.prefix_cache,
            )
        )
        with on(model.mesh), using(**model.kernels):
            create = jax.jit(new_state, static_argnums=(0, 1, 2))
            self._state: DecodeState = create(model.config, settings, jnp.dtype(model.dtype))
        self.programs = Programs(model, settings, self._state, adapters)
        self._asked: dict[int, _Asked] = {}
        self._flights: deque[_Flight] = deque()
        self._ids = itertools.count()

    def add(
        self,
        prompt: ListOf[int],
        params: SamplingParams,
        limit: int,
        *,
        priority: int = 0,
        adapter: int = 0,
        domain: tuple[Any, ...] = (),
    ) -> int:
        """Queues one continuation of a prompt; returns its number.

        Args:
          params: with a seed, if it samples; `n` is not looked at.
          limit: tokens that it may have.
          domain: what else than the tokens its keys and values depend on, or who may share them.

        Raises:
          DoesNotFit: it never will.
        """
        number = next(self._ids)
        if adapter:
            domain = (*domain, ("adapter", adapter))
        if self.model.config.rope.kind == "dynamic":
            domain = (*domain, ("rope length", len(prompt)))
        sequence = Sequence(number, list(prompt), len(prompt), limit, priority=priority, domain=domain)
        self.scheduler.add(sequence)
        self._asked[number] = _Asked(params, sequence, adapter)
        return number

    def cancel(self, number: int) -> None:
        """Ends a sequence, in whatever phase it is; one that has ended already is left alone."""
        if self._asked.pop(number, None):
            self.scheduler.cancel(number)

    def step(self) -> list[Drawn]:
        """Dispatches the next step, if there is one, and returns what the one before has drawn."""
        planned = self.scheduler.schedule()
        if planned is not None:
            self._dispatch(planned)
        if len(self._flights) > (1 if planned is not None else 0):
            return self._read(self._flights.popleft())
        return []

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self._asked and not self._flights

    # --- to the device

    def _dispatch(self, step: Step) -> None:
        joining = {joining.row for joining in step.joining}
        self._join(step)
        pages = [entry for entry in step.pages if entry[0] not in joining]
        everyone = [chunk.sequence for chunk in step.chunks] + list(step.decoding)
        greedy = all(_greedy(self._asked_for(sequence)) for sequence in everyone)
        if step.chunks:
            key, control, drawing = self._mixed(step, pages, greedy=greedy)
        else:
            key, control, drawing = self._decode(step, pages, greedy=greedy)
        self._state, report, logprobs = self.programs.step(key, self._state, control)
        wanted = any(self._asked_for(s).logprobs is not None for _, s in drawing)
        flight = _Flight(step, drawing, report, logprobs if wanted else None)
        for array in jax.tree.leaves((flight.report, flight.logprobs)):
            array.copy_to_host_async()
        self._flights.append(flight)

    def _mixed(self, step: Step, pages: list[Any], *, greedy: bool) -> tuple[Key, np.ndarray, list[Any]]:
        tokens = sum(chunk.count for chunk in step.chunks) + len(step.decoding)
        key = self.programs.choose("mixed", tokens, greedy=greedy)
        array, parts = programs.mixed_control(key.size, self.settings.rows).new(positions=-1, rows=NO_ROW, pages=NO_ROW)
        drawing, at = [], 0
        for sequence in step.decoding:
            parts["ids"][at], parts["rows"][at] = -1, sequence.row
            parts["at"][sequence.row], parts["draws"][sequence.row] = at, 1
            drawing.append((sequence.row, sequence))
            at += 1
        for chunk in step.chunks:
            here, row = slice(at, at + chunk.count), chunk.sequence.row
            parts["ids"][here] = chunk.sequence.tokens[chunk.start : chunk.start + chunk.count]
            parts["positions"][here] = np.arange(chunk.start, chunk.start + chunk.count)
            parts["rows"][here] = row
            at += chunk.count
            if chunk.draws:
                parts["at"][row], parts["draws"][row] = at - 1, 1
                drawing.append((row, chunk.sequence))
        _fill(parts["pages"], pages)
        return key, array, drawing

    def _decode(self, step: Step, pages: list[Any], *, greedy: bool) -> tuple[Key, np.ndarray, list[Any]]:
        rows = [sequence.row for sequence in step.decoding]
        key = self.programs.choose("decode", len(rows), greedy=greedy)
        array, parts = programs.decode_control(key.size).new(rows=NO_ROW, pages=NO_ROW, steps=step.steps)
        parts["rows"][: len(rows)] = rows
        _fill(parts["pages"], pages)
        return key, array, list(enumerate(step.decoding))

    def _join(self, step: Step) -> None:
        """Empties and fills rows."""
        leaving = np.zeros(self.settings.rows, bool)
        leaving[list(step.leaving)] = True
        n = self.settings.chunk_rows
        groups = [step.joining[i : i + n] for i in range(0, len(step.joining), n)]
        if not groups and step.leaving:
            groups = [()]
        for group in groups:
            self._state = self.programs.join(self._state, leaving, self._joining(step, group))
            leaving = np.zeros_like(leaving)
        for joining in step.joining:
            self._mark(joining.sequence)

    def _joining(self, step: Step, group: ListOf[Any]) -> Joining:
        settings, n = self.settings, self.settings.chunk_rows
        sequences = [joining.sequence for joining in group]
        asked = [self._asked[sequence.id] for sequence in sequences]
        spare = n - len(group)
        pages = np.full((n, settings.pages_per_row), -1, np.int32)
        line = {sequence.row: i for i, sequence in enumerate(sequences)}
        for row, index, page in step.pages:
            if row in line:
                pages[line[row], index] = page
        _, sampler = make_sampler(
            [*(a.params for a in asked), *[_IDLE] * spare],
            [()] * n,
            self.model.config.vocab_size,
            self.model.eos_token_ids,
            profile=FULL,
            stop_width=settings.stop_ids,
            bias_width=settings.biases,
        )

        def ints(values: Iterator[int], fill: int = 0) -> np.ndarray:
            return np.asarray([*values, *[fill] * spare], np.int32)

        drawn = ints(len(s.tokens) - s.prompt_length for s in sequences)
        return Joining(
            rows=ints((s.row for s in sequences), NO_ROW),
            pages=pages,
            shared=ints(joining.shared for joining in group),
            length=ints(len(s.tokens) for s in sequences),
            limit=ints(s.limit for s in sequences),
            rope_lengths=ints((s.prompt_length for s in sequences), 1),
            adapter_ids=ints(a.adapter for a in asked),
            sampler=without_vocabulary(replace(sampler, count=drawn)),
        )

    def _mark(self, sequence: Sequence) -> None:
        """What penalties need to know of the tokens so far."""
        params = self._asked[sequence.id].params
        of_prompt = params.repetition_penalty != 1.0
        if not (of_prompt or params.presence_penalty or params.frequency_penalty):
            return
        first = 0 if of_prompt else sequence.prompt_length
        for start in range(first, len(sequence.tokens), MARKED):
            tokens = sequence.tokens[start : start + MARKED]
            rows, ids = np.full(MARKED, NO_ROW, np.int32), np.zeros(MARKED, np.int32)
            rows[: len(tokens)], ids[: len(tokens)] = sequence.row, tokens
            self._state = self.programs.mark(
                self._state, rows, ids, np.arange(start, start + MARKED) >= sequence.prompt_length
            )

    # --- from the device

    def _read(self, flight: _Flight) -> list[Drawn]:
        report, logprobs = jax.device_get((flight.report, flight.logprobs))
        self.scheduler.ended(flight.step.number)
        return [drawn for i, s in flight.drawing if (drawn := self._taken(i, s, report[i].tolist(), logprobs))]

    def _taken(self, index: int, sequence: Sequence, report: list[int], logprobs: Any) -> Drawn | None:
        *tokens, flags = report
        tokens = tokens[: flags & (programs.DONE - 1)]
        asked = self._asked.get(sequence.id)
        if asked is None or asked.ended:  # cancelled meanwhile, or it had ended in the step before
            return None
        self.scheduler.drawn(sequence.id, tokens)
        ending: Ending | None = None
        if flags & programs.DONE:
            ending = "failed" if flags & programs.FAILED else "stop" if flags & programs.STOPPED else "length"
            self.scheduler.finish(sequence.id, keep=ending != "failed")
            del self._asked[sequence.id]
        found = None
        if asked.params.logprobs is not None:
            found = tuple(
                (float(logprobs.token[index, j]), logprobs.top_ids[index, j], logprobs.top[index, j])
                for j in range(len(tokens))
            )
        return Drawn(sequence.id, tuple(tokens), found, ending)

    def _asked_for(self, sequence: Sequence) -> SamplingParams:
        return self._asked[sequence.id].params


def _fill(entries: np.ndarray, pages: ListOf[tuple[int, int, int]]) -> None:
    """Pages to book, in the part of a control array that is for them."""
    if pages:
        entries[: len(pages)] = pages


_IDLE = SamplingParams(temperature=0.0, seed=0)


def _greedy(params: SamplingParams) -> bool:
    """Whether a program for greedy requests serves it."""
    return SamplerProfile.of([params]) == GREEDY
