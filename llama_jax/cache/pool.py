"""Tracks the free pages of a `PagedCache`: bookkeeping on the host, without side effects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama_jax.errors import DoesNotFit, RequestError


@dataclass(frozen=True, eq=False)
class PagePool:
    """The number of rows that use each page; every operation returns a new pool.

    Attributes:
      users: int32 [pages], 0 for free pages.
    """

    users: np.ndarray

    @classmethod
    def create(cls, pages: int) -> PagePool:
        """A pool of free pages 0 .. pages - 1."""
        return cls(np.zeros(pages, np.int32))

    @property
    def free(self) -> int:
        """The number of free pages."""
        return int(np.count_nonzero(self.users == 0))

    def take(self, count: int) -> tuple[np.ndarray, PagePool]:
        """Books `count` free pages, int32 [count], those with the lowest numbers.

        Raises:
          DoesNotFit: fewer are free.
        """
        found = np.flatnonzero(self.users == 0)[:count].astype(np.int32)
        if len(found) < count:
            raise DoesNotFit(
                f"{count} pages are needed, {len(found)} of {len(self.users)} are free",
                hint="release rows that have ended, or create the cache with more pages",
            )
        return found, self._counted(found, 1)

    def share(self, pages: Sequence[int] | np.ndarray) -> PagePool:
        """Adds a user to pages in use: rows with the same beginning may share them.

        Raises:
          RequestError: one of them is free, or is no page.
        """
        return self._counted(self._used(pages), 1)

    def release(self, pages: Sequence[int] | np.ndarray) -> PagePool:
        """Removes a user; pages without any are free again.

        Raises:
          RequestError: one of them is free, or is no page.
        """
        return self._counted(self._used(pages), -1)

    def _used(self, pages: Sequence[int] | np.ndarray) -> np.ndarray:
        array = np.asarray(pages, np.int32).reshape(-1)
        known = (array >= 0) & (array < len(self.users))
        wrong = array[~known | (np.take(self.users, array, mode="clip") == 0)] if len(self.users) else array
        if wrong.size or len(np.unique(array)) < array.size:
            what = f"page {wrong[0]} is not in use" if wrong.size else "a page is named twice"
            raise RequestError(what, param="pages", hint="give each page that `take` returned once")
        return array

    def _counted(self, pages: np.ndarray, change: int) -> PagePool:
        users = self.users.copy()
        users[pages] += change
        return PagePool(users)
