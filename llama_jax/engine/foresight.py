"""The host's part in a step before it is planned: which tokens may come next in sequences with rules, and which are
tried as drafts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llama_jax.engine import rules
from llama_jax.engine.joining import Asked


class Foresight:
    """Keeps sequences out of steps as long as their constraints have not said what may come next."""

    def __init__(self) -> None:
        self._undecided: set[int] = set()

    def prepare(self, asked: Asked, drafts: int = 0) -> None:
        """Has the masks of a sequence's next tokens computed, if it has a rule.

        Args:
          drafts: tokens of a draft to look behind, at most.
        """
        if asked.rule is None:
            return
        sequence = asked.sequence
        guess: tuple[int, ...] = ()
        most = min(drafts, sequence.limit - sequence.drawn - 1)
        if asked.drafter and most > 0 and asked.drafter.active(len(sequence.tokens)):
            guess = asked.drafter.propose(sequence.tokens, most)
        asked.rule.prepare(guess, max(0, most))
        self._undecided.add(sequence.id)

    def decide(self, asked: Mapping[int, Asked], limit_s: float) -> list[int]:
        """Waits a moment for masks. Sequences whose masks are not there are left out of the next step (`pending`).

        Args:
          asked: all sequences by their numbers.
          limit_s: seconds that the constraints of a sequence may take.

        Returns:
          Those that have taken longer; they are to be ended.
        """
        if not self._undecided:
            return []
        undecided = {n: rule for n in self._undecided if n in asked and (rule := asked[n].rule)}
        for rule in undecided.values():
            rule.prepare()  # if it was cancelled
        rules.wait(undecided.values(), alone=len(undecided) == len(asked))
        self._undecided = {n for n, rule in undecided.items() if not rule.ready}
        for number in undecided:
            asked[number].sequence.pending = number in self._undecided
        late = [n for n in self._undecided if undecided[n].took_s > limit_s]
        if late:
            rules.abandon_threads()
        return late


def propose_drafts(decoding: Iterable[Asked], drafts: int, *, calm: bool) -> None:
    """Drafts for the next step. Whoever drafts waits for the host to know its tokens, which takes longer than to have
    the next step planned before: where other rows would wait for it, and where drafts gain nothing, nobody drafts.
    Those with rules wait anyway.

    Args:
      decoding: sequences of which the next step may draw; drafts: tokens of a draft, at most.
      calm: whether a step with drafts is possible.
    """
    for asked in decoding:
        sequence = asked.sequence
        if asked.drafter is None:
            continue
        if asked.rule:
            sequence.draft = asked.rule.ahead.draft if calm and sequence.known and asked.rule.ready else ()
            continue
        left = sequence.limit - sequence.drawn - 1
        sequence.paced = calm and left > 0 and asked.drafter.active(len(sequence.tokens))
        sequence.draft = ()
        if sequence.paced and sequence.known:
            sequence.draft = asked.drafter.propose(sequence.tokens, min(left, drafts))
