"""Host-side constraints of a sequence, as masks of its next tokens."""

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
"""Time that other sequences wait for each mask. Most masks take less, and a step without its row costs more."""

ALONE_S = 0.02
"""Longest wait at once if there are no other sequences: the caller may have other work."""


@dataclass(frozen=True)
class Ahead:
    """Constraints on the next tokens of a sequence.

    Attributes:
      masks: tokens that may come next, and after each draft token, uint32 [1 + draft, ceil(vocab / 32)]
        (`sampling.token_mask`).
      draft: likely next tokens, each of them allowed and none of them ending the text.
    """

    masks: np.ndarray
    draft: tuple[int, ...] = ()


class Rule:
    """The constraints and `allowed_token_ids` of one sequence, given the tokens that it has drawn.

    Whatever constraints raise becomes `error`: it must not harm other sequences. Rust panics are no `Exception`s.

    Attributes:
      ended: whether nothing may follow.
      error: why nothing can follow, once a mask allows no token.
    """

    def __init__(self, constraints: Sequence[Constraint], params: SamplingParams, vocab_size: int):
        """Args: the constraints, of this sequence alone, and `params`, which may allow only some tokens."""
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
        """Records drawn tokens, after `ahead`."""
        self._next = None
        try:
            for token in tokens:
                for constraint in self._constraints:
                    constraint.accept(token)
            self.ended = any(constraint.ended for constraint in self._constraints)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self.error = _told(error)

    def prepare(self, guess: Sequence[int] = (), most: int = 0) -> None:
        """Starts computing the next masks in a thread, unless that has been done.

        Args:
          guess: tokens that may follow, tried if the constraints force none.
          most: the most tokens of a draft; 0 for the next mask only.
        """
        if self._next is None:
            self._asked_for, self._asked_at = (guess, most), time.monotonic()
        elif not self._next.cancelled():
            return
        self._begun_at = None
        try:
            with _changing:
                self._next = _pool().submit(self._compute, *self._asked_for)
        except RuntimeError as error:  # the system is out of threads
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
        """Seconds since a thread began to compute `ahead`."""
        return 0.0 if self._begun_at is None else time.monotonic() - self._begun_at

    @property
    def ahead(self) -> Ahead:
        """The next masks and draft; blocks until computed."""
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
        """A draft after a mask, and the masks after its tokens. A failure here only cuts the draft short; it is
        reported once the text gets there."""
        draft: list[int] = []
        masks: list[np.ndarray] = []
        if not most:
            return draft, masks
        forced: Sequence[int] = ()
        with contextlib.suppress(BaseException):
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
        """The combined mask of all constraints, and the reason if nothing can follow."""
        mask = self._allowed.copy()
        try:
            for constraint in constraints:
                constraint.mask(mask)
            errors = [constraint.error for constraint in constraints if constraint.error]
        except BaseException as error:
            errors = [_told(error)]
        return mask, "; ".join(errors) or (None if mask.any() else "the constraints allow no token")


def wait(rules: Collection[Rule], *, alone: bool) -> None:
    """Waits for masks that are being computed, but no longer than other sequences may be delayed. If there are no
    others, waits a while for the first mask."""
    left_s = {rule: PATIENCE_S * len(rules) - rule.waited_s for rule in rules}
    futures = {rule: rule._next for rule in rules if rule._next is not None}
    patient = [future for rule, future in futures.items() if left_s[rule] > 0]
    if patient:
        wait_for(patient, timeout=max(left_s.values()))
    if alone and not any(rule.ready for rule in rules):
        wait_for(futures.values(), timeout=ALONE_S, return_when=FIRST_COMPLETED)


def abandon_threads() -> None:
    """Abandons the threads, whose work may never end, for new ones. Masks whose computation has not begun must be
    prepared again."""
    with _changing:
        pool = _pool()
        _pool.cache_clear()
    pool.shutdown(wait=False, cancel_futures=True)


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


_changing = threading.Lock()
"""Held while a pool is obtained and used: several engines may run in one process."""


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="llama_jax masks")


@cache
def _whole(vocab_size: int) -> np.ndarray:
    """The mask that allows exactly the vocabulary."""
    return token_mask.only(range(vocab_size), vocab_size)
