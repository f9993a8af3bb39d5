"""An engine around the scheduler, on the model of the device, with every invariant checked."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from scheduler_device import Device, Dispatch, draw, guess

from llama_jax.engine.limits import Limits
from llama_jax.engine.prefixes import Block
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.sequence import GROUP, Draft, Phase, Sequence
from llama_jax.engine.steps import Step


@dataclass
class Host:
    """An engine with up to `ahead` steps in flight beside the one that is planned.

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
    ruled: set[int] = field(default_factory=set)
    planned: int = 0
    ended: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.limits)
        self.device = Device(self.limits, self.stops)

    def add(self, sequence: Sequence, *, stop: int = 10**9, host_stop: int = 10**9) -> Sequence:
        self.scheduler.add(sequence)
        if sequence.paced:
            self.ruled.add(sequence.id)
        self.live[sequence.id] = sequence
        self.stops[sequence.id], self.host_stops[sequence.id] = stop, host_stop
        return sequence

    def schedule(self) -> Step | None:
        before = self.owners()
        waiting = [s for s in self.live.values() if s.phase is Phase.WAITING]
        self._draft()
        known = {s.id for s in self.live.values() if s.known}
        step = self.scheduler.schedule()
        self._note(before, step)
        if step is None:
            return None
        self.planned += 1
        self._check(step, waiting, known)
        self._check_paced(step, known)
        tokens = {c.sequence.id: c.sequence.tokens[c.start : c.start + c.count] for c in step.chunks}
        lengths = {j.sequence.id: len(j.sequence.tokens) for j in step.joining}
        texts = {s.id: list(s.tokens) for s in step.remember}
        self.flights.append(Dispatch(step, tokens, lengths, texts))
        return step

    def _draft(self) -> None:
        """Some drafts, of which some tokens are wrong. For every other sequence it is the device that finds them."""
        if not self.limits.draft_rows:
            return
        for s in self.scheduler.decoding:
            if s.id in self.ruled:
                continue
            s.paced, s.draft = self.scheduler.calm and (s.id + s.drawn) % 5 > 0, None
            length = (s.id + len(s.tokens)) % self.limits.page_size
            if s.paced and s.id % 2:
                s.draft = Draft(length) if length and (s.remembered or s.known) else None
                s.paced = not s.remembered
            elif s.paced and s.known:
                s.draft = Draft.of(guess(s.id, len(s.tokens) - s.prompt_length, length))

    def deliver(self) -> list[int]:
        """The oldest step in flight ends; returns the sequences that ended with it."""
        dispatch = self.flights.popleft()
        reports = self.device.execute(dispatch)
        self.ended = dispatch.step.number
        self.scheduler.ended(self.ended)
        ended = []
        for report in reports:
            sequence = self.live.get(report.id)
            draft = None if sequence is None else dispatch.step.drafts.get(sequence)
            self.scheduler.drawn(report.id, report.tokens, draft)
            if sequence is None:
                continue
            if report.ended:
                assert len(sequence.tokens) - sequence.prompt_length == min(sequence.limit, self.stops[report.id])
            if report.ended or len(sequence.tokens) - sequence.prompt_length >= self.host_stops[report.id]:
                self.end(report.id)
                ended.append(report.id)
        return ended

    def end(self, id: int, *, keep: bool = True) -> list[int]:
        """Ends a sequence that has what it should; returns the pages to clear."""
        before = self.owners()
        sequence = self.live.pop(id)
        count = len(sequence.tokens) - sequence.prompt_length
        assert sequence.tokens[sequence.prompt_length :] == [draw(id, i) for i in range(count)]
        bad = self.scheduler.finish(id, keep=keep)
        self.done[id] = sequence
        self._note(before, None)
        return bad

    def cancel(self, id: int) -> None:
        before = self.owners()
        self.live.pop(id, None)
        self.scheduler.finish(id)
        self._note(before, None)

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

    def _check(self, step: Step, waiting: list[Sequence], known: set[int]) -> None:
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
        if limits.apart and step.chunks:
            assert not step.decoding
            assert len({chunk.sequence.reuse for chunk in step.chunks}) == 1
        joined = {joining.sequence.id: joining for joining in step.joining}
        for chunk in step.chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            assert chunk.count > 0
            assert end <= len(sequence.tokens)
            assert chunk.draws == (end == len(sequence.tokens) and sequence.limit > 0)
            assert end == len(sequence.tokens) or end % limits.cut == 0
            if sequence.id in joined:
                assert joined[sequence.id].shared == chunk.start
        assert all(0 <= index < limits.pages_per_row and 0 <= page < limits.pages for _, index, page in step.pages)
        if step.drafts:
            assert not step.chunks
            assert not waiting
            assert step.steps == 1
            assert len(step.decoding) <= limits.draft_rows
            for sequence, draft in step.drafts.items():
                assert sequence.draft is not None
                assert draft == sequence.draft.cut(draft.length)
                assert draft.length > 0
                assert len(sequence.tokens) - sequence.prompt_length + draft.length < sequence.limit
                assert sequence.id in known or (draft.tokens is None and sequence.remembered)
            assert all(s.id in known for s in step.remember)
        assert all(0 < sequence.drawn <= sequence.limit for sequence in step.decoding)
        for joining in step.joining:
            assert joining.sequence.id in {chunk.sequence.id for chunk in step.chunks}
            assert joining.shared % max(limits.cut, limits.page_size) == 0
            assert not joining.shared or joining.sequence.reuse
            grouped = any(kind == GROUP for kind, _ in joining.sequence.domain)
            assert not joining.shared or limits.prefix_cache or grouped
            if limits.reserve:
                stored = joining.sequence.prompt_length + max(joining.sequence.limit - 1, 0)
                assert len(joining.sequence.pages) == -(-stored // limits.page_size)

    def _check_paced(self, step: Step, known: set[int]) -> None:
        """One of whose tokens the host has a say in each draws one, and behind tokens that the host knows."""
        drawing = [chunk.sequence for chunk in step.chunks if chunk.draws] + list(step.decoding)
        for sequence in drawing:
            if sequence.paced:
                assert sequence.id in known
                assert step.steps == 1

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
        assert all(root.children for root in memory._prefixes._top.children.values())
        for block in self.blocks():
            assert block.pages or block.children or block.computing is not None
            computing = block.computing
            assert computing is None or (computing.phase is Phase.PROMPT and self.live[computing.id] is computing)
            assert all(pages._block[page] is block for page in block.pages)
            assert not block.cut

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
