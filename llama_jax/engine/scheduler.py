"""Continuous batching under a token budget, with pages that sequences share.

Pure host code: values in, decisions out; independent of time and chance. The caller dispatches each step in order, and
reports the tokens of finished steps; several may be in flight.
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
    """Waiting and running sequences, and what they hold of the cache. Not thread-safe."""

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
          DoesNotFit: it can never fit.
          Overloaded: the queue is full.
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
        """The next step; None if there is nothing to do until steps in flight have ended, or at all."""
        return self._planner.plan()

    def drawn(self, id: int, tokens: ListOf[int], draft: Draft | None = None) -> None:
        """Reports tokens drawn by a finished step. Those of an ended sequence are ignored.

        Args:
          draft: the draft that the step tried in this sequence.
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
            # A token is drawn once all before it are stored. The last one is stored by the next step, but not in a row
            # that the device has ended.
            self._memory.register(sequence, len(sequence.tokens) - 1)

    @property
    def calm(self) -> bool:
        """Whether a step with drafts is possible: nothing but a few rows that decode."""
        queues = self._queues
        few = len(queues.decoding) <= self.limits.draft_rows
        return few and not len(queues.waiting) and not len(queues.prompts)

    @property
    def decoding(self) -> list[Sequence]:
        """Sequences that the next step may draw for."""
        return list(self._queues.decoding)

    def _take_back(self, sequence: Sequence, missing: int) -> None:
        """Undoes the plan for draft tokens that were not drawn. Steps in flight that were planned after them continue
        after the drawn ones: the device knows the position of each row."""
        sequence.drawn -= missing
        if sequence.row >= 0:
            sequence.computed -= missing
            if missing and sequence.phase is Phase.COMPLETE:
                self._queues.move(sequence, Phase.DECODING)

    def finish(self, id: int, *, keep: bool = True) -> list[int]:
        """Ends a sequence in any phase, if it has not ended yet; steps in flight may still draw for it.

        Args:
          keep: False if others must not reuse what it computed; what it got from others stays.

        Returns:
          Pages to clear: others must not reuse their contents; they are free once the steps in flight have ended.
        """
        sequence = self._sequences.pop(id, None)
        if sequence is None:
            return []
        self._queues.remove(sequence)
        return self._memory.leave(sequence, keep=keep) if sequence.row >= 0 else []

    def ended(self, number: int) -> None:
        """Reports that steps up to `number` have ended: their rows no longer write."""
        self._memory.pages.ended(number)

    @property
    def counts(self) -> Counts:
        """The current counts."""
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
