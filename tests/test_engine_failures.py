"""Faults of other schedulers, case by case; each names the public report."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from scheduler_cases import host, ids, planned, sequence, step_now
from scheduler_host import Host

from llama_jax.engine.sequence import Phase, Sequence


def one_for_another(ahead: int = 1, *, known: bool, **changes: Any) -> tuple[Host, Sequence, Sequence]:
    """The first of two sequences needs a page in the third step, and the second one has the last of 4.

    Args:
      known: whether the two steps before have ended.
    """
    h = host(ahead, **{"pages": 4, "rows": 2, "budget": 8} | changes)
    first, second = h.add(sequence(0, 12, 4)), h.add(sequence(1, 3, 8))
    for expected in (([0, 1], []), ([0], [1])):
        assert ids(h.schedule()) == expected
        if known:
            h.deliver()
    return h, first, second


def preempted(h: Host, victim: Sequence) -> None:
    while victim.phase is not Phase.WAITING:
        h.schedule()
        if h.flights:
            h.deliver()
    assert victim.preemptions


def test_tokens_in_flight_survive_a_preemption() -> None:
    """vllm#48245: the count of tokens in flight went below zero, or one of them was dropped."""
    h, first, second = one_for_another(known=False)
    assert h.schedule() is None  # the second one's page waits for the steps in flight
    assert second.phase is Phase.WAITING
    assert (second.drawn, len(second.tokens)) == (2, 3)
    h.drain(60)
    assert (first.preemptions, second.preemptions) == (0, 1)
    assert len(second.tokens) == 3 + 8


def test_it_comes_back_only_when_its_tokens_are_known() -> None:
    """vllm#46899: places of tokens that were not known went into the next prompt as ids of -1."""
    h, _, second = one_for_another(ahead=2, known=False)
    assert h.schedule() is None
    h.cancel(0)
    h.scheduler.ended(h.planned)  # all pages are there
    assert h.scheduler.schedule() is None
    h.scheduler.drawn(1, [1])
    assert h.scheduler.schedule() is None
    h.scheduler.drawn(1, [0])
    (chunk,) = planned(h.scheduler.schedule()).chunks
    assert (second.tokens, chunk.start, chunk.count) == ([101, 101, 101, 1, 0], 0, 5)


def test_a_preempted_sequence_is_computed_again_in_chunks() -> None:
    """vllm#57562: only the last chunk of what is computed again draws."""
    h, _, second = one_for_another(known=True, budget=8)
    preempted(h, second)
    h.limits = h.scheduler.limits = h.scheduler._planner.limits = dataclasses.replace(h.limits, budget=2)
    chunks = []
    while second.phase is not Phase.DECODING:
        chunks += [(chunk.start, chunk.count, chunk.draws) for chunk in step_now(h).chunks]
    assert chunks == [(0, 2, False), (2, 2, False), (4, 1, True)]
    h.drain(60)


def test_no_ids_are_lost_to_a_preemption() -> None:
    """vllm#28787: what it had drawn before was missing from what was computed again."""
    h, _, second = one_for_another(known=True)
    preempted(h, second)
    assert len(second.tokens) == 3 + 2
    before = list(second.tokens)
    while second.phase is Phase.WAITING:
        planned(h.schedule())
        computed = h.flights[-1].tokens.get(1)
        h.deliver()
    assert computed == before
    h.drain(60)


def test_pages_of_an_ended_row_wait_for_the_steps_that_still_write_them() -> None:
    """tpu-inference#3449: a row that the host had ended wrote into pages that had another owner by then."""
    h = host(pages=4, rows=2, prefix_cache=False)
    h.add(sequence(0, 12, 4))
    h.schedule()
    h.schedule()  # in flight, and writes position 12
    h.cancel(0)
    assert h.scheduler.counts.pages_fenced == 4
    h.add(sequence(1, 12, 4))
    assert h.schedule() is None
    h.deliver()
    assert h.schedule() is None
    h.deliver()
    assert h.scheduler.counts.pages_free == 4
    step = planned(h.schedule())
    assert [joining.row for joining in step.joining] == [0]


def test_pages_of_a_preempted_row_wait_too() -> None:
    """vllm-ascend#13501: pages that a running sequence had given up were handed out under a step in flight."""
    h, first, second = one_for_another(known=False)
    (page,) = second.pages
    for _ in range(2):
        assert h.schedule() is None
        assert second.pages == []
        assert h.scheduler.counts.pages_fenced == 1
        h.deliver()
    assert planned(h.schedule()).pages == ((first.row, 3, page),)


