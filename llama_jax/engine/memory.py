"""Sequences' holdings of the device's cache: rows, pages, and blocks that others may share."""

from __future__ import annotations

from llama_jax.engine.limits import Limits
from llama_jax.engine.pages import Pages
from llama_jax.engine.prefixes import Block, Prefixes, cut, extend_keys, find
from llama_jax.engine.sequence import GROUP, Sequence


class Memory:
    """The cache of one device.

    Attributes:
      newest: number of the newest planned step, which released pages must wait for.
      entries: pages that the next step enters into the device's page table (see `steps.Step`).
    """

    def __init__(self, limits: Limits):
        self.limits, self.newest = limits, 0
        self.pages = Pages(limits.pages)
        self.entries: list[tuple[int, int, int]] = []
        self._rows = list(range(limits.rows))[::-1]
        self._prefixes = Prefixes()

    @property
    def free_rows(self) -> int:
        return len(self._rows)

    def find(self, sequence: Sequence) -> list[Block] | None:
        """The blocks that a waiting sequence need not compute; None if it should wait for more (see `awaits`).

        It waits while sequences with rows, of at least its priority, are about to compute them.
        """
        if not sequence.reuse or not self._shares(sequence):
            return []
        size = self.limits.page_size
        keys = extend_keys(sequence, size)
        root = self._prefixes.root(sequence.domain)
        # At least one token must be computed: the next one is drawn from its logits.
        found, coming = find(root, keys[: (len(sequence.tokens) - 1) // size])
        root.prune()
        for block in coming:  # they are computed in order, so wait for the last of them
            if not _awaited(sequence, block):
                break
            sequence.awaited = block
        if awaits(sequence):
            return None
        whole = max(1, self.limits.cut // size)
        return found[: len(found) // whole * whole]

    def missing(self, sequence: Sequence, found: list[Block]) -> int:
        """Number of pages that must be available for a sequence to start: new ones, and found ones without users."""
        total = self._pages_at_start(sequence)
        return total - len(found) + sum(not self.pages.users(block.pages[0]) for block in found)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.limits.page_size)

    def start(self, sequence: Sequence, found: list[Block]) -> None:
        """Gives the sequence a row, and pages for all known tokens, or for all that it may have."""
        sequence.row, sequence.blocks, sequence.awaited = self._rows.pop(), found, None
        for block in found:
            self.pages.share(block.pages[0])
            self._enter(sequence, block.pages[0])
        sequence.computed = sequence.cached = len(found) * self.limits.page_size
        self.book(sequence, self._pages_at_start(sequence) - len(found))
        self._claim(sequence)

    def book(self, sequence: Sequence, count: int) -> None:
        """Gives the sequence further pages, which the caller knows to be available."""
        for _ in range(count):
            self._enter(sequence, self.pages.take())

    def leave(self, sequence: Sequence, *, keep: bool = True) -> list[int]:
        """Takes back row and pages, the last page first: others are likelier to want the beginning.

        Args:
          keep: False if what it computed, and what others computed after it, must not be found.

        Returns:
          Pages without users whose contents must not be read.
        """
        bad: list[int] = []
        own = sequence.cached // self.limits.page_size
        if not keep and len(sequence.blocks) > own:
            bad = [page for block in cut(sequence.blocks[own]) for page in self.pages.forget(block)]
        if not keep or _is_cut(sequence):
            bad += sequence.pages[sum(not block.cut for block in sequence.blocks) :]
        for block in sequence.claims:
            if block.computing is sequence:
                block.computing = None
                block.prune()
        for page in reversed(sequence.pages):
            self.pages.release(page, self.newest)
        self._rows.append(sequence.row)
        sequence.row, sequence.pages, sequence.blocks, sequence.claims = -1, [], [], []
        sequence.computed = sequence.cached = 0
        sequence.remembered = False
        return [page for page in dict.fromkeys(bad) if not self.pages.users(page)]

    def register(self, sequence: Sequence, stored: int) -> None:
        """Makes the pages of full blocks among the first `stored` tokens, which are known, findable for others."""
        full = self._findable(sequence, stored)
        if len(sequence.blocks) >= full or _is_cut(sequence):
            return
        keys = extend_keys(sequence, self.limits.page_size)
        for index in range(len(sequence.blocks), full):
            block = self._last_block(sequence).child(keys[index])
            if block.computing is sequence:
                block.computing = None
            self.pages.register(sequence.pages[index], block)
            sequence.blocks.append(block)

    def _enter(self, sequence: Sequence, page: int) -> None:
        self.entries.append((sequence.row, len(sequence.pages), page))
        sequence.pages.append(page)

    def _shares(self, sequence: Sequence) -> bool:
        return self.limits.prefix_cache or any(kind == GROUP for kind, _ in sequence.domain)

    def _pages_at_start(self, sequence: Sequence) -> int:
        tokens = len(sequence.tokens)
        if self.limits.reserve:  # the last drawn token is not stored
            tokens = max(tokens, sequence.prompt_length + sequence.limit - 1)
        return self.pages_for(tokens)

    def _findable(self, sequence: Sequence, stored: int) -> int:
        """Number of full blocks among its first `stored` tokens that others may find."""
        if not self._shares(sequence) or (self.limits.apart and not sequence.reuse):
            return 0
        if self.limits.boundary:
            stored = min(stored, sequence.prompt_length) // self.limits.boundary * self.limits.boundary
        return stored // self.limits.page_size

    def _claim(self, sequence: Sequence) -> None:
        """Claims the blocks of its tokens that it has not found and will compute."""
        full = self._findable(sequence, len(sequence.tokens))
        if not full:
            return
        node = self._last_block(sequence)
        for key in extend_keys(sequence, self.limits.page_size)[len(sequence.blocks) : full]:
            node = node.child(key)
            if not node.pages and node.computing is None:
                node.computing = sequence
                sequence.claims.append(node)

    def _last_block(self, sequence: Sequence) -> Block:
        return sequence.blocks[-1] if sequence.blocks else self._prefixes.root(sequence.domain)


def awaits(sequence: Sequence) -> bool:
    """Whether a block that a waiting sequence lacks is still to be computed by another."""
    return sequence.awaited is not None and _awaited(sequence, sequence.awaited)


def _is_cut(sequence: Sequence) -> bool:
    """Whether it continues a prefix that failed."""
    return bool(sequence.blocks) and sequence.blocks[-1].cut


def _awaited(sequence: Sequence, block: Block) -> bool:
    return block.computing is not None and not block.pages and block.computing.priority <= sequence.priority
