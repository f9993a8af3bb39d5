"""A model of the device for the scheduler's tests.

A slot of its cache holds, in place of a key, which tokens it belongs to: a number for the whole prefix and its domain.
Every token that is computed reads the slots of all before it and finds its own prefix there, or the scheduler has
shared, overwritten or lost something. What is drawn depends on the sequence and the count alone, so preemption may not
change it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llama_jax.engine.limits import Limits
from llama_jax.engine.sequence import Draft, Sequence
from llama_jax.engine.steps import Step

VOCABULARY = 2


def draw(id: int, count: int) -> int:
    """The token that a sequence draws when it has `count` tokens."""
    return (id * 31 + count * 17 + id * count // 3) % VOCABULARY


def guess(id: int, count: int, length: int) -> tuple[int, ...]:
    """Tokens that a sequence may draw behind `count` others, some of them wrong."""
    right = (draw(id, count + i) for i in range(length))
    return tuple(token if (id + count + i) % 4 else 1 - token for i, token in enumerate(right))


@dataclass
class Row:
    """A row of the device; `prefix` numbers the tokens that it has computed; `text` is what it looks for drafts in."""

    sequence: Sequence
    length: int
    drawn: int
    stop: int
    prefix: list[int]
    last: int | None = None
    ended: bool = False
    text: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Dispatch:
    """A step with the tokens as they were known when it was dispatched, who draws how many at most, and the texts that
    the device is given."""

    step: Step
    tokens: dict[int, list[int]]
    lengths: dict[int, int]
    texts: dict[int, list[int]]


@dataclass(frozen=True)
class Report:
    """The tokens that a row has drawn in a step, and whether it has ended by itself."""

    id: int
    tokens: list[int]
    ended: bool


class Device:
    """Executes steps in order.

    Args:
      stops: at how many tokens a sequence draws its stop token, by id.
    """

    def __init__(self, limits: Limits, stops: dict[int, int]):
        self.limits, self.stops = limits, stops
        self.slots: dict[tuple[int, int], int] = {}
        self.table: dict[tuple[int, int], int] = {}
        self.rows: dict[int, Row] = {}
        self._numbers: dict[Any, int] = {}

    def number(self, before: Any, token: int) -> int:
        """The number of a prefix: of what comes before it, a number or a domain, and its last token."""
        return self._numbers.setdefault((before, token), len(self._numbers))

    def prefix(self, sequence: Sequence, tokens: list[int]) -> list[int]:
        numbers: list[int] = []
        for token in tokens:
            numbers.append(self.number(numbers[-1] if numbers else sequence.domain, token))
        return numbers

    def execute(self, dispatch: Dispatch) -> list[Report]:
        step = dispatch.step
        for joining in step.joining:
            self.table = {key: page for key, page in self.table.items() if key[0] != joining.row}
            gone = [n for n, row in self.rows.items() if n == joining.row or row.sequence is joining.sequence]
            for number in gone:
                del self.rows[number]
            length = dispatch.lengths[joining.sequence.id]
            drawn = length - joining.sequence.prompt_length
            known = self.prefix(joining.sequence, joining.sequence.tokens[: joining.shared])
            stop = self.stops[joining.sequence.id]
            self.rows[joining.row] = Row(joining.sequence, length, drawn, stop, known)
        for row, index, page in step.pages:
            self.table[row, index] = page
        reports: list[Report] = []
        stored: list[tuple[Row, int, int]] = []
        for chunk in step.chunks:
            row = self.rows[chunk.row]
            assert row.sequence is chunk.sequence
            assert len(row.prefix) == chunk.start
            stored += self._store(chunk.row, dispatch.tokens[chunk.sequence.id])
        numbers = {row.sequence: number for number, row in self.rows.items()}
        decoding = [numbers[sequence] for sequence in step.decoding]
        drawn: dict[int, list[int]] = {number: [] for number in decoding}
        for sequence, draft in step.drafts.items():
            number = numbers[sequence]
            if sequence.id in dispatch.texts:
                self.rows[number].text = dispatch.texts[sequence.id]
            if not self.rows[number].ended:
                drawn[number] += self._verify(number, draft)
                self.rows[number].text += drawn[number]
        for _ in range(step.steps):
            for number in decoding:
                if self.rows[number].sequence in step.drafts:
                    continue
                row = self.rows[number]
                if not row.ended:
                    assert row.last is not None
                    stored += self._store(number, [row.last])
            for row, number, at in stored:  # all is stored before anything is read
                self._read(row, number, at)
            for number in decoding:
                if not self.rows[number].ended and self.rows[number].sequence not in step.drafts:
                    drawn[number] += self._draw(self.rows[number])
                    if step.drafts:
                        self.rows[number].text += drawn[number]
            stored = []
        for chunk in step.chunks:
            row = self.rows[chunk.row]
            if chunk.draws:
                assert len(row.prefix) == row.length
                reports.append(Report(row.sequence.id, self._draw(row), row.ended))
            elif row.sequence.limit == 0 and len(row.prefix) == row.length:
                row.ended = True
                reports.append(Report(row.sequence.id, [], True))
        reports += [Report(self.rows[n].sequence.id, drawn[n], self.rows[n].ended) for n in decoding]
        return reports

    def _found(self, row: Row, most: int) -> tuple[int, ...]:
        """A draft out of the row's text, of which some tokens are wrong, and fewer than asked for at times."""
        sequence = row.sequence
        drawn = [draw(sequence.id, i) for i in range(row.drawn)]
        assert row.text == sequence.tokens[: sequence.prompt_length] + drawn
        return guess(sequence.id, row.drawn, most - len(row.text) % 2)

    def _verify(self, number: int, draft: Draft) -> list[int]:
        """Stores the last token and the draft, and draws as long as the draft is right: what is wrong stays behind."""
        row, tokens = self.rows[number], []
        tried = self._found(row, draft.length) if draft.tokens is None else draft.tokens
        for token in (*tried, None):
            assert row.last is not None
            for each in self._store(number, [row.last]):
                self._read(*each)
            tokens += self._draw(row)
            if row.ended or row.last != token:
                break
        end = len(row.prefix) + len(tried) + 1 - len(tokens)
        for at in range(len(row.prefix), end):
            self.slots[self.table[number, at // self.limits.page_size], at % self.limits.page_size] = -1
        return tokens

    def _store(self, number: int, tokens: list[int]) -> list[tuple[Row, int, int]]:
        """Stores keys; gives (row, its number, position) of each token for `_read`."""
        row, found = self.rows[number], []
        for token in tokens:
            at = len(row.prefix)
            row.prefix.append(self.number(row.prefix[-1] if row.prefix else row.sequence.domain, token))
            page, offset = self.table[number, at // self.limits.page_size], at % self.limits.page_size
            self.slots[page, offset] = row.prefix[-1]
            found.append((row, number, at))
        return found

    def _read(self, row: Row, number: int, at: int) -> None:
        for i in range(at + 1):
            slot = self.table[number, i // self.limits.page_size], i % self.limits.page_size
            assert self.slots.get(slot) == row.prefix[i], f"sequence {row.sequence.id}: position {i} is another's"

    def _draw(self, row: Row) -> list[int]:
        row.last = draw(row.sequence.id, row.drawn)
        row.drawn += 1
        row.ended = row.drawn >= min(row.sequence.limit, row.stop)
        return [row.last]
