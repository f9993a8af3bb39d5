"""Builds the arguments of `state.join` and `state.mark`: a plan's decisions and a request's settings as arrays."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from llama_jax.cache import NO_PAGE
from llama_jax.engine.compiled import KEPT, shapes_alone
from llama_jax.engine.drafting import Pace
from llama_jax.engine.flat import flat, views
from llama_jax.engine.rules import Rule
from llama_jax.engine.sequence import Sequence
from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.state import NO_ROW, Joining
from llama_jax.engine.steps import Step
from llama_jax.model.loaded import Model
from llama_jax.sampling import FULL, Logprobs, SamplerState, SamplingParams, make_sampler, token_mask

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


class Beginnings:
    """Sequences that begin with a step, as they are sent to the device.

    Attributes:
      idle: what is sent if none begins; read-only.
    """

    def __init__(self, model: Model, settings: EngineSettings):
        self._widths = model.config.vocab_size, model.eos_token_ids, settings.stop_ids, settings.biases
        self.idle, self._flat = _idle(shapes_alone(settings), *self._widths)

    @property
    def size(self) -> int:
        """Length of the array that is sent."""
        return len(self._flat)

    def write(self, into: np.ndarray, step: Step, asked: Mapping[int, Asked]) -> None:
        """Fills in the array int32 [size] (`flat`); `asked` are sequences by number, including those that join."""
        into[...] = self._flat
        if step.joining:
            each = [asked[joining.sequence.id] for joining in step.joining]
            _begin(views(into, self.idle), step.joining, step.pages, each, self._widths)


def masks(step: Step, asked: Mapping[int, Asked], vocab_size: int) -> list[tuple[int, np.ndarray]]:
    """Each joining row that may draw only some tokens, and their mask."""
    each = ((joining.row, asked[joining.sequence.id].params.allowed_token_ids) for joining in step.joining)
    return [(row, token_mask.only(ids, vocab_size)) for row, ids in each if ids is not None]


def _begin(
    new: Joining, group: ListOf[Any], pages: Iterable[tuple[int, int, int]], each: ListOf[Asked], widths: Any
) -> None:
    """Fills in the rows that begin.

    Args:
      group: `steps.Joining` of each; pages: `Step.pages`.
    """
    line = {joining.row: i for i, joining in enumerate(group)}
    for row, index, page in pages:
        if row in line:
            new.pages[line[row], index] = page
    sampler: Any = _sampler([asked.params for asked in each], *widths)
    sampler.restricted[...] |= [asked.rule is not None for asked in each]
    for into, value in zip(jax.tree.leaves(new.sampler), jax.tree.leaves(sampler), strict=True):
        into[: len(group)] = value
    for i, (joining, asked) in enumerate(zip(group, each, strict=True)):
        sequence = joining.sequence
        new.rows[i], new.shared[i] = joining.row, joining.shared
        new.length[i], new.limit[i] = len(sequence.tokens), sequence.limit
        new.rope_lengths[i], new.adapter_ids[i] = sequence.prompt_length, asked.adapter
        new.sampler.count[i] = len(sequence.tokens) - sequence.prompt_length


@functools.lru_cache(maxsize=KEPT)
def _idle(settings: EngineSettings, *widths: Any) -> tuple[Joining, np.ndarray]:
    """Sequences of a step with which none begins, and as they are sent; read-only."""
    n = settings.chunk_rows

    def ints(*shape: int, fill: int = 0) -> np.ndarray:
        return np.full(shape, fill, np.int32)

    like = Joining(
        rows=ints(n, fill=NO_ROW),
        pages=ints(n, settings.pages_per_row, fill=NO_PAGE),
        shared=ints(n),
        length=ints(n),
        limit=ints(n),
        rope_lengths=ints(n, fill=1),
        adapter_ids=ints(n),
        sampler=_sampler([_IDLE] * n, *widths),
    )
    return like, flat(like)


def _sampler(
    params: ListOf[SamplingParams], vocab: int, eos_token_ids: tuple[int, ...], stop_ids: int, biases: int
) -> SamplerState:
    """Sampler state of joining rows, as numpy arrays."""
    return make_sampler(params, None, vocab, eos_token_ids, profile=FULL, stop_width=stop_ids, bias_width=biases)[1]


def penalised(step: Step, asked: Mapping[int, Asked]) -> tuple[list[int], list[tuple[int, int, bool]]]:
    """Joining rows with penalties, and (row, token, drawn) of their tokens so far that these need. How often a token
    occurs counts only among the drawn ones."""
    rows, marks = [], []
    for joining in step.joining:
        sequence, params = joining.sequence, asked[joining.sequence.id].params
        of_prompt = params.repetition_penalty != 1.0
        if of_prompt or params.presence_penalty or params.frequency_penalty:
            rows.append(joining.row)
            prompt, drawn = sequence.tokens[: sequence.prompt_length], sequence.tokens[sequence.prompt_length :]
            marks += [(joining.row, token, False) for token in set(prompt if of_prompt else ())]
            marks += [(joining.row, token, True) for token in drawn]
    return rows, marks
