"""Continuous batching under a budget of tokens, in pages that sequences share.

Pure host code: values in, decisions out; neither time nor chance decides. The caller dispatches each step that it gets,
in order, and tells what steps that have ended drew; several may be under way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as ListOf

from llama_jax.engine.limits import Counts, Limits
from llama_jax.engine.memory import Memory
from llama_jax.engine.planner import Planner
from llama_jax.engine.queues import Queues
from llama_jax.engine.sequence import Draft, Phase, Sequence
from llama_jax.engine.steps import Step
from llama_jax.errors import LlamaJaxError, Overloaded, RequestError

__all__ = ["Counts", "Limits", "Scheduler"]


class Scheduler:
    """Sequences that wait or run, and what they hold of the cache. Not safe for threads."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._sequences: dict[int, Sequence] = {}
        self._arrivals = 0
        self._queues = Queues()
        self._memory = Memory(limits)
        self._planner = Planner(limits, self._queues, self._memory)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence.

        Raises:
          RequestError: it contradicts itself, or its id is in use.
          DoesNotFit: it never will.
          Overloaded: too many wait already.
        """
        self.limits.check(sequence)
        if sequence.id in self._sequences:
            raise RequestError(f"sequence {sequence.id} exists already", param="id", hint="give each its own id")
        if self.limits.waiting is not None and len(self._queues.waiting) >= self.limits.waiting:
            raise Overloaded(
                f"{len(self._queues.waiting)} requests wait already, as many as may",
                hint="send it again later, or let more of them wait",
            )
        sequence.drawn = len(sequence.tokens) - sequence.prompt_length
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self._sequences[sequence.id] = sequence
        self._queues.add(sequence)

    def schedule(self) -> Step | None:
        """The next step; None if there is nothing to do, or nothing but to wait for steps in flight."""
        return self._planner.plan()

    def drawn(self, id: int, tokens: ListOf[int], draft: Draft | None = None) -> None:
        """Tells tokens that a step has drawn which has ended. Those of a sequence that has ended are left alone.

        Args:
          draft: what the step has tried in this sequence.
        """
        sequence = self._sequences.get(id)
        if sequence is None:
            return
        sequence.tokens.extend(tokens)
        if len(sequence.tokens) > sequence.prompt_length + sequence.drawn:
            raise LlamaJaxError(f"sequence {id} was given more tokens than its steps draw, {sequence.drawn}")
        if draft is not None:
            self._take_back(sequence, 1 + draft.length - len(tokens))
        if sequence.row >= 0:
            # A token is drawn when all before it are stored. Storing the last one is for the next step, which does not
            # do it in a row that the device has ended.
            self._memory.register(sequence, len(sequence.tokens) - 1)

    @property
    def calm(self) -> bool:
        """Whether a step with drafts is possible: nothing but a few rows that decode."""
        queues = self._queues
        few = len(queues.decoding) <= self.limits.draft_rows
        return few and not len(queues.waiting) and not len(queues.prompts)

    @property
    def decoding(self) -> list[Sequence]:
        """Sequences of which the next step may draw."""
        return list(self._queues.decoding)

    def _take_back(self, sequence: Sequence, missing: int) -> None:
        """Takes back what was planned for the tokens of a draft that were not drawn. Steps in flight that were planned
        behind them go on behind those that were: where a row is, the device knows."""
        sequence.drawn -= missing
        if sequence.row >= 0:
            sequence.computed -= missing
            if missing and sequence.phase is Phase.COMPLETE:
                self._queues.move(sequence, Phase.DECODING)

    def finish(self, id: int, *, keep: bool = True) -> list[int]:
        """Ends a sequence in whatever phase it is, if it has not ended yet; steps in flight may still draw for it.

        Args:
          keep: False if what it has computed must not serve others; what it got from others stays.

        Returns:
          Pages to clear: they hold what must not serve others, and are free once the steps in flight have ended.
        """
        sequence = self._sequences.pop(id, None)
        if sequence is None:
            return []
        self._queues.remove(sequence)
        return self._memory.leave(sequence, keep=keep) if sequence.row >= 0 else []

    def ended(self, number: int) -> None:
        """Tells that steps up to `number` have ended: their rows write nothing any more."""
        self._memory.pages.ended(number)

    @property
    def counts(self) -> Counts:
        """The state in numbers."""
        pages = self._memory.pages
        return Counts(
            running=len(self._sequences) - len(self._queues.waiting),
            waiting=len(self._queues.waiting),
            pages_used=pages.used,
            pages_free=pages.free,
            pages_cached=pages.cached,
            pages_fenced=pages.fenced,
            **dataclasses.asdict(self._planner.totals),
        )
