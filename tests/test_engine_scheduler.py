"""The scheduler against a model of the device, at random, and its interface."""

from __future__ import annotations

import dataclasses

import hypothesis
import pytest
from scheduler_cases import host, ids, planned, sequence, step_now
from scheduler_machine import SchedulerMachine, soak

from llama_jax.engine import prefixes
from llama_jax.engine.sequence import Sequence
from llama_jax.errors import DoesNotFit, LlamaJaxError, Overloaded, RequestError

SHORT = hypothesis.settings(max_examples=60, stateful_step_count=30, deadline=None)
LONG = hypothesis.settings(max_examples=120, stateful_step_count=80, deadline=None)


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
    soaked(range(1000, 1800))


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
    h = host(rows=2, pages=5, steps=4, prefix_cache=False)
    for id in range(2):
        h.add(sequence(id, 6, 6))
    assert ids(step_now(h)) == ([0, 1], [])
    step = step_now(h)  # four would need two pages, and one is free
    assert (step.steps, ids(step)) == (1, ([], [0, 1]))
    h.drain(60)


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
