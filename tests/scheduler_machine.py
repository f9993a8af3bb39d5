"""A model of the device for the scheduler's tests, and a state machine that tries everything that may happen.

A slot of the device's cache holds, in place of a key, which tokens it belongs to: a number for the whole prefix and its
domain. Every token that is computed reads the slots of all before it and finds its own prefix there, or the scheduler
has shared, overwritten or lost something. What is drawn depends on the sequence and the count alone, so preemption may
not change it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llama_jax.engine.limits import Limits
from llama_jax.engine.prefixes import Block
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.sequence import GROUP, Phase, Sequence
from llama_jax.engine.steps import Step

VOCABULARY = 2


def draw(id: int, count: int) -> int:
    """The token that a sequence draws when it has `count` tokens."""
    return (id * 31 + count * 17 + id * count // 3) % VOCABULARY


@dataclass
class Row:
    """A row of the device; `prefix` numbers the tokens that it has computed."""

    sequence: Sequence
    length: int
    drawn: int
    stop: int
    prefix: list[int]
    last: int | None = None
    ended: bool = False


@dataclass(frozen=True)
class Dispatch:
    """A step with the tokens as they were known when it was dispatched, and who draws how many at most."""

    step: Step
    tokens: dict[int, list[int]]
    lengths: dict[int, int]


@dataclass(frozen=True)
class Report:
    """What a row has drawn in a step, and whether it has ended by itself."""

    id: int
    tokens: list[int]
    ended: bool


class Device:
    """Executes steps in order.

    Args:
      stops: at how many tokens a sequence draws its stop token, by id.
    """

    def __init__(self, limits: Limits, stops: dict[int, int]):
        self.limits, self.stops = limits, stops
        self.slots: dict[tuple[int, int], int] = {}
        self.table: dict[tuple[int, int], int] = {}
        self.rows: dict[int, Row] = {}
        self._numbers: dict[Any, int] = {}

    def number(self, before: Any, token: int) -> int:
        """The number of a prefix: of what comes before it, a number or a domain, and its last token."""
        return self._numbers.setdefault((before, token), len(self._numbers))

    def prefix(self, sequence: Sequence, tokens: list[int]) -> list[int]:
        numbers: list[int] = []
        for token in tokens:
            numbers.append(self.number(numbers[-1] if numbers else sequence.domain, token))
        return numbers

    def execute(self, dispatch: Dispatch) -> list[Report]:
        step = dispatch.step
        for row in step.leaving:
            del self.rows[row]
            self.table = {key: page for key, page in self.table.items() if key[0] != row}
        for joining in step.joining:
            assert joining.row not in self.rows
            length = dispatch.lengths[joining.sequence.id]
            drawn = length - joining.sequence.prompt_length
            known = self.prefix(joining.sequence, joining.sequence.tokens[: joining.shared])
            stop = self.stops[joining.sequence.id]
            self.rows[joining.row] = Row(joining.sequence, length, drawn, stop, known)
        for row, index, page in step.pages:
            self.table[row, index] = page
        reports: list[Report] = []
        stored: list[tuple[Row, int, int]] = []
        for chunk in step.chunks:
            row = self.rows[chunk.row]
            assert row.sequence is chunk.sequence
            assert len(row.prefix) == chunk.start
            stored += self._store(chunk.row, dispatch.tokens[chunk.sequence.id])
        numbers = {row.sequence: number for number, row in self.rows.items()}
        decoding = [numbers[sequence] for sequence in step.decoding]
        drawn: dict[int, list[int]] = {number: [] for number in decoding}
        for _ in range(step.steps):
            for number in decoding:
                row = self.rows[number]
                if not row.ended:
                    assert row.last is not None
                    stored += self._store(number, [row.last])
            for row, number, at in stored:  # all is stored before anything is read
                self._read(row, number, at)
            for number in decoding:
                if not self.rows[number].ended:
                    drawn[number] += self._draw(self.rows[number])
            stored = []
        for chunk in step.chunks:
            row = self.rows[chunk.row]
            if chunk.draws:
                assert len(row.prefix) == row.length
                reports.append(Report(row.sequence.id, self._draw(row), row.ended))
            elif row.sequence.limit == 0 and len(row.prefix) == row.length:
                row.ended = True
                reports.append(Report(row.sequence.id, [], True))
        reports += [Report(self.rows[n].sequence.id, drawn[n], self.rows[n].ended) for n in decoding]
        return reports

    def _store(self, number: int, tokens: list[int]) -> list[tuple[Row, int, int]]:
        """Stores keys; gives (row, its number, position) of each token for `_read`."""
        row, found = self.rows[number], []
        for token in tokens:
            at = len(row.prefix)
            row.prefix.append(self.number(row.prefix[-1] if row.prefix else row.sequence.domain, token))
            page, offset = self.table[number, at // self.limits.page_size], at % self.limits.page_size
            self.slots[page, offset] = row.prefix[-1]
            found.append((row, number, at))
        return found

    def _read(self, row: Row, number: int, at: int) -> None:
        for i in range(at + 1):
            slot = self.table[number, i // self.limits.page_size], i % self.limits.page_size
            assert self.slots.get(slot) == row.prefix[i], f"sequence {row.sequence.id}: position {i} is another's"

    def _draw(self, row: Row) -> list[int]:
        row.last = draw(row.sequence.id, row.drawn)
        row.drawn += 1
        row.ended = row.drawn >= min(row.sequence.limit, row.stop)
        return [row.last]


@dataclass
class Host:
    """What an engine does around the scheduler, with up to `ahead` steps in flight beside the one that is planned.

    Attributes:
      live: sequences that have not ended; host_stops: at how many tokens the host ends one, by id.
      given_back: of each page that nobody uses, the newest step planned when it lost its last user.
    """

    limits: Limits
    ahead: int = 1
    scheduler: Scheduler = field(init=False)
    device: Device = field(init=False)
    flights: deque[Dispatch] = field(default_factory=deque)
    live: dict[int, Sequence] = field(default_factory=dict)
    done: dict[int, Sequence] = field(default_factory=dict)
    stops: dict[int, int] = field(default_factory=dict)
    host_stops: dict[int, int] = field(default_factory=dict)
    given_back: dict[int, int] = field(default_factory=dict)
    planned: int = 0
    ended: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.limits)
        self.device = Device(self.limits, self.stops)

    def add(self, sequence: Sequence, *, stop: int = 10**9, host_stop: int = 10**9) -> Sequence:
        self.scheduler.add(sequence)
        self.live[sequence.id] = sequence
        self.stops[sequence.id], self.host_stops[sequence.id] = stop, host_stop
        return sequence

    def schedule(self) -> Step | None:
        before = self.owners()
        waiting = [s for s in self.live.values() if s.phase is Phase.WAITING]
        step = self.scheduler.schedule()
        self._note(before, step)
        if step is None:
            return None
        self.planned += 1
        self._check(step, waiting)
        tokens = {c.sequence.id: c.sequence.tokens[c.start : c.start + c.count] for c in step.chunks}
        lengths = {j.sequence.id: len(j.sequence.tokens) for j in step.joining}
        self.flights.append(Dispatch(step, tokens, lengths))
        return step

    def deliver(self) -> list[int]:
        """The oldest step in flight ends; returns the sequences that ended with it."""
        dispatch = self.flights.popleft()
        reports = self.device.execute(dispatch)
        self.ended = dispatch.step.number
        self.scheduler.ended(self.ended)
        ended = []
        for report in reports:
            sequence = self.live.get(report.id)
            self.scheduler.drawn(report.id, report.tokens)
            if sequence is None:
                continue
            if report.ended or len(sequence.tokens) - sequence.prompt_length >= self.host_stops[report.id]:
                self.end(report.id)
                ended.append(report.id)
        return ended

    def end(self, id: int, *, keep: bool = True) -> None:
        before = self.owners()
        sequence = self.live.pop(id)
        count = len(sequence.tokens) - sequence.prompt_length
        assert sequence.tokens[sequence.prompt_length :] == [draw(id, i) for i in range(count)]
        self.scheduler.finish(id, keep=keep)
        self.done[id] = sequence
        self._note(before, None)

    def cancel(self, id: int) -> None:
        before = self.owners()
        self.live.pop(id, None)
        self.scheduler.cancel(id)
        self._note(before, None)

    def lose_device(self) -> None:
        self.flights.clear()
        self.device = Device(self.limits, self.stops)
        again = self.scheduler.reset()
        assert {s.id for s in again} == set(self.live)
        self.given_back.clear()
        self.ended = self.planned

    def drain(self, bound: int) -> int:
        """Runs until all have ended; returns how many steps it took, at most `bound`."""
        first = self.planned
        while self.live:
            if len(self.flights) > self.ahead or self.schedule() is None:
                assert self.flights, "nothing is planned, and nothing is in flight"
                self.deliver()
            assert self.planned - first <= bound, "some wait for ever"
        while self.flights:
            self.deliver()
        return self.planned - first

    def owners(self) -> dict[int, set[int]]:
        """Who uses each page."""
        owners: dict[int, set[int]] = {}
        for sequence in self.live.values():
            for page in sequence.pages:
                owners.setdefault(page, set()).add(sequence.id)
        return owners

    def _note(self, before: dict[int, set[int]], step: Step | None) -> None:
        now = self.owners()
        for page in before.keys() - now.keys():
            self.given_back[page] = self.planned
        if step is not None:
            shared = {(j.row, i) for j in step.joining for i in range(j.shared // self.limits.page_size)}
            for row, index, page in step.pages:
                if (row, index) not in shared:  # new contents: nothing in flight may still write the page
                    behind = self.planned if page in before else self.given_back.get(page, 0)
                    assert behind <= self.ended, f"page {page} has new contents before step {behind} has ended"

    def _check(self, step: Step, waiting: list[Sequence]) -> None:
        """A step keeps to the limits."""
        limits = self.limits
        assert step.number == self.planned
        assert step.chunks or step.decoding
        rows = [chunk.row for chunk in step.chunks] + [sequence.row for sequence in step.decoding]
        assert len(rows) == len(set(rows))
        assert set(rows) <= set(range(limits.rows))
        assert 1 <= step.steps <= (1 if step.chunks or waiting else limits.steps)
        if step.chunks:
            assert sum(chunk.count for chunk in step.chunks) + len(step.decoding) <= limits.budget
            assert len(step.chunks) <= limits.chunk_rows
        joined = {joining.sequence.id: joining for joining in step.joining}
        for chunk in step.chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            assert chunk.count > 0
            assert end <= len(sequence.tokens)
            assert chunk.draws == (end == len(sequence.tokens) and sequence.limit > 0)
            assert end == len(sequence.tokens) or end % limits.cut == 0
            if sequence.id in joined:
                assert joined[sequence.id].shared == chunk.start
        for joining in step.joining:
            assert joining.sequence.id in {chunk.sequence.id for chunk in step.chunks}
            assert joining.shared % max(limits.cut, limits.page_size) == 0
            assert not joining.shared or joining.sequence.reuse
            grouped = any(kind == GROUP for kind, _ in joining.sequence.domain)
            assert not joining.shared or limits.prefix_cache or grouped

    # --- Whether the books are in order

    def audit(self) -> None:
        """Every page is in one place, users are counted, and the tree holds nothing that nobody needs."""
        memory = self.scheduler._memory
        pages, owners, counts = memory.pages, self.owners(), self.scheduler.counts
        free, cached, fenced = set(pages._free), set(pages._cached), set(pages._fenced)
        used = set(owners)
        assert len(free) == len(pages._free)
        assert len(free) + len(cached) + len(fenced) + len(used) == len(free | cached | fenced | used) == pages.count
        assert (counts.pages_used, counts.pages_free) == (len(used), len(free))
        assert (counts.pages_cached, counts.pages_fenced) == (len(cached), len(fenced))
        assert all(pages.users(page) == len(owners.get(page, ())) for page in range(pages.count))
        assert all(step > self.ended for step in pages._fenced.values())
        rows = [s.row for s in self.live.values() if s.row >= 0]
        assert sorted(rows + memory._rows) == list(range(self.limits.rows))
        assert counts.running + counts.waiting == len(self.live)
        found = [page for block in self.blocks() for page in block.pages]
        assert len(found) == len(set(found))
        assert cached <= set(found) <= cached | fenced | used
        for block in self.blocks():
            assert block.pages or block.children or block.computing is not None
            assert block.computing is None or block.computing.phase is Phase.PROMPT
            assert all(pages._block[page] is block for page in block.pages)

    def blocks(self) -> list[Block]:
        """All nodes of the tree but its top and the domains' roots."""
        roots = self.scheduler._memory._prefixes._top.children.values()
        found, left = [], [child for root in roots for child in root.children.values()]
        while left:
            found.append(left.pop())
            left += found[-1].children.values()
        return found

    def audit_contents(self) -> None:
        """With no step in flight, each page that can be found holds what it is found by."""
        assert not self.flights
        size = self.limits.page_size
        for block in self.blocks():
            tokens: list[int] = []
            node = block
            while node.parent is not None and node.parent.parent is not None:
                tokens = list(memoryview(node.key).cast("i")) + tokens
                node = node.parent
            domain = tuple((kind, value) for kind, _, value in node.key)
            numbers = self.device.prefix(Sequence(-1, [], 1, 0, domain=domain), tokens)[-size:]
            for page in block.pages:
                assert [self.device.slots[page, i] for i in range(size)] == numbers


