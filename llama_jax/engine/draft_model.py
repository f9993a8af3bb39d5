"""Drafts by a second, smaller model, which follows the texts as they grow; its most likely tokens are tried.

"Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192; here the draft model has no influence on
what is drawn (`drafting`). Its cache has a row for each sequence that drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from llama_jax.cache import PagedCache
from llama_jax.engine.draft_programs import DRAFT, FOLLOW, DraftParts, draft_control, follow_control, piece
from llama_jax.engine.drafting import Cost, Pace, Wanted
from llama_jax.engine.sequence import Domain, Sequence
from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.state import NO_ROW
from llama_jax.errors import RequestError
from llama_jax.model.loaded import Model
from llama_jax.plan.costs import read_bytes
from llama_jax.plan.step_costs import Peak

PADDING = 128
"""The most rows by which the tables of two models with one vocabulary may differ (Qwen2.5-0.5B and -7B: 128)."""

WAIT_S = 0.006
"""Extra seconds of a step beyond reading its weights, since the host reads a draft before sending it.
On an H200 13.4 ms for Llama-3.1-8B with four tokens of Llama-3.2-1B, whose weights take 7.0."""

_ALL = np.iinfo(np.int32).max
"""Number of a row's tokens to keep in the cache: all of them."""


def check_draft(model: Model, draft: Model) -> None:
    """Raises RequestError unless a model can draft for another."""
    sizes = draft.config.vocab_size, model.config.vocab_size
    if abs(sizes[0] - sizes[1]) > PADDING:
        raise RequestError(
            f"the draft model has {sizes[0]} tokens, the model {sizes[1]}",
            param="draft",
            hint="a draft model needs the model's vocabulary: a smaller model of the same family",
        )
    if draft.mesh != model.mesh or (model.mesh is None and draft.device != model.device):
        raise RequestError(
            "the draft model is on other devices than the model, or laid out by another mesh",
            param="draft",
            hint="load it with the same mesh: load(name, mesh=model.mesh)",
        )


def check_room(settings: EngineSettings, draft: Model | None) -> None:
    """Raises RequestError if there is a draft model without settings for it, or vice versa."""
    if draft is not None and not settings.draft_context:
        raise RequestError(
            "a draft model, and settings that have no room for it",
            param="draft",
            hint="set draft_context and drafts, or let default_settings(model, draft=draft, drafts=4) choose",
        )
    if draft is None and settings.draft_context:
        raise RequestError(
            f"settings with a draft model's context of {settings.draft_context} tokens, and no draft model",
            param="draft",
            hint="pass the draft model, or set draft_context to 0",
        )
    if draft is not None and settings.draft_context > draft.config.context_length:
        raise RequestError(
            f"a draft model is to read {settings.draft_context} tokens, and its context is "
            f"{draft.config.context_length}",
            param="draft_context",
            hint=f"at most {draft.config.context_length}; longer texts get no drafts",
        )


def cost_of(draft: Model, model: Model, peak: Peak | None = None) -> Cost:
    """Cost of drafts: per token, the ratio of the bytes that the two models read for a few tokens; per step, the
    device's wait for the host, relative to the time to read the model's bytes.

    Args:
      peak: of the device; if its bandwidth is unknown, waiting costs nothing.
    """
    small, large = (read_bytes(one.config, one.dtype.itemsize, 1, one.mesh) for one in (draft, model))
    waits = WAIT_S * peak.bytes_per_s / large if peak and peak.bytes_per_s else 0.0
    return Cost(small / large, waits)


@dataclass(eq=False)
class _Row:
    """A row of the draft model's cache.

    Attributes:
      text: growing text of the sequence that it follows or followed; `stored` tokens of it are in the cache,
        followed by the tokens `guessed`.
      domain: of the sequence: only sequences of the same domain can reuse its text.
      draft: the last draft, after `length` tokens of the text.
      used: time of last use.
    """

    number: int | None = None
    text: ListOf[int] = ()
    domain: Domain = ()
    prompt: int = 0
    stored: int = 0
    guessed: tuple[int, ...] = ()
    draft: tuple[int, ...] = ()
    length: int = -1
    used: int = 0

    def shared(self, sequence: Sequence) -> int:
        """Tokens of a sequence's text that are stored here."""
        return _common(self.text[: self.stored], sequence.tokens) if self.domain == sequence.domain else 0

    def take(self, sequence: Sequence, now: int) -> None:
        """Starts following a sequence."""
        self.stored, self.guessed, self.draft, self.length = self.shared(sequence), (), (), -1
        self.number, self.text, self.domain = sequence.id, sequence.tokens, sequence.domain
        self.prompt, self.used = sequence.prompt_length, now

    def settle(self) -> None:
        """Counts correct guesses as stored, but leaves the last token to compute: its logits give the next."""
        came = self.text[self.stored : self.stored + len(self.guessed)]
        self.stored = min(self.stored + _common(came, self.guessed), len(self.text) - 1)
        self.guessed = ()

    @property
    def gap(self) -> int:
        """Number of tokens of the text that are not stored."""
        return len(self.text) - self.stored