def test_nothing_is_freed_twice() -> None:
    """sgl-jax#982: two places held the length of what is shared, and its pages were freed twice."""
    h = host()
    shared = [7] * 8
    for id in range(3):
        h.add(sequence(id, [*shared, id], 4))
    step_now(h)
    step_now(h)
    assert h.scheduler.counts.pages_used == 2 + 3
    for id in (1, 1, 0, 1):
        h.cancel(id)
        h.scheduler.finish(id)
        h.audit()
    assert h.scheduler.counts.pages_used == 3
    h.cancel(2)
    assert h.scheduler.counts.pages_used == 0


@pytest.mark.parametrize("other", [(("salt", "a"),), (("adapter", "b"),), (), (("adapter", "a"), ("salt", "a"))])
def test_domains_do_not_mix(other: tuple[tuple[str, str], ...]) -> None:
    """vllm#44701: an adapter and a salt of the same name gave the same key."""
    h = host()
    prompt = [1] * 9
    h.add(sequence(0, prompt, 1, domain=(("adapter", "a"),)))
    h.drain(9)
    h.add(sequence(1, prompt, 1, domain=other))
    assert [joining.shared for joining in step_now(h).joining] == [0]
    h.add(sequence(2, prompt, 1, domain=(("adapter", "a"),)))
    assert [joining.shared for joining in step_now(h).joining] == [8]


def test_those_that_wait_for_a_prefix_take_no_row() -> None:
    """vllm#53130: sequences that were put off counted as running, and nobody was admitted ever again."""
    h = host(rows=2, budget=8, chunk_rows=2)
    h.add(sequence(0, [5] * 40, 1))
    for id in range(1, 6):
        h.add(sequence(id, [*[5] * 36, id], 1))
    h.add(sequence(9, 3, 1))
    assert ids(h.schedule()) == ([0, 9], [])
    assert h.scheduler.counts.running == 2
    h.drain(40)
    assert h.scheduler.counts.prefix_hit_tokens == 5 * 36


def test_no_second_preemption_while_pages_are_coming() -> None:
    """vllm-ascend#16315: one victim after the other was taken before the first one's pages had come free."""
    h = host(ahead=4, pages=7, rows=3, budget=14)
    running = [h.add(sequence(id, prompt, limit)) for id, (prompt, limit) in enumerate([(16, 4), (4, 9), (3, 9)])]
    assert ids(h.schedule()) == ([0, 1, 2], [])
    assert ids(h.schedule()) == ([0], [1, 2])
    for _ in range(3):  # the steps in flight do not end: the first waits for the page of the last, and takes no other
        assert ids(h.schedule()) == ([], [1])
        assert [s.preemptions for s in running] == [0, 0, 1]
    assert h.scheduler.counts.pages_fenced == 1
    h.drain(60)


def test_pages_that_are_coming_are_not_counted_twice() -> None:
    """Two rows lack a page in the same step, and one victim has one page: the second row takes another victim."""
    h = host(pages=11, budget=16, prefix_cache=False)
    for id, prompt in enumerate((11, 12, 3, 3)):
        h.add(sequence(id, prompt, 12))
    while not h.scheduler.counts.preemptions:
        h.schedule()
        if len(h.flights) > 1:
            h.deliver()
    assert [s.id for s in h.live.values() if s.preemptions] == [2, 3]
    h.drain(100)


@pytest.mark.parametrize(("priority", "victim"), [(0, 2), (1, 1)])
def test_the_victim_is_the_least_urgent_of_all_that_run(priority: int, victim: int) -> None:
    h = host(pages=16, budget=4, prefix_cache=False)
    h.add(sequence(0, 12, 20))
    while h.live[0].phase is not Phase.DECODING:
        step_now(h)
    prompt = h.add(sequence(1, 40, 1, priority=priority))
    step_now(h)
    h.add(sequence(2, 3, 9))
    while not h.scheduler.counts.preemptions:
        assert prompt.phase is Phase.PROMPT
        step_now(h)
    assert [s.id for s in h.live.values() if s.preemptions] == [victim]
    h.drain(100)


