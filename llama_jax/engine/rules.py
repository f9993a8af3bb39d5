"""The host's say in what a sequence draws: its constraints as masks of its next tokens."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from functools import cache

import numpy as np

from llama_jax.sampling import Constraint, Forkable, SamplingParams, token_mask

PATIENCE_S = 0.002
"""How long other sequences wait for each mask. Most take less than that, and a step without its row costs more."""

ALONE_S = 0.02
"""How long at once where there are no others: the caller may have more to do than to wait."""


@dataclass(frozen=True)
class Ahead:
    """The host's say in the next tokens of a sequence.

    Attributes:
      masks: tokens that may come next, and behind each of the draft, uint32 [1 + draft, ceil(vocab / 32)]
        (`sampling.token_mask`).
      draft: tokens that are likely to come next, each of them allowed and none of them the last of the text.
    """

    masks: np.ndarray
    draft: tuple[int, ...] = ()


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
        self._next: Future[Ahead] | None = None
        self._asked_for: tuple[Sequence[int], int] = (), 0
        self._asked_at = 0.0
        self._begun_at: float | None = None

    def accept(self, tokens: Sequence[int]) -> None:
        """Takes note of tokens that were drawn, after `ahead`."""
        self._next = None
        try:
            for token in tokens:
                for constraint in self._constraints:
                    constraint.accept(token)
            self.ended = any(constraint.ended for constraint in self._constraints)
        except Exception as error:
            self.error = _told(error)

    def prepare(self, guess: Sequence[int] = (), most: int = 0) -> None:
        """Has the next masks computed, in a thread, unless they are already.

        Args:
          guess: tokens that may follow, to be tried where the constraints force none.
          most: tokens of a draft; 0 for the next mask alone.
        """
        if self._next is None:
            self._asked_for, self._asked_at = (guess, most), time.monotonic()
        elif not self._next.cancelled():
            return
        self._begun_at = None
        try:
            with _changing:
                self._next = _pool().submit(self._compute, *self._asked_for)
        except RuntimeError as error:  # the system gives no more threads
            self.error = self.error or _told(error)
            self._next = Future()
            self._next.set_result(Ahead(np.zeros_like(self._allowed)[None]))

    @property
    def ready(self) -> bool:
        """Whether `ahead` has been computed."""
        return self._next is not None and self._next.done() and not self._next.cancelled()

    @property
    def waited_s(self) -> float:
        """Seconds since `prepare`."""
        return time.monotonic() - self._asked_at

    @property
    def took_s(self) -> float:
        """Seconds since a thread has begun to compute `ahead`."""
        return 0.0 if self._begun_at is None else time.monotonic() - self._begun_at

    @property
    def ahead(self) -> Ahead:
        """The next masks and draft; blocks until they are computed."""
        self.prepare()
        assert self._next is not None
        return self._next.result()

    def _compute(self, guess: Sequence[int], most: int) -> Ahead:
        self._begun_at = time.monotonic()
        mask, error = self._mask(self._constraints)
        self.error = self.error or error
        if self.error:
            return Ahead(np.zeros_like(mask)[None])
        draft, masks = self._look_ahead(mask, guess, most)
        return Ahead(np.stack([mask, *masks]), tuple(draft))

    def _look_ahead(self, mask: np.ndarray, guess: Sequence[int], most: int) -> tuple[list[int], list[np.ndarray]]:
        """A draft behind a mask, and the masks behind its tokens. What goes wrong here ends the draft before it: it is
        told when it has come to that."""
        draft: list[int] = []
        masks: list[np.ndarray] = []
        if not most:
            return draft, masks
        forced: Sequence[int] = ()
        with contextlib.suppress(Exception):
            forks = [constraint.fork() for constraint in self._constraints if isinstance(constraint, Forkable)]
            if len(forks) < len(self._constraints):
                return draft, masks
            while len(draft) < most:
                forced = forced or next((tokens for fork in forks if (tokens := fork.forced())), ())
                if not forced and not guess:
                    break
                token = forced[0] if forced else guess[0]
                if not token_mask.allows(mask, token):
                    break
                forced, guess = forced[1:], guess[1:] if guess[:1] == (token,) else ()
                for fork in forks:
                    fork.accept(token)
                if any(fork.ended for fork in forks):
                    break
                mask, error = self._mask(forks)
                if error:
                    break
                draft.append(token)
                masks.append(mask)
        return draft, masks

    def _mask(self, constraints: Sequence[Constraint]) -> tuple[np.ndarray, str | None]:
        """The mask that constraints give together, and why nothing can follow, if so."""
        mask = self._allowed.copy()
        try:
            for constraint in constraints:
                constraint.mask(mask)
            errors = [constraint.error for constraint in constraints if constraint.error]
        except Exception as error:
            errors = [_told(error)]
        return mask, "; ".join(errors) or (None if mask.any() else "the constraints allow no token")


def wait(rules: Collection[Rule], *, alone: bool) -> None:
    """Waits for masks that are being computed, but for none longer than other sequences do. If there are no others, it
    waits a while until the first of them is there."""
    left_s = {rule: PATIENCE_S * len(rules) - rule.waited_s for rule in rules}
    futures = {rule: rule._next for rule in rules if rule._next is not None}
    patient = [future for rule, future in futures.items() if left_s[rule] > 0]
    if patient:
        wait_for(patient, timeout=max(left_s.values()))
    if alone and not any(rule.ready for rule in rules):
        wait_for(futures.values(), timeout=ALONE_S, return_when=FIRST_COMPLETED)


def abandon_threads() -> None:
    """Leaves the threads to what they compute, which may never end: others take over. Masks that nobody has begun to
    compute have to be prepared again."""
    with _changing:
        pool = _pool()
        _pool.cache_clear()
    pool.shutdown(wait=False, cancel_futures=True)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


_changing = threading.Lock()
"""Held while a pool is asked for and used: several engines may run in one process."""


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="llama_jax masks")


@cache
def _whole(vocab_size: int) -> np.ndarray:
    """The mask of the vocabulary and nothing else."""
    return token_mask.only(range(vocab_size), vocab_size)
