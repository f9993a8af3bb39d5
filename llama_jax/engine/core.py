"""The engine's loop: plan, dispatch, and read the tokens of the previous dispatch.

The loop stays one dispatch ahead: the device computes step k + 1 while the host reads step k, so that planning,
detokenizing and answering cost the device nothing. Rows end on the device; the host learns of it one step later.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from llama_jax.decode.graphs import small_places
from llama_jax.decode.loop import DecodeState
from llama_jax.engine import programs
from llama_jax.engine.adapter_pool import AdapterSlots
from llama_jax.engine.compiled import Compiled, Programs, compiled_before
from llama_jax.engine.draft_model import DraftModel, check_room, cost_of
from llama_jax.engine.draft_programs import DraftParts
from llama_jax.engine.drafting import NGrams, Source
from llama_jax.engine.foresight import Foresight
from llama_jax.engine.joining import Asked, Beginnings, masks, penalised
from llama_jax.engine.meter import Meter
from llama_jax.engine.packing import pack
from llama_jax.engine.program_set import START, Key
from llama_jax.engine.rules import Rule
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.sequence import Sequence
from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.snapshot import Snapshot
from llama_jax.engine.state import new_state, shapes_of
from llama_jax.engine.steps import Step
from llama_jax.kernels.dispatch import using
from llama_jax.model.loaded import Model
from llama_jax.plan.step_costs import Peak, StepCosts
from llama_jax.sampling import GREEDY, Logprobs, SamplerProfile, SamplingParams, check_widths
from llama_jax.sharding import on, ruled
from llama_jax.targets import of_device

Ending = Literal["stop", "length", "failed"]


@dataclass(slots=True)  # frozen ones take four times as long to make, and there is one for each token
class Drawn:
    """News of one sequence.

    Attributes:
      tokens: new ones; logprobs: of them, numpy arrays [tokens] and [tokens, n], or None.
      prompt_logprobs: of the prompt's tokens but the first, once known, if requested.
      cached: prompt tokens found in the prefix cache.
      ending: why the sequence has ended, if it has. "failed": it has no next token; error: the reason.
    """

    id: int
    tokens: tuple[int, ...]
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    cached: int = 0
    ending: Ending | None = None
    error: str | None = None


@dataclass
class _Flight:
    """A step in flight on the device; rows and spans are those of `packing.Packed`."""

    step: Step
    rows: list[tuple[int, Sequence]]
    spans: list[tuple[int, int, int, Sequence]]
    report: Any = None
    logprobs: Any = None
    scores: Any = None


class Core:
    """Runs sequences of token ids on one replica of a model. Not thread-safe."""

    def __init__(
        self,
        model: Model,
        settings: EngineSettings,
        *,
        adapters: AdapterSlots | None = None,
        draft: Model | None = None,
        numbers: Iterator[int] | None = None,
        peak: Peak | None = None,
    ):
        """Makes an engine without sequences; programs are compiled at first use, or by `compile_all`.

        Args:
          model: on a mesh that does not split the batch (see `replicas`).
          adapters: its slots of adapters.
          draft: a model that drafts for it (`draft_model.check_draft`); requires a `draft_context` in the settings.
          numbers: of its sequences.
          peak: the device's peak rates, for its utilisation; by default those of its data sheet.
        """
        assert ruled(model.mesh).ways("batch") == 1
        check_room(settings, draft)
        self.model, self.settings = model, settings
        peak = peak or Peak.of(of_device(model.device), model.dtype.name)
        self._meter = Meter(StepCosts(model.config, model.dtype, model.mesh, model.kv_dtype), peak)
        self.scheduler = Scheduler(settings.limits)
        tree = None if adapters is None else adapters.tree
        compiled, start = compiled_before(model, settings, tree, draft), Key(START)
        if start not in compiled:
            with on(model.mesh), using(**model.kernels):
                begin = jax.jit(new_state, static_argnums=(0, 1, 2))
                compiled[start] = begin.lower(model.config, settings, model.cache_dtype).compile()
        self._begin = compiled[start]
        self._begun: DecodeState | None = None
        parts = None if draft is None else DraftParts.of(draft, settings, model.config.vocab_size)
        self.programs = Programs(model, settings, shapes_of(self._begin), adapters, compiled, parts)
        self._asked: dict[int, Asked] = {}
        self._beginnings = Beginnings(model, settings)
        self._source: Source | None = NGrams(settings.drafts) if settings.drafts else None
        if parts is not None:
            self._source = DraftModel(parts, settings, self.programs.draft, cost_of(parts.model, model, peak))
        self._foresight = Foresight(self._source, settings.drafts)
        self._flights: deque[_Flight] = deque()
        self._numbers = itertools.count() if numbers is None else numbers

    @property
    def _state(self) -> DecodeState:
        """The state, made at first use. While compiling, XLA autotunes kernels in memory that pages would take."""
        if self._begun is None:
            self._begun = self._begin()
            small_places(tuple(self.model.devices))
        return self._begun

    @_state.setter
    def _state(self, new: DecodeState) -> None:
        self._begun = new

    def compile_all(self, *, early: bool = False) -> Iterator[Compiled]:
        """See `Programs.compile_all`. Afterwards the engine is ready and its pages are allocated."""
        yield from self.programs.compile_all(early=early)
        jax.block_until_ready(self._state)
        if self._source:
            self._source.ready()
        self._meter.ready()

    def add(
        self,
        prompt: ListOf[int],
        params: SamplingParams,
        limit: int,
        *,
        priority: int = 0,
        adapter: int = 0,
        domain: tuple[tuple[str, Any], ...] = (),
        drawn: ListOf[int] = (),
        rule: Rule | None = None,
        streamed: bool = False,
    ) -> int:
        """Queues one continuation of a prompt; returns its number.

        Args:
          params: with a seed, if it samples; `n` and `stop` are ignored.
          limit: most tokens to draw, including those in `drawn`.
          priority: lower ones run first.
          adapter: its slot, 0 for none.
          domain: (kind, value) pairs that, besides the tokens, determine its keys and values, as an adapter does, or
            who may share them.
          drawn: tokens drawn already, in another core.
          rule: constraint on its tokens, which has already accepted those in `drawn`.
          streamed: whether each token is read as it comes.

        Raises:
          DoesNotFit: it can never fit.
          RequestError: it has more stop ids or biases than there is room for.
          Overloaded: the queue is full.
        """
        settings, ending = self.settings, self.model.eos_token_ids
        check_widths(params, ending, stop_width=settings.stop_ids, bias_width=settings.biases)
        number = next(self._numbers)
        if self.model.config.rope.kind == "dynamic":  # the prompt's length determines its RoPE frequencies
            domain = (*domain, ("prompt length", len(prompt)))
        sequence = Sequence(
            number,
            [*prompt, *drawn],
            len(prompt),
            limit,
            priority=priority,
            domain=domain,
            reuse=params.prompt_logprobs is None,
            paced=rule is not None,
            streamed=streamed,
        )
        self.scheduler.add(sequence)
        greedy = rule is None and SamplerProfile.of([params]) == GREEDY
        pace = self._source.begin() if self._source else None
        self._asked[number] = Asked(sequence, params, adapter, greedy, rule, pace)
        self._foresight.prepare([self._asked[number]])
        return number

    def cancel(self, number: int) -> None:
        """Ends a sequence in any phase; no effect on one that has ended."""
        if self._asked.pop(number, None):
            self._finish(number)

    def step(self) -> list[Drawn]:
        """Dispatches the next step, if there is one, and returns the previous step's news.

        Raises:
          LateCompilation: in a strict engine that is ready, if anything has to be compiled.
        """
        with self.programs:
            ended = self._decide()
            self._meter.failed += len(ended)
            if self._flights and self.programs.coming:  # the first token need not wait for the decode program
                return ended + self._read(self._flights.popleft())
            step = self.scheduler.schedule()
            if step is not None:
                self._flights.append(self._dispatch(step))
            if len(self._flights) > (step is not None):
                return ended + self._read(self._flights.popleft())
            return ended

    def discard(self) -> None:
        """Frees the memory of the state of an engine that runs no more, even if a traceback refers to it."""
        for array in jax.tree.leaves(self._begun):
            array.delete()

    def computed(self, number: int) -> int:
        """Tokens of a sequence that have been computed or are in dispatched steps."""
        return self._asked[number].sequence.computed

    @property
    def capacity(self) -> int:
        """The most tokens of a sequence, prompt included."""
        return self.scheduler.limits.capacity

    @property
    def unfinished(self) -> int:
        """Unfinished sequences."""
        return len(self._asked)

    @property
    def idle(self) -> bool:
        """Whether there is no work left."""
        return not self._asked and not self._flights

    def snapshot(self) -> Snapshot:
        """The engine's current state and counters."""
        return self._meter.snapshot(self.scheduler.counts, self.programs, self.model.cache_dtype)

    def _decide(self) -> list[Drawn]:
        """Lets the host decide what the next step may draw; returns news of sequences whose constraints timed out."""
        limit_s = self.settings.constraint_s
        late = self._foresight.decide(self._asked, limit_s)
        for number in late:
            self.cancel(number)
        if self._source:
            decoding = (self._asked[sequence.id] for sequence in self.scheduler.decoding)
            self._foresight.propose(decoding, calm=self.scheduler.calm)
        error = f"its constraints took longer than {limit_s:g} s for the next token"
        return [Drawn(number, (), ending="failed", error=error) for number in late]

    # --- To the device

    def _dispatch(self, step: Step) -> _Flight:
        for joining in step.joining:
            asked = self._asked[joining.sequence.id]
            if asked.cached is None:  # after a preemption it finds what it has computed itself
                asked.cached = joining.shared
        self._mark(masks(step, self._asked, self.model.config.vocab_size), *penalised(step, self._asked))
        joined = {joining.row for joining in step.joining}
        everyone = [*(chunk.sequence for chunk in step.chunks), *step.decoding]
        greedy = all(self._asked[sequence.id].greedy for sequence in everyone)
        if step.chunks and (going := sum(sequence.limit > max(sequence.drawn, 1) for sequence in everyone)):
            self.programs.expect("decode", going, greedy=greedy)  # compiled while the prompts' program compiles
        packed = pack(step, self.programs, self.settings, self._asked, self._beginnings, greedy=greedy)
        if pages := [entry for entry in step.pages if entry[0] not in joined]:
            packed.parts["pages"][: len(pages)] = pages
        for sequence in step.remember:
            self.programs.remember(sequence.row, sequence.tokens)
        flight = _Flight(step, packed.rows, packed.spans)
        if not greedy and packed.masks is None:
            ruled = ((sequence.row, self._asked[sequence.id].rule) for _, sequence in flight.rows)
            self._mark([(row, rule.ahead.masks[0]) for row, rule in ruled if rule])
        self._meter.dispatched(step, packed.size)
        self._state, flight.report, logprobs, *scores = self.programs.step(
            packed.key, self._state, packed.control, packed.masks
        )
        if not greedy and any(self._params(sequence).logprobs is not None for _, sequence in flight.rows):
            flight.logprobs = logprobs
        flight.scores = scores[0] if scores else None
        for array in jax.tree.leaves((flight.report, flight.logprobs, flight.scores)):
            array.copy_to_host_async()
        return flight

    def _mark(self, masks: ListOf[tuple[int, np.ndarray]], *more: Any) -> None:
        """See `Programs.mark`."""
        if masks or any(more):
            self._state = self.programs.mark(self._state, masks, *more)

    # --- From the device

    def _read(self, flight: _Flight) -> list[Drawn]:
        report, logprobs, scores = jax.device_get((flight.report, flight.logprobs, flight.scores))
        self.scheduler.ended(flight.step.number)
        for start, first, last, sequence in flight.spans:
            if (asked := self._asked.get(sequence.id)) and last > first:
                if not start:  # after a preemption the prompt is computed from its beginning
                    asked.scores = []
                asked.scores.append(jax.tree.map(lambda x, a=first, b=last: x[a:b], scores))
        lines = report.tolist()
        news = (self._taken(flight, line, sequence, lines[line], logprobs) for line, sequence in flight.rows)
        drawn = [new for new in news if new]
        self._meter.ended(sum(len(new.tokens) for new in drawn))
        going = [self._asked[new.id] for new in drawn if new.tokens and not new.ending]
        self._foresight.prepare(going, calm=self.scheduler.calm)
        return drawn

    def _taken(self, flight: _Flight, line: int, sequence: Sequence, report: list[int], logprobs: Any) -> Drawn | None:
        """News from a row's entry in a report; None if its sequence has ended meanwhile."""
        flags = report[-1]
        tokens = report[: flags & (programs.DONE - 1)]
        asked = self._asked.get(sequence.id)
        if asked is None:
            return None
        draft = flight.step.drafts.get(sequence)
        self.scheduler.drawn(sequence.id, tokens, draft)
        if asked.pace and tokens and draft:
            drafted = flags >> programs.DRAFTED
            asked.pace.drawn(drafted, len(tokens), len(sequence.tokens))
            self._meter.drafted += drafted
            self._meter.accepted += len(tokens) - 1
        found = of_prompt = None
        if asked.params.logprobs is not None and tokens:
            found = jax.tree.map(lambda x: x[line, : len(tokens)], logprobs)
        if asked.scores:
            of_prompt = jax.tree.map(lambda *parts: np.concatenate(parts), *asked.scores)
            asked.scores = []
        # The device looks at logits that it draws from; a prompt that is only scored has none.
        no_scores = not sequence.limit and of_prompt is not None and np.isnan(of_prompt.token).any()
        ending: Ending | None = None
        if flags & programs.DONE:
            failed = flags & programs.FAILED or no_scores
            ending = "failed" if failed else "stop" if flags & programs.STOPPED else "length"
        if asked.rule and tokens:
            asked.rule.accept(tokens)
            ending = "stop" if asked.rule.ended else ending
        error = None
        if ending == "failed":
            self._meter.failed += 1
            error = (asked.rule and asked.rule.error) or "its logits were not finite"
        if ending:
            self._finish(sequence.id, keep=ending != "failed")
            del self._asked[sequence.id]
        return Drawn(sequence.id, tuple(tokens), found, of_prompt, asked.cached or 0, ending, error)

    def _finish(self, number: int, *, keep: bool = True) -> None:
        if self._source:
            self._source.ended(number)
        if bad := self.scheduler.finish(number, keep=keep):
            self._state = self.programs.scrub(self._state, bad)

    def _params(self, sequence: Sequence) -> SamplingParams:
        return self._asked[sequence.id].params
