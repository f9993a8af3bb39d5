"""Who uses which page of the cache: bookkeeping on the host, in place, constant time a page."""

from __future__ import annotations

from collections import OrderedDict, deque

from llama_jax.engine.prefixes import Block


class Pages:
    """All pages of a cache; each is used, free, cached or fenced.

    A page that loses its last user is fenced until the steps have ended that were planned by then, since they may still
    write it. Then it is free, or cached: its contents can be found until it is taken for others. What can be found is
    found behind the fence too, since steps in flight write nothing else there.

    Free pages are taken first, those that have been free longest before others; then cached ones, least recently used
    first.
    """

    def __init__(self, count: int):
        self.count = count
        self._users = [0] * count
        self._block: list[Block | None] = [None] * count
        self._free = deque(range(count))
        # OrderedDict: the oldest entry of a plain dict is found in linear time once many before it were deleted.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._fenced: OrderedDict[int, int] = OrderedDict()
        self._ended = 0

    @property
    def available(self) -> int:
        """Pages that can be taken at once."""
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
        """How many sequences use a page."""
        return self._users[page]

    def take(self) -> int:
        """A page for new contents; the caller has made sure that one is available."""
        if self._free:
            page = self._free.popleft()
        else:
            page, _ = self._cached.popitem(last=False)
            self._unregister(page)
        self._users[page] = 1
        return page

    def share(self, page: int) -> None:
        """One user more of a page whose contents were found."""
        if not self._users[page]:
            self._cached.pop(page, None)
            self._fenced.pop(page, None)
        self._users[page] += 1

    def release(self, page: int, fence: int) -> None:
        """One user less; without any, the page comes free when step `fence` has ended."""
        self._users[page] -= 1
        if not self._users[page]:
            self._fenced[page] = fence
            if fence <= self._ended:
                self._open(page)

    def ended(self, number: int) -> None:
        """Steps up to `number` have ended."""
        self._ended = max(self._ended, number)
        while self._fenced:
            page, fence = next(iter(self._fenced.items()))
            if fence > self._ended:
                break
            self._open(page)

    def register(self, page: int, block: Block) -> None:
        """The page holds, or a planned step stores in it, what the block says."""
        block.pages.append(page)
        self._block[page] = block

    def forget(self, block: Block) -> list[int]:
        """The pages of a block that is out of the tree; those that were cached are free."""
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
