"""Which page is handed out next, what can be found again, and the tree that finds it."""

from __future__ import annotations

import pytest

from llama_jax.engine.pages import Pages
from llama_jax.engine.prefixes import Block, Prefixes, block_keys, cut, find


def chain(prefixes: Prefixes, *blocks: list[int]) -> list[Block]:
    node, nodes = prefixes.root(()), []
    for tokens in blocks:
        node = node.child(*block_keys(tokens, len(tokens)))
        nodes.append(node)
    return nodes


def test_free_pages_are_taken_in_the_order_in_which_they_came_free() -> None:
    """The page freed last is the one that a step in flight may still write."""
    pages = Pages(4)
    assert [pages.take() for _ in range(4)] == [0, 1, 2, 3]
    for page in (2, 0, 3, 1):
        pages.release(page, fence=0)
    assert [pages.take() for _ in range(4)] == [2, 0, 3, 1]


def test_the_fence() -> None:
    pages = Pages(2)
    first, second = pages.take(), pages.take()
    pages.release(first, fence=3)
    pages.release(second, fence=4)
    for ended, available in ((0, 0), (2, 0), (3, 1), (3, 1), (4, 2)):
        pages.ended(ended)
        assert (pages.available, pages.fenced) == (available, 2 - available)
    taken = pages.take()
    pages.release(taken, fence=4)  # that step has ended already
    assert pages.available == 2


def test_cached_pages_are_taken_last_and_the_end_of_a_prefix_before_its_beginning() -> None:
    pages, prefixes = Pages(4), Prefixes()
    head, tail = chain(prefixes, [1, 2], [3, 4])
    a, b, c, d = (pages.take() for _ in range(4))
    pages.register(a, head)
    pages.register(b, tail)
    for page in (c, b, a, d):
        pages.release(page, fence=0)
    assert (pages.free, pages.cached, pages.used) == (2, 2, 0)
    assert [pages.take(), pages.take()] == [c, d]
    assert find(prefixes.root(()), [head.key, tail.key])[0] == [head, tail]
    assert pages.take() == b
    assert find(prefixes.root(()), [head.key, tail.key])[0] == [head]
    assert pages.take() == a
    assert not prefixes.root(()).children


def test_a_page_that_is_found_is_used_again_also_behind_the_fence() -> None:
    pages, prefixes = Pages(2), Prefixes()
    (block,) = chain(prefixes, [1])
    page = pages.take()
    pages.register(page, block)
    pages.release(page, fence=9)
    pages.share(page)
    assert (pages.users(page), pages.fenced, pages.used) == (1, 0, 1)
    pages.ended(9)
    assert pages.users(page) == 1
    pages.share(page)
    pages.release(page, fence=9)
    pages.release(page, fence=9)
    assert (pages.free, pages.cached, pages.used) == (1, 1, 0)


def test_what_is_cut_out_of_the_tree_is_free() -> None:
    pages, prefixes = Pages(3), Prefixes()
    head, tail = chain(prefixes, [1], [2])
    used, cached, behind = pages.take(), pages.take(), pages.take()
    pages.register(used, head)
    pages.register(cached, head)
    pages.register(behind, tail)
    pages.release(cached, fence=0)
    pages.release(behind, fence=9)
    assert (pages.free, pages.cached, pages.fenced) == (0, 1, 1)
    assert [pages.forget(block) for block in cut(head)] == [[used, cached], [behind]]
    assert (pages.free, pages.cached, pages.fenced) == (1, 0, 1)
    assert not prefixes._top.children
    pages.release(used, fence=0)
    pages.ended(9)
    assert (pages.free, pages.cached) == (3, 0)


def test_the_tree_keeps_only_what_is_needed() -> None:
    prefixes = Prefixes()
    head, tail = chain(prefixes, [1], [2])
    tail.pages.append(5)
    head.prune()
    assert prefixes.root(()).children == {head.key: head}
    tail.pages.clear()
    tail.prune()
    assert not prefixes._top.children


def test_a_node_out_of_the_tree_takes_no_other_with_it() -> None:
    """A prefix that was forgotten and computed again is another node."""
    prefixes = Prefixes()
    (old,) = chain(prefixes, [1])
    old.prune()
    (new,) = chain(prefixes, [1])
    new.pages.append(0)
    old.prune()
    assert find(prefixes.root(()), [new.key])[0] == [new]


@pytest.mark.parametrize("other", [(("a", True),), (("a", 1.0),), (("a", "1"),), (("b", 1),), (("a", 1), ("b", 1)), ()])
def test_domains_are_typed(other: tuple) -> None:
    prefixes = Prefixes()
    assert prefixes.root((("a", 1),)) is not prefixes.root(other)
    assert prefixes.root((("a", 1),)) is prefixes.root((("a", 1),))
