"""Plans one step: which rows decode, which prompt chunks are computed, which sequences gain and lose rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

from llama_jax.engine.limits import Limits
from llama_jax.engine.memory import Memory, awaits
from llama_jax.engine.prefixes import Block
from llama_jax.engine.queues import Queues, urgency
from llama_jax.engine.sequence import Draft, Phase, Sequence
from llama_jax.engine.steps import Chunk, Joining, Step

LOOKAHEAD = 256
"""The most waiting sequences considered for one step."""

MISFITS = 32
"""The most of them that are looked up in the cache without starting."""

PASSES = 16
"""The most sequences that may overtake an earlier one that lacks pages."""


@dataclass
class Totals:
    """Running counts; see `limits.Counts`."""

    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    planned_tokens: int = 0


@dataclass
class _Plan:
    """A step in the making.

    Attributes:
      starts: start of each prompt's chunk, which ends at `computed`.
      owed: pages that decoding rows wait for.
      ending: pages of complete sequences, once they have been counted.
    """

    joining: list[Joining] = field(default_factory=list)
    starts: dict[Sequence, int] = field(default_factory=dict)
    decoding: list[Sequence] = field(default_factory=list)
    steps: int = 1
    drafts: dict[Sequence, Draft] = field(default_factory=dict)
    remember: list[Sequence] = field(default_factory=list)
    owed: int = 0
    ending: int | None = None


class Planner:
    """Plans steps; changes the queues and the memory."""

    def __init__(self, limits: Limits, queues: Queues, memory: Memory):
        self.limits, self.queues, self.memory = limits, queues, memory
        self.totals = Totals()
        self._decoded = False

    def plan(self) -> Step | None:
        """The next step; None if no row can proceed."""
        plan = _Plan()
        self._make_way(plan)
        parts = [self._decode, self._compute_prompts]
        for part in reversed(parts) if self.limits.apart and self._decoded else parts:  # in turn
            if not (self.limits.apart and (plan.decoding or plan.starts)):
                part(plan)
        if not plan.decoding and not plan.starts:
            return None
        self._decoded = bool(plan.decoding)
        memory = self.memory
        memory.newest += 1
        chunks = tuple(
            Chunk(s, s.row, start, s.computed - start, draws=s.limit > 0 and s.phase is not Phase.PROMPT)
            for s, start in plan.starts.items()
        )
        joining, decoding = tuple(plan.joining), tuple(plan.decoding)
        step = Step(
            memory.newest,
            joining,
            tuple(memory.entries),
            chunks,
            decoding,
            plan.steps,
            plan.drafts,
            tuple(plan.remember),
        )
        memory.entries = []
        return step

    # --- Rows that decode

    def _decode(self, plan: _Plan) -> None:
        """Lets every decoding row draw that has pages and is not held, the most urgent first."""
        rows = [s for s in self.queues.decoding if not s.held]
        held = sum(s.held and not s.pending for s in self.queues.decoding)
        if held > len(rows) and not len(self.queues.prompts) and not len(self.queues.waiting):
            return  # a step without most of them would take as long
        plan.steps, plan.drafts, counts, needs = self._stride(rows)
        for sequence, count, need in zip(rows, counts, needs, strict=True):
            if sequence.phase is not Phase.DECODING:  # preempted in favour of an earlier one
                continue
            if need:
                if not self._room(sequence, need, plan):
                    plan.owed += need
                    continue
                self.memory.book(sequence, need)
            sequence.computed += count
            sequence.drawn += count
            self._remember(sequence, plan)
            plan.decoding.append(sequence)
            self.totals.planned_tokens += count
            if sequence.drawn == sequence.limit:
                self.queues.move(sequence, Phase.COMPLETE)

    def _remember(self, sequence: Sequence, plan: _Plan) -> None:
        """Ensures that the device has the text of a sequence whose draft it is to find. Only steps with drafts keep it
        up to date."""
        draft = plan.drafts.get(sequence)
        if draft is not None and draft.tokens is None and not sequence.remembered:
            plan.remember.append(sequence)
            sequence.remembered = True
        elif not plan.drafts:
            sequence.remembered = False

    def _stride(self, rows: list[Sequence]) -> tuple[int, dict[Sequence, Draft], list[int], list[int]]:
        """Decode steps of the next dispatch: several, or one with drafts, only if that delays no sequence or reader and
        preempts nobody.

        Returns:
          The steps, the drafts, and per row the most tokens that it draws and the pages that it needs for them.
        """
        most = self.limits.steps
        drafts: dict[Sequence, Draft] = {}
        if rows and not len(self.queues.waiting) and not len(self.queues.prompts):
            if len(rows) <= self.limits.draft_rows:
                each = ((s, s.draft.cut(s.limit - s.drawn - 1)) for s in rows if s.draft and (s.known or s.remembered))
                drafts = {s: draft for s, draft in each if draft}
            if drafts:
                counts = [1 + (drafts[s].length if s in drafts else 0) for s in rows]
            elif any(s.paced or s.streamed for s in self.queues.decoding):
                counts = [1] * len(rows)
            else:
                counts = [min(most, s.limit - s.drawn) for s in rows]
            needs = self._needs(rows, counts)
            if sum(needs) <= self.memory.pages.available:
                return 1 if drafts else max(counts), drafts, counts, needs
        counts = [1] * len(rows)
        return 1, {}, counts, self._needs(rows, counts)

    def _needs(self, rows: list[Sequence], counts: list[int]) -> list[int]:
        """Further pages that each row needs for `counts` more tokens."""
        size = self.limits.page_size
        return [max(0, (s.computed + n + size - 1) // size - len(s.pages)) for s, n in zip(rows, counts, strict=True)]

    def _room(self, sequence: Sequence, need: int, plan: _Plan) -> bool:
        """Whether there are pages for a decoding row, which may take them from less urgent ones."""
        pages = self.memory.pages
        while pages.available < need:
            if pages.available + self._coming(plan) >= need + plan.owed:
                return False  # preemption would not free them earlier
            last = self.queues.least_urgent
            if last is None or last is sequence:
                return False
            self._preempt(last)
        return True

    def _coming(self, plan: _Plan) -> int:
        """Pages that become free when steps in flight have ended (or may, if they are shared)."""
        if plan.ending is None:
            plan.ending = sum(len(s.pages) for s in self.queues.complete)
        return self.memory.pages.fenced + plan.ending

    # --- Prompts

    def _compute_prompts(self, plan: _Plan) -> None:
        """Continues started prompts, then starts others, with the tokens that decoding rows leave."""
        left = self.limits.budget - len(plan.decoding)
        for sequence in list(self.queues.prompts):
            left -= self._compute(sequence, left, plan)
        left = self._admit(left, plan)
        for sequence in list(self.queues.prompts):  # no one else could use the rest
            left -= self._compute(sequence, left, plan, alone=True)

    def _compute(self, sequence: Sequence, left: int, plan: _Plan, *, alone: bool | None = None) -> int:
        """Plans or extends a prompt's chunk; returns the number of tokens added."""
        count = self._chunk(sequence, sequence.computed, left, alone) if self._goes_with(sequence, plan) else 0
        if count:
            plan.starts.setdefault(sequence, sequence.computed)
            sequence.computed += count
            self.totals.planned_tokens += count
            self.memory.register(sequence, sequence.computed)
            if sequence.computed == len(sequence.tokens):
                sequence.drawn += sequence.limit > 0
                complete = sequence.drawn == sequence.limit
                self.queues.move(sequence, Phase.COMPLETE if complete else Phase.DECODING)
        return count

    def _chunk(self, sequence: Sequence, computed: int, left: int, alone: bool | None = None) -> int:
        """Tokens of a prompt's next chunk: its rest if that fits; else half of the remaining budget, or all of it if no
        other prompt needs any, but at least the smallest chunk if that fits."""
        if (rest := len(sequence.tokens) - computed) <= left:
            return rest
        if alone is None:
            others = len(self.queues.prompts) + len(self.queues.waiting) - 1
            alone = not others
        cut = self.limits.cut
        end = (computed + (left if alone else left // 2)) // cut * cut
        if end <= computed and left >= cut:
            end = computed + cut
        return max(0, end - computed)

    def _admit(self, left: int, plan: _Plan) -> int:
        """Gives rows to sequences that fit, in turn; returns the remaining token budget."""
        queues, memory, misfits = self.queues, self.memory, 0
        passed: list[Sequence] = []
        places = self.limits.chunk_rows - len(set(queues.prompts) | plan.starts.keys())
        for sequence in list(islice(queues.waiting, LOOKAHEAD)):
            if not (memory.free_rows and left and places) or misfits == MISFITS:
                break
            if not sequence.known or (passed and sequence.priority > passed[0].priority):
                break
            if sequence.pending or awaits(sequence):
                continue
            if not self._goes_with(sequence, plan):
                passed.append(sequence)
                continue
            found = memory.find(sequence)
            if found is None:
                misfits += 1
                continue
            computed = len(found) * self.limits.page_size
            count = self._chunk(sequence, computed, left)
            ends = count == len(sequence.tokens) - computed
            if not count or not (ends or self._place_for_long):
                misfits += 1
                continue
            if memory.missing(sequence, found) + self._spare > memory.pages.available:
                misfits += 1
                passed.append(sequence)
                continue
            if any(other.passed == PASSES for other in passed):
                break
            for other in passed:
                other.passed += 1
            self._start(sequence, found, plan)
            left -= self._compute(sequence, left, plan)
            places -= 1
        return left

    def _goes_with(self, sequence: Sequence, plan: _Plan) -> bool:
        """Whether a prompt may be in the step; scored prompts are computed in full (`Sequence.reuse`)."""
        return not self.limits.apart or all(other.reuse == sequence.reuse for other in plan.starts)

    @property
    def _place_for_long(self) -> bool:
        """Whether one more prompt may need further steps: one place is reserved for prompts that do not."""
        return len(self.queues.prompts) < max(1, self.limits.chunk_rows - 1)

    @property
    def _spare(self) -> int:
        """Pages that newcomers must leave: each decoding row needs one, now or soon, and would preempt them for it."""
        return 0 if self.limits.reserve else len(self.queues.decoding)

    def _start(self, sequence: Sequence, found: list[Block], plan: _Plan) -> None:
        self.queues.move(sequence, Phase.PROMPT)
        self.memory.start(sequence, found)
        sequence.started, sequence.passed = True, 0
        plan.joining.append(Joining(sequence.row, sequence, sequence.cached))
        self.totals.prompt_tokens += len(sequence.tokens)
        self.totals.prefix_hit_tokens += sequence.cached

    # --- Preemption

    def _make_way(self, plan: _Plan) -> None:
        """Preempts sequences of strictly lower priority if the first waiting one can start only then."""
        last = self.queues.least_urgent
        first = self.queues.waiting[0] if len(self.queues.waiting) and not self.limits.reserve else None
        if first is None or last is None or last.priority <= first.priority:
            return
        if not first.known or first.pending or awaits(first):
            return
        found = self.memory.find(first)
        if found is None:
            return
        running = [*self.queues.decoding, *self.queues.prompts]
        victims = sorted((s for s in running if s.priority > first.priority), key=urgency)
        need, pages = self.memory.missing(first, found), self.memory.pages
        if need > pages.available + self._coming(plan) + sum(len(s.pages) for s in victims):
            return
        while victims and not (
            self.memory.free_rows + len(self.queues.complete)
            and self._place_for_long
            and need + self._spare <= pages.available + self._coming(plan)
        ):
            self._preempt(victims.pop())

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a row away. Its tokens are kept, those in flight are still reported; all are recomputed."""
        self.memory.leave(sequence)
        self.queues.move(sequence, Phase.WAITING)
        sequence.preemptions += 1
        self.totals.preemptions += 1
