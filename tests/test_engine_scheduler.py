"""The scheduler against a model of the device: at random, and case by case; cases name the public reports of others."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis
import pytest
from scheduler_host import Host
from scheduler_machine import SchedulerMachine, soak

from llama_jax.engine import prefixes
from llama_jax.engine.planner import PASSES
from llama_jax.engine.scheduler import Limits
from llama_jax.engine.sequence import GROUP, Phase, Sequence
from llama_jax.engine.steps import Step
from llama_jax.errors import DoesNotFit, LlamaJaxError, Overloaded, RequestError

SHORT = hypothesis.settings(max_examples=60, stateful_step_count=30, deadline=None)
LONG = hypothesis.settings(max_examples=3000, stateful_step_count=80, deadline=None)


class TestScheduler(SchedulerMachine.TestCase):
    settings = SHORT


@pytest.mark.slow
class TestSchedulerLonger(SchedulerMachine.TestCase):
    settings = LONG


def soaked(seeds: range) -> None:
    """Traffic by these seeds, of which enough has to meet what is worth meeting."""
    counts = [soak(seed).host.scheduler.counts for seed in seeds]
    assert sum(c.preemptions > 0 for c in counts) > len(seeds) / 6
    assert sum(c.prefix_hit_tokens > 0 for c in counts) > len(seeds) / 2


def test_traffic() -> None:
    soaked(range(150))


@pytest.mark.slow
def test_more_traffic() -> None:
    soaked(range(1000, 13000))


class SameHash(bytes):
    """A key whose hash is that of all others."""

    def __hash__(self) -> int:
        return 0


class CollidingMachine(SchedulerMachine):
    """Every block has the same hash (openvino.genai#3722: a collision gave another prompt's cache, silently)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        exact = prefixes.block_keys
        self.patch.setattr(prefixes, "block_keys", lambda tokens, size: list(map(SameHash, exact(tokens, size))))

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            self.patch.undo()


class TestCollisions(CollidingMachine.TestCase):
    settings = hypothesis.settings(SHORT, max_examples=15)


# --- Helpers


def host(ahead: int = 1, **changes: Any) -> Host:
    sizes: dict[str, Any] = {"rows": 4, "pages": 64, "page_size": 4, "pages_per_row": 64, "budget": 16, "chunk_rows": 4}
    return Host(Limits(**(sizes | changes)), ahead)


def sequence(id: int, prompt: int | list[int], limit: int = 4, **changes: Any) -> Sequence:
    """With a prompt of so many tokens, different from those of other sequences."""
    tokens = [id + 100] * prompt if isinstance(prompt, int) else list(prompt)
    return Sequence(id, tokens, len(tokens), limit, **changes)


def planned(step: Step | None) -> Step:
    assert step is not None
    return step


def ids(step: Step | None) -> tuple[list[int], list[int]]:
    """Whose prompts a step computes, and who decodes in it."""
    step = planned(step)
    return [chunk.sequence.id for chunk in step.chunks], [s.id for s in step.decoding]


def step_now(host: Host) -> Step:
    """Plans a step, and has all in flight end."""
    step = planned(host.schedule())
    while host.flights:
        host.deliver()
    host.audit()
    return step


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


# --- Failures of others, by the numbers of their threads


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
    assert step.leaving == (0,)
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


def test_pages_of_sequences_that_draw_no_more_are_coming_too() -> None:
    h = host(ahead=2, pages=4, rows=2, budget=8)
    h.add(sequence(0, 12, 4))
    h.add(sequence(1, 3, 2))
    h.schedule()
    h.schedule()
    assert h.schedule() is None
    assert h.scheduler.counts.preemptions == 0
    h.deliver()
    assert h.deliver() == [1]
    assert ids(h.schedule()) == ([], [0])
    h.drain(10)


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


# --- Order and fairness


def test_decoding_rows_first_then_prompts_under_way_then_new_ones() -> None:
    h = host(budget=8)
    h.add(sequence(0, 4, 8))
    step_now(h)
    h.add(sequence(1, 30, 1))
    h.add(sequence(2, 2, 1))
    step = step_now(h)
    assert ids(step) == ([1, 2], [0])
    assert [chunk.count for chunk in step.chunks] == [5, 2]  # half of 7, then what is left over
    step = step_now(h)
    assert [(chunk.sequence.id, chunk.count) for chunk in step.chunks] == [(1, 7)]


def test_short_prompts_do_not_wait_for_a_giant_and_it_ends_beside_endless_short_ones() -> None:
    h = host(budget=16, rows=4, pages=300, pages_per_row=300, prefix_cache=False)
    giant = h.add(sequence(0, 400, 1))
    arrived: dict[int, int] = {}
    id = 0
    while 0 in h.live:
        while len(h.live) < 8:
            id += 1
            h.add(sequence(id, 6, 2))
            arrived[id] = h.planned
        step_now(h)
        for done in h.done.keys() & arrived.keys():
            assert h.planned - arrived.pop(done) <= 12
        assert h.planned < 400 / 4
    assert giant.computed == 0
    assert giant.preemptions == 0
    assert id > 40
    h.drain(60)


def test_a_prompt_that_does_not_fit_is_passed_a_bounded_number_of_times() -> None:
    h = host(rows=4, pages=16, prefix_cache=False)
    h.add(sequence(0, 20, 40))
    step_now(h)
    step_now(h)
    big = h.add(sequence(1, 40, 1))  # 10 pages, which are not there before the first ends
    id, before = 1, 0
    while big.phase is Phase.WAITING:
        while len(h.live) < 6:
            id += 1
            h.add(sequence(id, 4, 1))
        joining = [j.sequence for j in step_now(h).joining]
        before += joining.index(big) if big in joining else len(joining)
        assert h.planned < 100
    assert before == PASSES
    h.drain(100)


def test_at_most_half_for_a_prompt_that_does_not_end_while_others_wait() -> None:
    h = host(budget=20, rows=1)
    h.add(sequence(0, 64, 1))
    assert [chunk.count for chunk in step_now(h).chunks] == [20]  # alone
    h = host(budget=20, rows=4)
    for id in range(3):
        h.add(sequence(id, 64, 1))
    assert [chunk.count for chunk in step_now(h).chunks] == [10 + 3, 5, 2]  # what is left over goes to nobody else


def test_one_place_is_left_for_prompts_that_end_at_once() -> None:
    h = host(budget=32, rows=8, chunk_rows=3)
    for id in range(4):
        h.add(sequence(id, 90, 1))
    h.add(sequence(9, 2, 1))
    assert ids(step_now(h))[0] == [0, 1, 9]
    h.drain(80)


def test_copies_and_equal_prefixes_are_computed_once() -> None:
    h = host(rows=256, pages=2048, page_size=16, pages_per_row=64, budget=1024, chunk_rows=64)
    prompt = [3] * 512
    for id in range(256):
        h.add(sequence(id, [*prompt, id], 2))
    h.drain(60)
    counts = h.scheduler.counts
    assert counts.prefix_hit_tokens == 255 * 512
    assert counts.planned_tokens == 512 + 256 + 256


def test_they_wait_no_longer_for_one_that_leaves() -> None:
    h = host(budget=8)
    h.add(sequence(0, [1] * 40, 1))
    second = h.add(sequence(1, [1] * 40, 1))
    step_now(h)
    step_now(h)
    assert second.row < 0
    h.cancel(0)
    (joining,) = step_now(h).joining
    assert joining.sequence is second
    assert joining.shared == 16
    h.drain(20)


def test_nobody_waits_for_one_that_is_less_urgent() -> None:
    h = host(budget=8)
    h.add(sequence(0, [1] * 40, 1, priority=1))
    step_now(h)
    h.add(sequence(1, [1] * 40, 1))
    assert 1 in ids(step_now(h))[0]
    h.drain(20)


# --- The prefix cache


def test_a_hit_leaves_a_token_to_compute() -> None:
    h = host()
    for id in range(2):
        h.add(sequence(id, [1] * 8, 1))
        h.drain(9)
    assert h.scheduler.counts.prefix_hit_tokens == 4


def test_the_end_of_a_prefix_is_given_up_before_its_beginning() -> None:
    h = host(pages=8, pages_per_row=8)
    h.add(sequence(0, [1] * 25, 1))
    h.drain(9)
    h.add(sequence(1, 20, 1))  # takes the 2 free pages, and 3 cached ones
    h.drain(9)
    h.add(sequence(2, [1] * 25, 1))
    assert [joining.shared for joining in step_now(h).joining] == [12]


def test_pages_that_are_found_are_not_counted_as_free() -> None:
    h = host(pages=8, pages_per_row=8)
    h.add(sequence(0, [1] * 13, 1))
    h.drain(9)
    running = h.add(sequence(1, 10, 3))  # 3 pages; of the other 5, 3 are found
    step_now(h)
    waits = h.add(sequence(2, [1] * 24, 1))  # and 3 are needed besides
    assert ids(step_now(h)) == ([], [1])
    while waits.phase is Phase.WAITING:
        step = step_now(h)
    assert running.id in h.done
    assert [joining.shared for joining in step.joining] == [12]
    h.drain(9)


def test_drawn_tokens_are_found() -> None:
    h = host()
    first = h.add(sequence(0, [1] * 5, 10))
    h.drain(20)
    h.add(sequence(1, [*first.tokens, 9], 1))
    assert [joining.shared for joining in step_now(h).joining] == [12]  # 14 are stored: not the token drawn last
    h.audit_contents()


def test_the_token_drawn_last_is_not_stored() -> None:
    """A row that the device has ended stores nothing for the step that was planned in the meantime."""
    h = host(ahead=1)
    first = h.add(sequence(0, [1] * 6, 10), stop=2)  # 8 tokens: the last one would fill a page
    h.schedule()
    h.schedule()
    h.schedule() if len(h.flights) < 2 else None
    h.drain(9)
    assert len(first.tokens) == 8
    h.add(sequence(1, [*first.tokens, 9], 1))
    assert [joining.shared for joining in step_now(h).joining] == [4]


def test_without_reuse_the_whole_prompt_is_computed_and_still_serves_others() -> None:
    h = host()
    h.add(sequence(0, [1] * 9, 1))
    h.drain(9)
    h.add(sequence(1, [1] * 17, 1, reuse=False))
    (chunk,) = step_now(h).chunks
    assert (chunk.start, chunk.count) == (0, 16)
    h.drain(9)
    h.add(sequence(2, [1] * 17, 1))
    assert [joining.shared for joining in step_now(h).joining] == [16]


def test_without_a_cache_only_copies_share() -> None:
    h = host(prefix_cache=False)
    for id in range(4):
        h.add(sequence(id, [1] * 9, 1, domain=((GROUP, id // 2),)))
    h.add(sequence(4, [1] * 9, 1))
    h.drain(20)
    assert h.scheduler.counts.prefix_hit_tokens == 2 * 8
    h.add(sequence(5, [1] * 9, 1))
    assert [joining.shared for joining in step_now(h).joining] == [0]


def test_what_failed_is_not_found() -> None:
    h = host()
    h.add(sequence(0, [1] * 8 + [2], 1))
    h.drain(9)
    h.add(sequence(1, [1] * 8 + [3] * 8, 4))
    step_now(h)
    h.end(1, keep=False)
    h.audit()
    h.add(sequence(2, [1] * 8 + [3] * 9, 1))
    assert [joining.shared for joining in step_now(h).joining] == [8]  # the first one's


def test_boundaries() -> None:
    h = host(rows=2, budget=33, boundary=16, pages_per_row=32)
    h.add(sequence(0, [1] * 60, 1))
    starts = []
    while h.live:
        starts += [(chunk.start, chunk.count) for chunk in step_now(h).chunks]
    assert starts == [(0, 32), (32, 28)]
    h.add(sequence(1, [1] * 60, 1))
    assert [joining.shared for joining in step_now(h).joining] == [48]


# --- Steps of one dispatch


def test_several_steps_while_nothing_waits() -> None:
    h = host(rows=2, steps=8)
    first = h.add(sequence(0, 4, 11))
    assert step_now(h).steps == 1
    step = step_now(h)
    assert step.steps == 8
    assert first.drawn == 9
    assert [page[:2] for page in step.pages] == [(0, 1), (0, 2)]  # positions 4 to 11
    h.add(sequence(1, 4, 3))
    step = step_now(h)
    assert (step.steps, ids(step)) == (1, ([1], [0]))
    step = step_now(h)  # each draws what it may: one, and two
    assert (step.steps, ids(step)) == (2, ([], [0, 1]))
    assert not h.live


def test_one_step_rather_than_a_preemption() -> None:
    h = host(rows=2, pages=4, steps=4, prefix_cache=False)
    for id in range(2):
        h.add(sequence(id, 6, 6))
    step_now(h)
    assert step_now(h).steps == 1
    assert h.scheduler.counts.preemptions == 0


# --- The rest of the interface


def test_a_prompt_alone() -> None:
    h = host(budget=8)
    h.add(sequence(0, 12, 0))
    assert not any(chunk.draws for _ in range(2) for chunk in planned(h.schedule()).chunks)
    assert h.schedule() is None
    h.deliver()
    assert h.deliver() == [0]


def test_one_that_has_drawn_elsewhere_goes_on() -> None:
    h = host()
    h.add(Sequence(0, [1, 1, 1, 0, 0], 3, 4))
    assert [chunk.count for chunk in planned(h.schedule()).chunks] == [5]
    h.scheduler.drawn(0, [1])
    assert [s.id for s in planned(h.schedule()).decoding] == [0]
    assert h.schedule() is None


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (sequence(0, 60, 5), DoesNotFit, "60 tokens and 5 new ones do not fit into the 64"),
        (sequence(0, 0, 5), RequestError, "prompt_length"),
        (Sequence(0, [1, 2], 3, 5), RequestError, "prompt_length"),
        (sequence(0, 3, -1), RequestError, "limit"),
        (Sequence(0, [1, 2, 3], 1, 2), RequestError, "limit"),
        (sequence(7, 3), RequestError, "id"),
    ],
    ids=["too-long", "empty", "prompt", "limit", "drawn", "id"],
)
def test_add_refuses(bad: Sequence, error: type[LlamaJaxError], says: str) -> None:
    h = host(pages=16)
    h.add(sequence(7, 3))
    with pytest.raises(error) as e:
        h.scheduler.add(bad)
    assert says in f"{getattr(e.value, 'param', '')} {e.value}"
    assert h.scheduler.counts.waiting == 1


def test_too_many_wait() -> None:
    h = host(rows=1, waiting=2)
    for id in range(2):
        h.add(sequence(id, 3))
    with pytest.raises(Overloaded, match="2 requests wait already"):
        h.scheduler.add(sequence(2, 3))
    step_now(h)
    h.add(sequence(2, 3))
    h.drain(40)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"rows": 0}, "rows"),
        ({"pages": 0}, "pages"),
        ({"steps": 0}, "steps"),
        ({"budget": 3}, "budget"),
        ({"boundary": 6}, "boundary"),
        ({"boundary": 16}, "budget"),
        ({"waiting": -1}, "waiting"),
    ],
)
def test_limits_out_of_range(changes: dict[str, int], param: str) -> None:
    with pytest.raises(RequestError) as e:
        dataclasses.replace(host().limits, **changes)
    assert e.value.param == param