@st.composite
def some_limits(draw: st.DrawFn) -> Limits:
    size, rows = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    pages = draw(st.integers(3, 14))
    boundary = draw(st.sampled_from([None, None, size, 2 * size]))
    return Limits(
        rows=rows,
        pages=pages,
        page_size=size,
        pages_per_row=draw(st.integers(3, pages)),
        budget=rows - 1 + (boundary or 1) + draw(st.integers(0, 12)),
        chunk_rows=draw(st.integers(1, 3)),
        steps=draw(st.sampled_from([1, 1, 2, 5])),
        boundary=boundary,
        prefix_cache=draw(st.sampled_from([True, True, False])),
    )


TOKENS = st.integers(0, VOCABULARY - 1)
DOMAINS = st.sampled_from([(), (), (("adapter", 1),), (("salt", 1),), (("salt", True),)])


class SchedulerMachine(RuleBasedStateMachine):
    """Everything that may happen to a scheduler, in any order."""

    @initialize(limits=some_limits(), ahead=st.integers(0, 2))
    def start(self, limits: Limits, ahead: int) -> None:
        self.host = Host(limits, ahead)
        self.ids = 0
        self.work = 0

    @rule(data=st.data(), tail=st.lists(TOKENS, min_size=1, max_size=9), limit=st.integers(0, 12))
    def add(self, data: st.DataObject, tail: list[int], limit: int) -> None:
        host, head = self.host, []
        if others := [*host.live.values(), *host.done.values()][-12:]:  # goes on from what another has or had
            other = data.draw(st.sampled_from(others))
            head = other.tokens[: data.draw(st.integers(0, len(other.tokens)))]
        room = host.limits.capacity - limit
        prompt = (head + tail)[: max(0, room)] or tail[:1]
        limit = min(limit, host.limits.capacity - len(prompt))
        domain = data.draw(DOMAINS)
        copies = data.draw(st.sampled_from([1, 1, 1, 3]))
        if copies > 1:
            domain = (*domain, (GROUP, self.ids))
        reuse = data.draw(st.sampled_from([True, True, True, False]))
        priority = data.draw(st.sampled_from([0, 0, 0, 1, -1]))
        for _ in range(copies):
            sequence = Sequence(self.ids, list(prompt), len(prompt), limit, priority, domain, reuse)
            stop = data.draw(st.sampled_from([10**9, 1, 2, 3, 5]))
            host_stop = data.draw(st.sampled_from([10**9, 10**9, 1, 2, 4]))
            host.add(sequence, stop=stop, host_stop=host_stop)
            self.ids += 1
            self.work += len(prompt) + limit

    @precondition(lambda self: len(self.host.flights) <= self.host.ahead)
    @rule()
    def schedule(self) -> None:
        if self.host.schedule() is None and not self.host.flights:
            assert not self.host.live

    @precondition(lambda self: self.host.flights)
    @rule()
    def deliver(self) -> None:
        self.host.deliver()

    @rule(count=st.integers(1, 8))
    def run(self, count: int) -> None:
        host = self.host
        for _ in range(count):
            if len(host.flights) > host.ahead or host.schedule() is None:
                if not host.flights:
                    break
                host.deliver()

    @precondition(lambda self: self.host.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.host.live)))
        self.host.cancel(id)
        self.host.cancel(id)

    @precondition(lambda self: self.host.live)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """Its logits were no numbers: nobody may find what it has computed."""
        id = data.draw(st.sampled_from(sorted(self.host.live)))
        sequence = self.host.live[id]
        own = sequence.pages[sequence.cached // self.host.limits.page_size :]
        self.host.end(id, keep=False)
        assert not set(own) & {page for block in self.host.blocks() for page in block.pages}

    @rule(data=st.data())
    def lose_device(self, data: st.DataObject) -> None:
        if data.draw(st.integers(0, 9)) == 9:
            self.host.lose_device()

    @invariant()
    def books(self) -> None:
        if hasattr(self, "host"):
            self.host.audit()

    def teardown(self) -> None:
        if hasattr(self, "host"):
            host = self.host
            host.drain(bound=50 + 30 * self.work)
            host.audit()
            host.audit_contents()
            counts = host.scheduler.counts
            assert counts.pages_free + counts.pages_cached == host.limits.pages
            assert counts.running == counts.waiting == 0
