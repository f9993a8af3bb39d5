"""The prefix tree, which identifies a page by its tokens and all those before them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as ListOf
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.engine.sequence import Domain, Sequence


class Block:
    """A full block of tokens after those of its parents: a node of the tree.

    A node is found by its parent and its own tokens, which a dict hashes (with the process's secret key) and compares.
    So different prefixes never share a node, whatever their hashes: with a chain of digests, a collision would silently
    return another prompt's keys and values.

    Attributes:
      parent: the preceding block; None for a root.
      key: of `block_key`; for a root its domain.
      pages: pages with keys and values of these tokens after that prefix; some may be duplicates.
      computing: a sequence with a row that will compute them.
      cut: whether the node was cut out of the tree (see `cut`).
    """

    __slots__ = ("children", "computing", "cut", "key", "pages", "parent")

    def __init__(self, parent: Block | None, key: Any):
        self.parent = parent
        self.key = key
        self.children: dict[Any, Block] = {}
        self.pages: list[int] = []
        self.computing: Sequence | None = None
        self.cut = False

    def child(self, key: Any) -> Block:
        """The child with this key, created if missing."""
        found = self.children.get(key)
        if found is None:
            found = self.children[key] = Block(self, key)
        return found

    def prune(self) -> None:
        """Removes the node from the tree if nothing needs it, then its parents likewise."""
        node = self
        while node.parent is not None and not node.pages and node.computing is None and not node.children:
            if node.parent.children.get(node.key) is node:
                del node.parent.children[node.key]
            node = node.parent


def cut(block: Block) -> list[Block]:
    """Removes a block and its subtree, even if in use, and returns them. Nobody waits for them any more."""
    taken, left = [], [block]
    while left:
        node = left.pop()
        node.cut, node.computing = True, None
        taken.append(node)
        left += node.children.values()
    if block.parent is not None and block.parent.children.get(block.key) is block:
        del block.parent.children[block.key]
        block.parent.prune()
    return taken


class Prefixes:
    """All blocks, by domain."""

    def __init__(self) -> None:
        self._top = Block(None, None)

    def root(self, domain: Domain) -> Block:
        """The empty prefix of a domain. Values of different types differ even if Python calls them equal (1 and True):
        clients may choose them."""
        return self._top.child(tuple((kind, type(value), value) for kind, value in domain))


def block_keys(tokens: ListOf[int], size: int) -> list[bytes]:
    """The exact tokens of each full block."""
    data, width = array("i", tokens).tobytes(), size * array("i").itemsize
    return [data[start : start + width] for start in range(0, len(data) - width + 1, width)]


def extend_keys(sequence: Sequence, size: int) -> list[bytes]:
    """The keys of a sequence's full blocks of `size` known tokens, extended for new ones."""
    keys, tokens = sequence.keys, sequence.tokens
    if (len(keys) + 1) * size <= len(tokens):
        keys += block_keys(tokens[len(keys) * size :], size)
    return keys


def find(root: Block, keys: ListOf[bytes]) -> tuple[list[Block], list[Block]]:
    """The blocks of a prefix: those held by pages, then those about to be computed."""
    found: list[Block] = []
    coming: list[Block] = []
    node = root
    for key in keys:
        child = node.children.get(key)
        if child is None:
            break
        if child.pages and not coming:
            found.append(child)
        elif child.computing is not None:
            coming.append(child)
        else:
            break
        node = child
    return found, coming
