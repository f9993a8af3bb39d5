"""Sizes of an engine: everything that determines the shapes of its programs."""

from __future__ import annotations

from dataclasses import dataclass

from llama_jax.cache import DEFAULT_PAGE_SIZE, check_page_size
from llama_jax.engine.limits import Limits
from llama_jax.errors import RequestError
from llama_jax.kernels.attention.decode import MAX_QUERIES
from llama_jax.kernels.attention.packed import block_multiple

STOP_IDS, BIASES = 64, 1024
"""Default room for a request's stop ids and biases."""


@dataclass(frozen=True)
class EngineSettings:
    """The shapes of an engine's programs, and options of its scheduler.

    Attributes:
      rows: sequences that run at once.
      context: most tokens of a sequence; rounded up to whole pages.
      pages: of the cache, of `page_size` tokens each.
      decode_rows: sizes of decode steps, ascending; the last is `rows`.
      mixed_tokens: sizes of steps with prompts, in tokens, ascending; the last is the token budget.
      few_tokens: further sizes, for steps of at most `few_rows` rows: with all rows the attention, the head and the
        sampler of idle ones take their time. With any, the steps for all rows have no greedy programs.
      chunk_rows: most prompts of a step.
      steps: most decode steps per dispatch while nothing waits and nobody reads token by token.
      waiting: most waiting requests; None for no limit.
      prefix_cache: whether prompts reuse what others computed.
      stop_ids, biases: the most of each per request.
      drafts: most tokens of a row's draft (`drafting`); 0 for no drafts. draft_rows: rows of a step with drafts.
      draft_context: most tokens of a text that a draft model reads; 0 without a draft model.
      batch_invariant: whether a request's results are bitwise identical whatever runs beside it, whenever it arrives
        and whatever the prefix cache holds. There is then one size of each program, and a sequence starts only when
        there are pages for all of its tokens.
      constraint_s: time limit in seconds for a sequence's constraints to decide what may come next; beyond it the
        sequence ends with an error.
      greedy: whether there are separate programs for greedy requests. By default on a GPU, where they make some
        steps shorter (`program_set`); on a CPU they save less than their compilation takes, unless all requests are
        greedy.
      strict: whether compiling anything once the engine is ready is an error. All programs are compiled before.
    """

    rows: int
    context: int
    pages: int
    decode_rows: tuple[int, ...]
    mixed_tokens: tuple[int, ...]
    chunk_rows: int
    page_size: int = DEFAULT_PAGE_SIZE
    few_tokens: tuple[int, ...] = ()
    few_rows: int = 0
    steps: int = 1
    waiting: int | None = None
    prefix_cache: bool = True
    stop_ids: int = STOP_IDS
    biases: int = BIASES
    drafts: int = 0
    draft_rows: int = 8
    draft_context: int = 0
    batch_invariant: bool = False
    constraint_s: float = 10.0
    greedy: bool | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        check_page_size(self.page_size)
        if self.decode_rows[-1] != self.rows or list(self.decode_rows) != sorted(set(self.decode_rows)):
            raise RequestError(
                f"decode_rows {self.decode_rows} must ascend to the number of rows, {self.rows}",
                param="decode_rows",
                hint="e.g. (1, 8, 32) for 32 rows",
            )
        if self.mixed_tokens[-1] <= self.rows or list(self.mixed_tokens) != sorted(set(self.mixed_tokens)):
            raise RequestError(
                f"mixed_tokens {self.mixed_tokens} must ascend, and the last be more than the {self.rows} rows",
                param="mixed_tokens",
                hint="a step takes a token of every row that decodes, and prompts besides",
            )
        if self.few_tokens and not (
            0 < self.few_rows < self.rows
            and list(self.few_tokens) == sorted(set(self.few_tokens))
            and self.few_tokens[-1] <= self.budget
        ):
            raise RequestError(
                f"few_tokens {self.few_tokens} for {self.few_rows} of {self.rows} rows must ascend to at most "
                f"{self.budget} tokens, and be for some of the rows",
                param="few_tokens",
                hint="e.g. (128, 512) with few_rows=32 for 256 rows",
            )
        if not 1 <= self.steps <= self.page_size:
            raise RequestError(
                f"steps must be in [1, {self.page_size}], a page's tokens; got {self.steps}",
                param="steps",
                hint="1 for streams, 8 or 16 for throughput",
            )
        if not self.constraint_s > 0:
            raise RequestError(
                f"constraint_s must be above 0; got {self.constraint_s}",
                param="constraint_s",
                hint="10 seconds are many times what a grammar needs for a token",
            )
        if not 0 <= self.drafts < MAX_QUERIES:
            raise RequestError(
                f"drafts must be in [0, {MAX_QUERIES - 1}]; got {self.drafts}",
                param="drafts",
                hint="the kernels of decode attention take no more tokens of a row",
            )
        if self.draft_context and not self.drafts:
            raise RequestError(
                "a draft model, and no drafts to ask it for",
                param="drafts",
                hint="say how many to try: drafts=4 or --drafts 4",
            )
        if self.batch_invariant:
            self._check_batch_invariant()

    def _check_batch_invariant(self) -> None:
        if len(self.decode_rows) > 1 or len(self.mixed_tokens + self.few_tokens) > 1:
            raise RequestError(
                f"batch_invariant with decode_rows {self.decode_rows}, mixed_tokens {self.mixed_tokens} and few_tokens "
                f"{self.few_tokens}",
                param="batch_invariant",
                hint="give one size of each: another would be computed by a program that rounds differently",
            )
        if self.drafts:
            raise RequestError(
                f"batch_invariant with {self.drafts} drafts",
                param="drafts",
                hint="leave them out: steps with drafts are another program, which rounds differently",
            )

    @property
    def boundary(self) -> int | None:
        """Chunks of prompts and found prefixes are multiples of this many tokens; None for no constraint."""
        if not self.batch_invariant:
            return None
        return max(self.page_size, block_multiple(self.budget, self.chunk_rows))

    @property
    def looks_up(self) -> bool:
        """Whether drafts come from the texts themselves (`lookup`)."""
        return bool(self.drafts) and not self.draft_context

    @property
    def pages_per_row(self) -> int:
        """Entries of a row in the page table."""
        return -(-self.context // self.page_size)

    @property
    def budget(self) -> int:
        """Tokens of the largest mixed step."""
        return self.mixed_tokens[-1]

    @property
    def capacity(self) -> int:
        """Most tokens of a sequence that fits."""
        return self.limits.capacity

    @property
    def limits(self) -> Limits:
        """Limits of the scheduler."""
        return Limits(
            rows=self.rows,
            pages=self.pages,
            page_size=self.page_size,
            pages_per_row=self.pages_per_row,
            budget=self.budget,
            chunk_rows=self.chunk_rows,
            waiting=self.waiting,
            steps=self.steps,
            draft_rows=self.draft_rows if self.drafts else 0,
            boundary=self.boundary,
            apart=self.batch_invariant,
            reserve=self.batch_invariant,
            prefix_cache=self.prefix_cache,
        )
