"""Traffic for the scheduler: everything that may happen to it, at random, and as a state machine."""

from __future__ import annotations

from random import Random

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from scheduler_device import VOCABULARY
from scheduler_host import Host

from llama_jax.engine.limits import Limits
from llama_jax.engine.sequence import GROUP, Sequence


def some_limits(random: Random) -> Limits:
    """Small ones, so that everything runs short."""
    size, rows, pages = random.randint(1, 4), random.randint(1, 5), random.randint(4, 16)
    boundary = random.choice([None, None, size, 2 * size])
    apart, reserve = random.random() < 0.3, random.random() < 0.3
    return Limits(
        rows=rows,
        pages=pages,
        page_size=size,
        pages_per_row=random.randint(4, pages),
        budget=(0 if apart else rows - 1) + (boundary or 1) + random.randint(0, 16),
        chunk_rows=random.randint(1, 4),
        steps=random.choice([1, 1, 2, 5]),
        draft_rows=random.choice([0, 0, 1, 3]),
        boundary=boundary,
        apart=apart,
        reserve=reserve,
        prefix_cache=random.random() < 0.7,
    )


class Traffic:
    """Everything that may happen to a scheduler, at random.

    Attributes:
      ids: sequences so far; work: their tokens.
    """

    def __init__(self, random: Random):
        self.host = Host(some_limits(random), ahead=random.randint(0, 2))
        self.ids = self.work = 0
        for _ in range(random.randint(1, 6)):
            self.add(random)

    def add(self, random: Random) -> None:
        host, capacity = self.host, self.host.limits.capacity
        others = [*host.live.values(), *host.done.values()][-12:]
        head = random.choice(others).tokens if others and random.random() < 0.8 else []  # what another has or had
        tail = [random.randrange(VOCABULARY) for _ in range(random.randint(1, 8))]
        prompt = (head[: random.randint(0, len(head))] + tail)[: random.randint(1, capacity)]
        limit = min(random.choice([0, 1, 3, 8, 20, 40]), capacity - len(prompt))
        domain = random.choice([(), (), (), (("adapter", 1),), (("salt", 1),), (("salt", True),)])
        copies = random.choice([1, 1, 1, 4])
        if copies > 1:
            domain = (*domain, (GROUP, self.ids))
        reuse, priority = random.random() < 0.9, random.choice([0, 0, 0, 0, 1, -1])
        paced = random.random() < 0.3
        for _ in range(copies):
            never = 10**9
            stops = random.choice([never, never, 2, 5]), random.choice([never, never, never, 1, 4])
            sequence = Sequence(self.ids, list(prompt), len(prompt), limit, priority, domain, reuse, paced)
            host.add(sequence, stop=stops[0], host_stop=stops[1])
            self.ids += 1
            self.work += len(prompt) + limit

    def schedule(self) -> None:
        host = self.host
        if len(host.flights) <= host.ahead and host.schedule() is None and not host.flights:
            assert not host.live

    def deliver(self) -> None:
        if self.host.flights:
            self.host.deliver()

    def cancel(self, random: Random) -> None:
        if self.host.live:
            id = random.choice(sorted(self.host.live))
            self.host.cancel(id)
            self.host.cancel(id)

    def fail(self, random: Random) -> None:
        """The logits of one were no numbers: nobody may find what it has computed."""
        if self.host.live:
            id = random.choice(sorted(self.host.live))
            sequence = self.host.live[id]
            own = set(sequence.pages[sequence.cached // self.host.limits.page_size :])
            bad, owners = set(self.host.end(id, keep=False)), self.host.owners()
            assert bad >= own - owners.keys()
            assert not bad & owners.keys()
            found = {page for block in self.host.blocks() for page in block.pages}
            assert not (own | bad) & found

    def run(self, random: Random) -> None:
        """Some steps, as an engine takes them."""
        for _ in range(random.randint(1, 12)):
            self.schedule()
            if len(self.host.flights) > self.host.ahead or random.random() < 0.1:
                self.deliver()

    def close(self) -> None:
        """No more come: all end, in a bounded number of steps, and every page comes back."""
        host = self.host
        host.drain(bound=50 + 30 * self.work)
        host.audit()
        host.audit_contents()
        counts = host.scheduler.counts
        assert counts.pages_free + counts.pages_cached == host.limits.pages
        assert counts.running == counts.waiting == 0
        assert not (host.limits.reserve and counts.preemptions)


def soak(seed: int) -> Traffic:
    """One run of traffic: many seeds see more of it than hypothesis does, which likes to repeat itself."""
    random = Random(seed)
    traffic = Traffic(random)
    kinds = [traffic.add, traffic.run, traffic.cancel, traffic.fail]
    for _ in range(random.randint(5, 30)):
        (happens,) = random.choices(kinds, [30, 60, 8, 2])
        happens(random)
        traffic.host.audit()
    traffic.close()
    return traffic


SEEDS = st.integers(0, 2**32 - 1).map(Random)


class SchedulerMachine(RuleBasedStateMachine):
    """Traffic in any order."""

    @initialize(random=SEEDS)
    def start(self, random: Random) -> None:
        self.traffic = Traffic(random)

    @rule(random=SEEDS)
    def add(self, random: Random) -> None:
        self.traffic.add(random)

    @rule()
    def schedule(self) -> None:
        self.traffic.schedule()

    @rule()
    def deliver(self) -> None:
        self.traffic.deliver()

    @rule(random=SEEDS)
    def run(self, random: Random) -> None:
        self.traffic.run(random)

    @rule(random=SEEDS)
    def cancel(self, random: Random) -> None:
        self.traffic.cancel(random)

    @rule(random=SEEDS)
    def fail(self, random: Random) -> None:
        self.traffic.fail(random)

    @invariant()
    def books(self) -> None:
        if hasattr(self, "traffic"):
            self.traffic.host.audit()

    def teardown(self) -> None:
        if hasattr(self, "traffic"):
            self.traffic.close()
