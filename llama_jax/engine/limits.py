"""A scheduler's limits and counters."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from llama_jax.engine.sequence import Sequence
from llama_jax.errors import DoesNotFit, RequestError


@dataclass(frozen=True)
class Limits:
    """The sizes of a device's cache and steps.

    Attributes:
      rows: most sequences with pages at once.
      pages: in the cache, of `page_size` tokens each; pages_per_row: entries of one row in the page table.
      budget: tokens of one mixed step, at least one per row plus a chunk.
      chunk_rows: prompts in progress at once, each with a chunk in a mixed step. All but one of them may be prompts
        that do not end in that step; with 1, prompts are computed one after the other.
      waiting: most waiting sequences; None for no limit.
      steps: most decode steps per dispatch while nothing waits.
      draft_rows: most rows of a step with drafts; 0 for no such steps.
      boundary: chunks end at its multiples, and found prefixes are rounded down to them, so that a prompt is cut the
        same way whatever runs beside it; only prompts can then be found. A multiple of `page_size`, or None.
      apart: whether decoding rows, prompts and scored prompts, which different programs compute, are never mixed in
        one step.
      reserve: whether a sequence starts only when there are pages for all of its tokens, so that it is never preempted.
      prefix_cache: whether sequences reuse what others computed. Without it, only those of one `sequence.GROUP` do.

    Raises:
      RequestError: a value is out of range.
    """

    rows: int
    pages: int
    page_size: int
    pages_per_row: int
    budget: int
    chunk_rows: int
    waiting: int | None = None
    steps: int = 1
    draft_rows: int = 0
    boundary: int | None = None
    apart: bool = False
    reserve: bool = False
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        for name in ("rows", "pages", "page_size", "pages_per_row", "chunk_rows", "steps"):
            if getattr(self, name) < 1:
                got = getattr(self, name)
                raise RequestError(
                    f"{name} must be at least 1, got {got}", param=name, hint="none of them can be left out"
                )
        if self.waiting is not None and self.waiting < 0:
            hint = "None lets any number wait"
            raise RequestError(f"waiting must not be negative, got {self.waiting}", param="waiting", hint=hint)
        if self.boundary is not None and (self.boundary < 1 or self.boundary % self.page_size):
            raise RequestError(
                f"boundary {self.boundary} is not a multiple of the page size, {self.page_size}",
                param="boundary",
                hint="prefixes are found page by page",
            )
        decoding = 0 if self.apart else self.rows - 1
        if self.budget < decoding + self.cut:
            raise RequestError(
                f"a budget of {self.budget} tokens is too small",
                param="budget",
                hint=f"at least {decoding + self.cut}: a prompt's chunk of {self.cut} and {decoding} rows that decode",
            )

    @property
    def cut(self) -> int:
        """Chunk lengths are multiples of this unless the prompt ends."""
        return self.boundary or 1

    @property
    def capacity(self) -> int:
        """Most tokens of a sequence that fits."""
        return min(self.pages, self.pages_per_row) * self.page_size

    def check(self, sequence: Sequence) -> None:
        """Rejects a sequence that can never be computed.

        Raises:
          RequestError: it contradicts itself.
          DoesNotFit: it is too long.
        """
        if not isinstance(sequence.priority, Integral):
            hint = "an integer; lower ones run first"
            raise RequestError(f"priority must be an integer; got {sequence.priority!r}", param="priority", hint=hint)
        drawn = len(sequence.tokens) - sequence.prompt_length
        if not 1 <= sequence.prompt_length <= len(sequence.tokens):
            raise RequestError(
                f"a prompt of {sequence.prompt_length} tokens, of {len(sequence.tokens)} in all",
                param="prompt_length",
                hint="a prompt has at least one token",
            )
        if sequence.limit < 0 or drawn > max(0, sequence.limit - 1):
            raise RequestError(
                f"a limit of {sequence.limit} new tokens, of which {drawn} are drawn already",
                param="limit",
                hint="0 for the prompt alone, else more than are drawn already",
            )
        if sequence.prompt_length + sequence.limit > self.capacity:
            raise DoesNotFit(
                f"a prompt of {sequence.prompt_length} tokens and {sequence.limit} new ones do not fit into the "
                f"{self.capacity} that a sequence may have",
                hint="shorten the prompt or ask for fewer tokens; or make the engine's context and cache larger",
            )


@dataclass(frozen=True)
class Counts:
    """A scheduler's state and counters.

    Attributes:
      running, waiting: sequences with a row, and without.
      pages_used, pages_free, pages_cached, pages_fenced: every page is one of these (see `pages.Pages`).
      prompt_tokens: known tokens of all sequences when they got a row; prefix_hit_tokens: those of them found in the
        cache.
      preemptions: how often a sequence lost its row to another.
      planned_tokens: tokens that steps compute, without padding.
    """

    running: int
    waiting: int
    pages_used: int
    pages_free: int
    pages_cached: int
    pages_fenced: int
    prompt_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    planned_tokens: int
