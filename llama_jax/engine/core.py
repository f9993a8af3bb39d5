"""The engine's loop: plan, dispatch, and read what the dispatch before has drawn.

One dispatch is always ahead: the device computes step k + 1 while the host reads step k, so that planning, texts and
answers cost the device nothing. Rows end by themselves on the device; the host learns of it one step later.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.decode.loop import DecodeState
from llama_jax.engine import programs
from llama_jax.engine.compiled import Key, Programs
from llama_jax.engine.joining import Beginning, joinings
from llama_jax.engine.limits import Limits
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.sequence import Sequence
from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.snapshot import Meter, Snapshot
from llama_jax.engine.state import NO_ROW, new_state
from llama_jax.engine.steps import Step
from llama_jax.kernels.dispatch import using
from llama_jax.model.loaded import Model
from llama_jax.params import Params
from llama_jax.sampling import GREEDY, Logprobs, SamplerProfile, SamplingParams
from llama_jax.sharding import on

Ending = Literal["stop", "length", "failed"]


@dataclass(frozen=True)
class Drawn:
    """News of one sequence.

    Attributes:
      tokens: new ones; logprobs: of them, numpy arrays [tokens] and [tokens, n], or None.
      prompt_logprobs: of the prompt's tokens but the first, once they are known, if they were asked for.
      ending: why the sequence has ended, if it has. "failed": its logits were no numbers.
    """

    id: int
    tokens: tuple[int, ...]
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    ending: Ending | None = None


@dataclass(eq=False)
class _Asked:
    """A sequence and what it was asked for with; the scores of its prompt so far."""

    sequence: Sequence
    params: SamplingParams
    adapter: int
    scores: list[Logprobs] = field(default_factory=list)


@dataclass
class _Flight:
    """A step that the device has not ended yet.

    Attributes:
      rows: (line of the report, sequence) of those that draw, or that end with it.
      spans: (first, last token of the step, sequence) of prompts that are scored.
    """

    step: Step
    rows: list[tuple[int, Sequence]]
    spans: list[tuple[int, int, Sequence]]
    report: Any
    logprobs: Any = None
    scores: Any = None


class Core:
    """Runs sequences of token ids on one replica of a model. Not safe for threads."""

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
        self._meter = Meter()
        self._asked: dict[int, _Asked] = {}
        self._flights: deque[_Flight] = deque()
        self._ids = itertools.count()

    def add(
        self,
        prompt: ListOf[int],
        params: SamplingParams,
        limit: int,
        *,
        drawn: ListOf[int] = (),
        priority: int = 0,
        adapter: int = 0,
        domain: tuple[tuple[str, Any], ...] = (),
    ) -> int:
        """Queues one continuation of a prompt; returns its number.

        Args:
          params: with a seed, if it samples; `n` and `stop` are not looked at.
          limit: tokens that it may have in all.
          drawn: those that it has already, elsewhere: it goes on as if they had been drawn here.
          priority: lower ones first.
          adapter: its slot, 0 for none.
          domain: what else than the tokens its keys and values depend on, or who may share them, as (kind, value).

        Raises:
          DoesNotFit: it never will.
        """
        number = next(self._ids)
        if adapter:
            domain = (*domain, ("adapter", adapter))
        if self.model.config.rope.kind == "dynamic":  # its frequencies are fixed by the length of the prompt
            domain = (*domain, ("prompt length", len(prompt)))
        sequence = Sequence(
            number,
            [*prompt, *drawn],
            len(prompt),
            limit,
            priority=priority,
            domain=domain,
            reuse=params.prompt_logprobs is None,
        )
        self.scheduler.add(sequence)
        self._asked[number] = _Asked(sequence, params, adapter)
        return number

    def cancel(self, number: int) -> None:
        """Ends a sequence, in whatever phase it is; one that has ended already is left alone."""
        if self._asked.pop(number, None):
            self.scheduler.cancel(number)

    def step(self) -> list[Drawn]:
        """Dispatches the next step, if there is one, and returns what the one before has drawn."""
        step = self.scheduler.schedule()
        if step is not None:
            self._flights.append(self._dispatch(step))
        if len(self._flights) > (step is not None):
            return self._read(self._flights.popleft())
        return []

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self._asked and not self._flights

    def snapshot(self) -> Snapshot:
        """The engine in numbers."""
        meter, counts = self._meter, self.scheduler.counts
        tokens_per_s, step_s = meter.rates()
        return Snapshot(
            counts=counts,
            tokens_in=counts.prompt_tokens,
            tokens_out=meter.tokens_out,
            computed_tokens=meter.computed,
            padding_tokens=meter.padding,
            steps=meter.steps,
            late_compilations=self.programs.late,
            tokens_per_s=tokens_per_s,
            step_s=step_s,
        )

    # --- To the device

    def _dispatch(self, step: Step) -> _Flight:
        beginning = {
            joining.sequence.id: Beginning(self._params(joining.sequence), self._asked[joining.sequence.id].adapter)
            for joining in step.joining
        }
        for leaving, new in joinings(step, beginning, self.model, self.settings):
            self._state = self.programs.join(self._state, leaving, new)
        joined = {joining.row for joining in step.joining}
        pages = [entry for entry in step.pages if entry[0] not in joined]
        flight = _Flight(step, [], [], None)
        everyone = [*(chunk.sequence for chunk in step.chunks), *step.decoding]
        greedy = all(SamplerProfile.of([self._params(sequence)]) == GREEDY for sequence in everyone)
        pack = self._mixed if step.chunks else self._decode
        key, control = pack(flight, pages, greedy=greedy)
        tokens = sum(chunk.count for chunk in step.chunks) + len(step.decoding)
        self._meter.dispatched(tokens * step.steps, key.size * step.steps)
        self._state, flight.report, logprobs, *scores = self.programs.step(key, self._state, control)
        if any(self._params(sequence).logprobs is not None for _, sequence in flight.rows):
            flight.logprobs = logprobs
        flight.scores = scores[0] if scores else None
        for array in jax.tree.leaves((flight.report, flight.logprobs, flight.scores)):
            array.copy_to_host_async()
        return flight

    def _mixed(self, flight: _Flight, pages: ListOf[Any], *, greedy: bool) -> tuple[Key, np.ndarray]:
        step = flight.step
        tokens = sum(chunk.count for chunk in step.chunks) + len(step.decoding)
        scored = any(self._params(chunk.sequence).prompt_logprobs is not None for chunk in step.chunks)
        key = self.programs.choose("scored" if scored else "mixed", tokens, greedy=greedy)
        control = programs.mixed_control(key.size, self.settings.rows)
        array, parts = control.new(positions=-1, rows=NO_ROW, pages=NO_ROW, at=key.size)

        def draw(row: int, at: int) -> None:
            parts["at"][row], parts["draws"][row] = at, 1

        for at, sequence in enumerate(step.decoding):
            parts["ids"][at], parts["rows"][at] = -1, sequence.row
            draw(sequence.row, at)
            flight.rows.append((sequence.row, sequence))
        at = len(step.decoding)
        for chunk in step.chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            here = slice(at, at + chunk.count)
            parts["ids"][here] = sequence.tokens[chunk.start : end]
            parts["positions"][here] = np.arange(chunk.start, end)
            parts["rows"][here] = chunk.row
            behind = sequence.tokens[chunk.start + 1 : end + 1]
            parts["next"][at : at + len(behind)] = behind
            if chunk.draws:
                draw(chunk.row, here.stop - 1)
            if chunk.draws or (sequence.limit == 0 and end == len(sequence.tokens)):
                flight.rows.append((chunk.row, sequence))
            if self._params(sequence).prompt_logprobs is not None:
                flight.spans.append((at, at + min(chunk.count, sequence.prompt_length - 1 - chunk.start), sequence))
            at = here.stop
        if pages:
            parts["pages"][: len(pages)] = pages
        return key, array

    def _decode(self, flight: _Flight, pages: ListOf[Any], *, greedy: bool) -> tuple[Key, np.ndarray]:
        decoding = flight.step.decoding
        key = self.programs.choose("decode", len(decoding), greedy=greedy)
        control = programs.decode_control(key.size)
        array, parts = control.new(rows=NO_ROW, pages=NO_ROW, steps=flight.step.steps)
        parts["rows"][: len(decoding)] = [sequence.row for sequence in decoding]
        if pages:
            parts["pages"][: len(pages)] = pages
        flight.rows = list(enumerate(decoding))
        return key, array

    # --- From the device

    def _read(self, flight: _Flight) -> list[Drawn]:
        report, logprobs, scores = jax.device_get((flight.report, flight.logprobs, flight.scores))
        self.scheduler.ended(flight.step.number)
        for first, last, sequence in flight.spans:
            if (asked := self._asked.get(sequence.id)) and last > first:
                asked.scores.append(jax.tree.map(lambda x, a=first, b=last: x[a:b], scores))
        news = (self._taken(line, sequence, report[line].tolist(), logprobs) for line, sequence in flight.rows)
        drawn = [new for new in news if new]
        self._meter.ended(sum(len(new.tokens) for new in drawn))
        return drawn

    def _taken(self, line: int, sequence: Sequence, report: list[int], logprobs: Any) -> Drawn | None:
        """What a row's line of a report tells; nothing if its sequence has ended meanwhile."""
        *tokens, flags = report
        tokens = tokens[: flags & (programs.DONE - 1)]
        asked = self._asked.get(sequence.id)
        if asked is None:
            return None
        self.scheduler.drawn(sequence.id, tokens)
        ending: Ending | None = None
        if flags & programs.DONE:
            ending = "failed" if flags & programs.FAILED else "stop" if flags & programs.STOPPED else "length"
            if ending == "failed":
                self._state = self.programs.scrub(self._state, self.scheduler.own_pages(sequence.id))
            self.scheduler.finish(sequence.id, keep=ending != "failed")
            del self._asked[sequence.id]
        found = of_prompt = None
        if asked.params.logprobs is not None and tokens:
            found = jax.tree.map(lambda x: x[line, : len(tokens)], logprobs)
        if asked.scores:
            of_prompt = jax.tree.map(lambda *parts: np.concatenate(parts), *asked.scores)
            asked.scores = []
        return Drawn(sequence.id, tuple(tokens), found, of_prompt, ending)

    def _params(self, sequence: Sequence) -> SamplingParams:
        return self._asked[sequence.id].params
