"""Texts packed into rows, in an order that a seed fixes and any step can be resumed from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llama_jax.errors import RequestError
from llama_jax.training.batch import IGNORED, Batch

OPEN = 64
"""Rows that are filled at the same time: a text goes into the fullest that has room for it."""


@dataclass(frozen=True, eq=False)
class Text:
    """One text to learn: a line of the data, or a piece of a long one.

    Attributes:
      tokens: int32 [len].
      learned: bool [len], whether the model learns to predict each token.
      reference: float32 [len], the `entropies` of the model that it is compared with, if there is one.
    """

    tokens: np.ndarray
    learned: np.ndarray
    reference: np.ndarray | None = None

    @property
    def texts(self) -> tuple[Text, ...]:
        return (self,)


@dataclass(frozen=True, eq=False)
class Pair:
    """Two texts with the same beginning, one of which is preferred; they share a row."""

    chosen: Text
    rejected: Text

    @property
    def texts(self) -> tuple[Text, ...]:
        return (self.chosen, self.rejected)


type Example = Text | Pair


class Place(NamedTuple):
    """Where a text lies in a batch: its row, its tokens there, and its number among the texts of the row."""

    row: int
    where: slice
    segment: int
    text: Text


@dataclass(frozen=True)
class Packing:
    """How texts filled rows in one epoch.

    Attributes:
      texts, rows: how many; length: tokens of a row.
      tokens: of all texts; learned: of these, those that are learned.
    """

    texts: int
    rows: int
    length: int
    tokens: int
    learned: int

    @property
    def filled(self) -> float:
        """Share of the rows that is no padding."""
        return self.tokens / (self.rows * self.length)

    def __str__(self) -> str:
        return (
            f"{self.texts} texts, {self.tokens} tokens ({self.learned} learned), rows of {self.length}: {self.rows}, "
            f"{self.filled:.1%} filled"
        )


class Rows:
    """Batches of packed rows.

    Each epoch has the texts in another order, and packs them anew. What a step gets depends on the seed, the settings
    and its number alone, so that a run is resumed from any step without a state of its own.

    Args:
      texts: at least one text or pair.
      length: tokens of a row; no text is longer, and no pair.
      rows: of a step.
      seed: of the order.
      pack: False gives each text a row of its own.

    Raises:
      RequestError: there are no texts, or one is longer than a row.
    """

    def __init__(self, texts: Sequence[Example], *, length: int, rows: int, seed: int = 0, pack: bool = True):
        if not texts:
            raise RequestError("the data holds no text to learn", param="data", hint="give a file with lines")
        self._sizes = [sum(len(text.tokens) for text in example.texts) for example in texts]
        if (longest := max(self._sizes)) > length:
            raise RequestError(
                f"a text has {longest} tokens, and rows have {length}",
                param="length",
                hint="cut it up, or raise length",
            )
        self._texts, self._length, self._rows, self._seed, self._pack = texts, length, rows, seed, pack
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self._starts = [0]

    def packing(self, epoch: int = 0) -> Packing:
        """How an epoch is packed."""
        texts = [text for example in self._texts for text in example.texts]
        learned = sum(int(text.learned[1:].sum()) for text in texts)
        return Packing(len(texts), len(self._packed(epoch)), self._length, sum(self._sizes), learned)

    def steps(self, epochs: int) -> int:
        """Steps that see each text in so many epochs at least once; the last is filled up with rows of the next."""
        return -(-self._start(epochs) // self._rows)

    def batch(self, step: int) -> tuple[Batch, list[int]]:
        """The rows of a step, counted from 0: numpy arrays [rows, length], and the lengths of the texts in them."""
        shape = (self._rows, self._length)
        tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        labels = np.full(shape, IGNORED, np.int32)
        reference = np.zeros(shape, np.float32) if self._texts[0].texts[0].reference is not None else None
        lengths = []
        for row, where, segment, text in self.places(step):
            tokens[row, where], segments[row, where] = text.tokens, segment
            segments[row, where.stop :] = segment + 1
            labels[row, where] = np.where(text.learned, text.tokens, IGNORED)
            if reference is not None:
                reference[row, where] = text.reference
            lengths.append(len(text.tokens))
        return Batch(tokens, labels, segments, reference), lengths

    def once(self, step: int) -> Batch:
        """The batch of one of the `steps(1)`, in which nothing is learned of rows of the next epoch: so these steps
        have each text once."""
        batch, _ = self.batch(step)
        batch.labels[self._start(1) - step * self._rows :] = IGNORED
        return batch

    def places(self, step: int) -> Iterator[Place]:
        """Each text of a step's batch, in order."""
        for row in range(self._rows):
            at = 0
            texts = (text for number in self._row(step * self._rows + row) for text in self._texts[number].texts)
            for segment, text in enumerate(texts):
                where = slice(at, at + len(text.tokens))
                yield Place(row, where, segment, text)
                at = where.stop

    def _row(self, number: int) -> list[int]:
        """The texts of a row, counted from 0 through all epochs."""
        epoch = len(self._starts) - 1
        while self._start(epoch) <= number:
            epoch += 1
        while self._start(epoch) > number:
            epoch -= 1
        return self._packed(epoch)[number - self._start(epoch)]

    def _start(self, epoch: int) -> int:
        """The number of rows before an epoch."""
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + len(self._packed(len(self._starts) - 1)))
        return self._starts[epoch]

    def _packed(self, epoch: int) -> list[list[int]]:
        if self._epoch[0] != epoch:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._texts))
            self._epoch = epoch, list(self._pack_in(order))
        return self._epoch[1]

    def _pack_in(self, order: np.ndarray) -> Iterator[list[int]]:
        room: list[int] = []
        rows: list[list[int]] = []
        for number in order.tolist():
            size = self._sizes[number]
            fits = [i for i, left in enumerate(room) if left >= size] if self._pack else []
            if fits:
                best = min(fits, key=room.__getitem__)
                room[best] -= size
                rows[best].append(number)
            else:
                if len(rows) == OPEN:
                    fullest = min(range(OPEN), key=room.__getitem__)
                    room.pop(fullest)
                    yield rows.pop(fullest)
                room.append(self._length - size)
                rows.append([number])
        yield from rows
