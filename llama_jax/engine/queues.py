"""Sequences by phase, each phase in its own order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from llama_jax.engine.sequence import Phase, Sequence


def urgency(sequence: Sequence) -> tuple[int, int]:
    """Sort key of sequences with rows, most urgent first."""
    return sequence.priority, sequence.arrival


def turn(sequence: Sequence) -> tuple[int, bool, int]:
    """Sort key of waiting sequences: within a priority, those that had a row before go first."""
    return sequence.priority, not sequence.started, sequence.arrival


class Queue:
    """Sequences ordered by a key that is unique, and constant while a sequence is in the queue."""

    def __init__(self, key: Callable[[Sequence], tuple[int, ...]]):
        self._key = key
        self._items: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        insort(self._items, sequence, key=self._key)

    def remove(self, sequence: Sequence) -> None:
        del self._items[bisect_left(self._items, self._key(sequence), key=self._key)]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._items)

    def __getitem__(self, index: int) -> Sequence:
        return self._items[index]


class Queues:
    """All unfinished sequences."""

    def __init__(self) -> None:
        self.waiting = Queue(turn)
        self.prompts, self.decoding, self.complete = Queue(urgency), Queue(urgency), Queue(urgency)
        self._of = {
            Phase.WAITING: self.waiting,
            Phase.PROMPT: self.prompts,
            Phase.DECODING: self.decoding,
            Phase.COMPLETE: self.complete,
        }

    def add(self, sequence: Sequence) -> None:
        self._of[sequence.phase].add(sequence)

    def remove(self, sequence: Sequence) -> None:
        self._of[sequence.phase].remove(sequence)

    def move(self, sequence: Sequence, phase: Phase) -> None:
        self.remove(sequence)
        sequence.phase = phase
        self.add(sequence)

    @property
    def least_urgent(self) -> Sequence | None:
        """The least urgent sequence that has a row and tokens to compute."""
        last = [queue[-1] for queue in (self.decoding, self.prompts) if len(queue)]
        return max(last, key=urgency, default=None)
