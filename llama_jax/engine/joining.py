"""Builds the arguments of `state.join`: a plan's decisions and a request's settings as arrays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from llama_jax.cache import NO_PAGE
from llama_jax.decode.prefill import NO_ROW
from llama_jax.engine.drafting import Pace
from llama_jax.engine.program_set import MARKED, without_vocabulary
from llama_jax.engine.rules import Rule
from llama_jax.engine.sequence import Sequence
from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.state import Joining, Marked
from llama_jax.engine.steps import Step
from llama_jax.model.loaded import Model
from llama_jax.sampling import FULL, Logprobs, SamplerState, SamplingParams, make_sampler

_IDLE = SamplingParams(temperature=0.0, seed=0)


@dataclass(eq=False, slots=True)
class Asked:
    """A sequence and the request it belongs to.

    Attributes:
      adapter: its slot, 0 for none.
      greedy: whether a program for greedy requests serves it.
      rule: the host's constraints on its tokens, if any.
      pace: of its drafts, if any.
      scores: of its prompt so far.
      cached: prompt tokens found in the prefix cache when it began.
    """

    sequence: Sequence
    params: SamplingParams
    adapter: int
    greedy: bool
    rule: Rule | None = None
    pace: Pace | None = None
    scores: list[Logprobs] = field(default_factory=list)
    cached: int | None = None


def joinings(
    step: Step, asked: Mapping[int, Asked], model: Model, settings: EngineSettings
) -> Iterator[tuple[np.ndarray, Joining]]:
    """The arguments of each `state.join` call that a step needs: none if no row changes hands.

    Args:
      asked: sequences by number, including those that join.
    """
    leaving = np.zeros(settings.rows, bool)
    leaving[list(step.leaving)] = True
    joining, marks = list(step.joining), _marks(step, asked)
    while joining or marks or leaving.any():
        group, joining = joining[: settings.chunk_rows], joining[settings.chunk_rows :]
        # Marks come with the last rows: a joining row clears its earlier marks.
        some, marks = ([], marks) if joining else (marks[:MARKED], marks[MARKED:])
        yield leaving, _arrays(step, group, asked, some, model, settings)
        leaving = np.zeros_like(leaving)


def _arrays(
    step: Step,
    group: ListOf[Any],
    asked: Mapping[int, Asked],
    marks: ListOf[tuple[int, int, bool]],
    model: Model,
    settings: EngineSettings,
) -> Joining:
    n = settings.chunk_rows
    sequences = [joining.sequence for joining in group]
    each = [asked[sequence.id] for sequence in sequences]
    spare = n - len(group)
    pages = np.full((n, settings.pages_per_row), NO_PAGE, np.int32)
    line = {joining.row: i for i, joining in enumerate(group)}
    for row, index, page in step.pages:
        if row in line:
            pages[line[row], index] = page
    widths = model.config.vocab_size, model.eos_token_ids, settings.stop_ids, settings.biases
    sampler = _idle(n, *widths)
    if group:  # usually few rows join, and a first token waits for this: the rest is copied
        begun = _sampler([a.params for a in each], *widths)
        sampler = jax.tree.map(lambda new, idle: np.concatenate([new, idle[len(new) :]]), begun, sampler)

    def ints(values: Iterable[int], fill: int = 0) -> np.ndarray:
        return np.asarray([*values, *[fill] * spare], np.int32)

    drawn: Any = ints(len(s.tokens) - s.prompt_length for s in sequences)
    rows, tokens, of_output = np.full(MARKED, NO_ROW, np.int32), np.zeros(MARKED, np.int32), np.zeros(MARKED, bool)
    if marks:
        rows[: len(marks)], tokens[: len(marks)], of_output[: len(marks)] = zip(*marks, strict=True)
    return Joining(
        rows=ints((joining.row for joining in group), NO_ROW),
        pages=pages,
        shared=ints(joining.shared for joining in group),
        length=ints(len(s.tokens) for s in sequences),
        limit=ints(s.limit for s in sequences),
        rope_lengths=ints((s.prompt_length for s in sequences), 1),
        adapter_ids=ints(a.adapter for a in each),
        sampler=dataclasses.replace(sampler, count=drawn),
        marked=Marked(rows, tokens, of_output),
    )


def _sampler(
    params: ListOf[SamplingParams], vocab: int, eos_token_ids: tuple[int, ...], stop_ids: int, biases: int
) -> SamplerState:
    """Sampler state of joining rows, as numpy arrays."""
    made = make_sampler(
        params, [()] * len(params), vocab, eos_token_ids, profile=FULL, stop_width=stop_ids, bias_width=biases
    )
    return without_vocabulary(made[1])


@functools.cache
def _idle(rows: int, *widths: Any) -> SamplerState:
    """The same for unused rows; read-only."""
    return _sampler([_IDLE] * rows, *widths)


def _marks(step: Step, asked: Mapping[int, Asked]) -> list[tuple[int, int, bool]]:
    """(row, token, drawn) of the tokens so far that penalties need."""
    marks = []
    for joining in step.joining:
        sequence, params = joining.sequence, asked[joining.sequence.id].params
        of_prompt = params.repetition_penalty != 1.0
        if of_prompt or params.presence_penalty or params.frequency_penalty:
            first = 0 if of_prompt else sequence.prompt_length
            marks += [
                (joining.row, token, i >= sequence.prompt_length)
                for i, token in enumerate(sequence.tokens[first:], first)
            ]
    return marks