def test_pages_of_sequences_that_draw_no_more_are_coming_too() -> None:
    h = host(ahead=2, pages=7, rows=3, budget=14)
    for id, (prompt, limit) in enumerate([(16, 4), (4, 2), (3, 9)]):
        h.add(sequence(id, prompt, limit))
    assert ids(h.schedule()) == ([0, 1, 2], [])
    assert ids(h.schedule()) == ([0], [1, 2])
    assert h.schedule() is None  # the first and the last lack a page, and the second is about to give back two
    assert h.scheduler.counts.preemptions == 0
    h.deliver()
    assert h.deliver() == [1]
    assert ids(h.schedule()) == ([], [0, 2])
    h.drain(60)


def test_preempted_go_before_new_ones() -> None:
    """vllm#41951: one that had lost its pages queued behind those that had come earlier and never run."""
    h = host(pages=4, rows=2, budget=8)
    h.add(sequence(0, 12, 4))
    h.add(sequence(2, 13, 1))  # does not fit beside it, the next one does
    victim = h.add(sequence(1, 3, 8))
    order: list[int] = []
    while h.live:
        h.schedule()
        order += [joining.sequence.id for joining in h.flights[-1].step.joining] if h.flights else []
        h.deliver() if h.flights else None
    assert order == [0, 1, 1, 2]
    assert victim.preemptions == 1


@pytest.mark.parametrize("full", ["rows", "pages", "prompts"])
def test_a_lower_priority_makes_way(full: str) -> None:
    """vllm#45561: with all rows taken, an urgent request waited for those that were not."""
    rows, pages, chunk_rows = (2, 64, 4) if full == "rows" else (4, 12, 4) if full == "pages" else (4, 64, 2)
    h = host(rows=rows, pages=pages, chunk_rows=chunk_rows, prefix_cache=False)
    prompt = 20 if full != "prompts" else 60
    for id, priority in ((0, 1), (1, 2)):
        h.add(sequence(id, prompt, 4, priority=priority))
    step_now(h)
    while full != "prompts" and h.live[1].phase is not Phase.DECODING:
        step_now(h)
    urgent = h.add(sequence(2, 20, 2))
    for _ in range(2):
        step_now(h)
        if urgent.row >= 0:
            break
    assert urgent.row >= 0
    victims = [s.id for s in h.live.values() if s.preemptions]
    assert victims == ([0] if full == "prompts" else [1])
    h.drain(80)


def test_an_equal_priority_does_not_make_way() -> None:
    h = host(rows=1)
    h.add(sequence(0, 4, 8, priority=1))
    step_now(h)
    h.add(sequence(1, 4, 1, priority=1))
    h.drain(40)
    assert h.scheduler.counts.preemptions == 0


def test_nobody_is_preempted_for_one_that_would_not_fit_even_then() -> None:
    h = host(rows=3, pages=8, prefix_cache=False)
    h.add(sequence(0, 20, 8, priority=0))
    step_now(h)
    step_now(h)
    h.add(sequence(1, 4, 8, priority=5))
    step_now(h)
    h.add(sequence(2, 28, 1, priority=0))
    step_now(h)
    assert h.scheduler.counts.preemptions == 0
    h.drain(60)


@pytest.mark.parametrize("phase", list(Phase))
def test_cancel_in_any_phase(phase: Phase) -> None:
    """LMCache#3688: a cancellation in the wrong moment ended the engine."""
    h = host(rows=2, chunk_rows=2)
    other = h.add(sequence(0, 4, 30))
    step_now(h)
    limit = 1 if phase is Phase.COMPLETE else 20
    victim = h.add(sequence(1, 3 if phase in (Phase.DECODING, Phase.COMPLETE) else 40, limit))
    if phase is not Phase.WAITING:
        h.schedule()
    assert victim.phase is phase
    tokens, before = len(other.tokens), other.row
    for _ in range(2):
        h.cancel(1)
        h.audit()
    assert other.row == before
    step_now(h)
    step_now(h)
    assert len(other.tokens) == tokens + 2 + (phase is not Phase.WAITING)
    assert h.scheduler.counts.running == 1
    assert h.scheduler.counts.pages_fenced == 0
    h.drain(60)


def test_cancelling_one_that_waits_touches_no_other() -> None:
    """ik_llama.cpp#1929: cancelling a queued request ended the one that ran."""
    h = host(rows=1)
    running = h.add(sequence(0, 4, 8))
    h.add(sequence(1, 4, 8))
    step_now(h)
    h.cancel(1)
    h.cancel(77)
    assert ids(h.schedule()) == ([], [0])
    assert running.row == 0
    h.drain(20)
    assert len(running.tokens) == 12