def _common(one: ListOf[int], other: ListOf[int]) -> int:
    """Length of the common prefix of two texts."""
    n = min(len(one), len(other))
    differ = np.flatnonzero(np.asarray(one[:n], np.int64) != np.asarray(other[:n], np.int64))
    return int(differ[0]) if len(differ) else n


class DraftModel:
    """A `drafting.Source` that tracks whose text each row of the draft model's cache holds, and how much of it.

    A row keeps its text until another sequence takes the row, and starts where their texts differ: the next turn of a
    conversation is not read from its beginning.
    """

    on_device = False

    def __init__(
        self,
        parts: DraftParts,
        settings: EngineSettings,
        run: Callable[[str, PagedCache, np.ndarray], Any],
        cost: Cost,
    ):
        """Makes a draft model that has read nothing.

        Args:
          run: runs a program by its name, on the cache, with its control array.
          cost: see `cost_of`.
        """
        self._parts, self._settings, self._run, self._cost = parts, settings, run, cost
        self._made: PagedCache | None = None
        self._rows = [_Row() for _ in range(settings.draft_rows)]
        self._width = settings.drafts + 1
        self._clock = 0

    @property
    def cache(self) -> PagedCache:
        """The draft model's cache, made at first use."""
        if self._made is None:
            self._made = self._parts.begin()
        return self._made

    def ready(self) -> None:
        """See `Source`."""
        jax.block_until_ready(self.cache)

    def begin(self) -> Pace:
        """See `Source`."""
        return Pace(self._settings.drafts, self._cost)

    def ended(self, number: int) -> None:
        """See `Source`."""
        for row in self._rows:
            if row.number == number:
                row.number = None

    def propose(self, wanted: ListOf[Wanted]) -> list[tuple[int, ...]]:
        """See `Source`. For sequences whose texts are far ahead of the cache, computes a piece of the text and proposes
        nothing yet."""
        fitting = []
        for each in wanted:
            if len(each.sequence.tokens) + self._settings.drafts > self._settings.draft_context:
                each.pace.nothing(len(each.sequence.tokens))
            else:
                fitting.append(each)
        rows = self._assigned([each.sequence for each in fitting])
        new = {row: each for row, each in zip(rows, fitting, strict=True) if row.length != len(row.text)}
        for row in new:
            row.settle()
        self._follow(list(new))
        near = {row: min(each.most, each.pace.length) for row, each in new.items() if row.gap <= self._width}
        if near:
            self._draft(near)
        drafts = {
            each.sequence.id: row.draft[: each.most] if row.length == len(row.text) else ()
            for row, each in zip(rows, fitting, strict=True)
        }
        return [drafts.get(each.sequence.id, ()) for each in wanted]

    def _assigned(self, sequences: ListOf[Sequence]) -> list[_Row]:
        """Rows of the sequences; new sequences get rows without one, or the least recently used."""
        self._clock += 1
        of = {row.number: row for row in self._rows if row.number is not None}
        for sequence in sequences:
            if sequence.id in of:
                of[sequence.id].used = self._clock
        for sequence in sequences:
            if sequence.id not in of:
                free = [row for row in self._rows if row.number is None]
                free = free or [min(self._rows, key=lambda row: row.used)]
                of[sequence.id] = row = max(free, key=lambda row: (row.shared(sequence), -row.used))
                row.take(sequence, self._clock)
        return [of[sequence.id] for sequence in sequences]

    def _follow(self, rows: ListOf[_Row]) -> None:
        """Computes tokens that rows lag behind by more than `draft` takes, up to one piece."""
        array, parts = follow_control(self._settings).new(positions=-1, rows=NO_ROW, stored=_ALL)
        at, room = 0, piece(self._settings)
        for row in rows:
            count = min(room - at, row.gap - 1)
            if row.gap <= self._width or not count:
                continue
            here, end, line = slice(at, at + count), row.stored + count, self._rows.index(row)
            parts["ids"][here], parts["rows"][here] = row.text[row.stored : end], line
            parts["positions"][here] = np.arange(row.stored, end)
            parts["stored"][line], parts["prompts"][line] = row.stored, row.prompt
            row.stored, at = end, at + count
        if at:
            self._made = self._run(FOLLOW, self.cache, array)

    def _draft(self, counts: dict[_Row, int]) -> None:
        """Drafts `counts` tokens after the texts of rows."""
        most = max(counts.values())
        array, parts = draft_control(self._settings).new(ids=-1, stored=_ALL, count=most)
        for row in counts:
            line = self._rows.index(row)
            parts["ids"][line, : row.gap] = row.text[row.stored :]
            parts["stored"][line], parts["prompts"][line] = row.stored, row.prompt
        self._made, drafted = self._run(DRAFT, self.cache, array)
        lines = np.asarray(jax.device_get(drafted)).tolist()
        for row, count in counts.items():
            line = lines[self._rows.index(row)]
            row.stored = row.length = len(row.text)
            row.guessed, row.draft = tuple(line[: most - 1]), tuple(line[:count])
