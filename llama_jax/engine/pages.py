"""Bookkeeping of the cache's pages and their users: on the host, in place, in constant time per page."""

from __future__ import annotations

from collections import OrderedDict, deque

from llama_jax.engine.prefixes import Block


class Pages:
    """All pages of a cache; each is used, free, cached or fenced.

    A page that loses its last user is fenced until all steps planned so far have ended, since they may still write it.
    Then it is free, or cached: its contents can be found until the page is taken for others. A fenced page can be found
    too, since steps in flight write nothing else there.

    Free pages are taken first, those free longest before others; then cached ones, least recently used first.
    """

    def __init__(self, count: int):
        self.count = count
        self._users = [0] * count
        self._block: list[Block | None] = [None] * count
        self._free = deque(range(count))
        # OrderedDict: finding a plain dict's oldest entry takes linear time once many before it were deleted.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._fenced: OrderedDict[int, int] = OrderedDict()
        self._ended = 0

    @property
    def available(self) -> int:
        """Number of pages that can be taken at once."""
        return len(self._free) + len(self._cached)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def fenced(self) -> int:
        return len(self._fenced)

    @property
    def used(self) -> int:
        return self.count - len(self._free) - len(self._cached) - len(self._fenced)

    def users(self, page: int) -> int:
        """Number of sequences that use a page."""
        return self._users[page]

    def take(self) -> int:
        """Takes a page for new contents; the caller has made sure that one is available."""
        if self._free:
            page = self._free.popleft()
        else:
            page, _ = self._cached.popitem(last=False)
            self._unregister(page)
        self._users[page] = 1
        return page

    def share(self, page: int) -> None:
        """Adds a user to a page whose contents were found."""
        if not self._users[page]:
            self._cached.pop(page, None)
            self._fenced.pop(page, None)
        self._users[page] += 1

    def release(self, page: int, fence: int) -> None:
        """Removes a user; without users, the page becomes free when step `fence` has ended."""
        self._users[page] -= 1
        if not self._users[page]:
            self._fenced[page] = fence
            if fence <= self._ended:
                self._open(page)

    def ended(self, number: int) -> None:
        """Records that steps up to `number` have ended."""
        self._ended = max(self._ended, number)
        while self._fenced:
            page, fence = next(iter(self._fenced.items()))
            if fence > self._ended:
                break
            self._open(page)

    def register(self, page: int, block: Block) -> None:
        """Records that the page holds the block's contents, or that a planned step stores them in it."""
        block.pages.append(page)
        self._block[page] = block

    def forget(self, block: Block) -> list[int]:
        """Drops the pages of a block that has left the tree; cached ones become free."""
        pages, block.pages = block.pages, []
        for page in pages:
            self._block[page] = None
            if page in self._cached:
                del self._cached[page]
                self._free.append(page)
        return pages

    def _open(self, page: int) -> None:
        del self._fenced[page]
        if self._block[page] is None:
            self._free.append(page)
        else:
            self._cached[page] = None

    def _unregister(self, page: int) -> None:
        block = self._block[page]
        assert block is not None
        self._block[page] = None
        block.pages.remove(page)
        block.prune()
