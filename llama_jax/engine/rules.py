"""The host's say in what a sequence draws: its constraints as the mask of its next token."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import numpy as np

from llama_jax.sampling import Constraint, SamplingParams, token_mask


class Rule:
    """The constraints of one sequence, and `allowed_token_ids`, over the tokens that it has drawn.

    What constraints raise becomes `error`: it must not harm other sequences.

    Attributes:
      ended: whether nothing may follow.
      error: why nothing can follow, once a mask has shown it: one that allows no token.
    """

    def __init__(self, constraints: Sequence[Constraint], params: SamplingParams, vocab_size: int):
        """Args: the constraints, of this sequence alone, and what else `params` allow."""
        self._constraints = constraints
        ids = params.allowed_token_ids
        self._allowed = _whole(vocab_size) if ids is None else token_mask.only(ids, vocab_size)
        self.ended = False
        self.error: str | None = None
        self._next: Future[np.ndarray] | None = None

    def accept(self, tokens: Sequence[int]) -> None:
        """Takes note of tokens that were drawn, after `mask`."""
        self._next = None
        try:
            for token in tokens:
                for constraint in self._constraints:
                    constraint.accept(token)
            self.ended = any(constraint.ended for constraint in self._constraints)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"

    def prepare(self) -> None:
        """Has the next mask computed, in a thread, unless it is already."""
        if self._next is None:
            self._next = _pool().submit(self._compute)

    def mask(self) -> np.ndarray:
        """The tokens that may come next, uint32 [ceil(vocab / 32)] (`sampling.token_mask`)."""
        self.prepare()
        assert self._next is not None
        return self._next.result()

    def _compute(self) -> np.ndarray:
        mask = self._allowed.copy()
        try:
            for constraint in self._constraints:
                constraint.mask(mask)
            errors = [constraint.error for constraint in self._constraints if constraint.error]
        except Exception as error:
            errors = [f"{type(error).__name__}: {error}"]
        if self.error is None and (errors or not mask.any()):
            self.error = "; ".join(errors) or "the constraints allow no token"
        if self.error:
            mask[:] = 0
        return mask


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="llama_jax masks")


@cache
def _whole(vocab_size: int) -> np.ndarray:
    """The mask of the vocabulary and nothing else."""
    return token_mask.only(range(vocab_size), vocab_size)