def test_more_tokens_than_were_drawn() -> None:
    h = host()
    h.add(sequence(0, 3))
    h.schedule()
    with pytest.raises(LlamaJaxError, match="more tokens than its steps draw"):
        h.scheduler.drawn(0, [1, 1])


def test_counts() -> None:
    h = host(rows=1)
    h.add(sequence(0, 10, 3))
    h.add(sequence(1, 5, 1))
    h.schedule()
    h.schedule()
    counts = h.scheduler.counts
    assert (counts.running, counts.waiting) == (1, 1)
    assert (counts.pages_used, counts.pages_free, counts.pages_cached, counts.pages_fenced) == (3, 61, 0, 0)
    assert (counts.prompt_tokens, counts.prefix_hit_tokens, counts.planned_tokens) == (10, 0, 11)
    h.cancel(0)
    assert h.scheduler.counts.pages_fenced == 3
    h.deliver()
    h.deliver()
    counts = h.scheduler.counts
    assert (counts.pages_free, counts.pages_cached, counts.pages_fenced) == (62, 2, 0)


@pytest.fixture
def in_flight() -> Host:
    h = host(rows=2)
    for id in range(3):
        h.add(sequence(id, 6, 6))
    for _ in range(3):
        h.schedule()
    h.deliver()
    return h


def test_a_lost_device_starts_again_with_what_is_known(in_flight: Host) -> None:
    h = in_flight
    before = {id: list(s.tokens) for id, s in h.live.items()}
    h.lose_device()
    h.audit()
    counts = h.scheduler.counts
    assert (counts.running, counts.waiting, counts.pages_free) == (0, 3, 64)
    assert {id: s.tokens for id, s in h.live.items()} == before
    assert [joining.sequence.id for joining in planned(h.schedule()).joining] == [0, 1]
    h.drain(60)
    assert all(len(s.tokens) == 12 for s in h.done.values())
