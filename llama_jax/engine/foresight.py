"""The host's part in a step before it is planned: masks of sequences with rules, and drafts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as ListOf

from llama_jax.engine import rules
from llama_jax.engine.drafting import Drafter, Source, Wanted, worthwhile
from llama_jax.engine.joining import Asked
from llama_jax.engine.sequence import Draft, Sequence


class Foresight:
    """Keeps sequences out of steps until their constraints have computed a mask, and gives them drafts to try."""

    def __init__(self, source: Source | None = None, drafts: int = 0) -> None:
        """Args: source of drafts, None for no drafts; most tokens of a draft."""
        self._source, self._drafts = source, drafts
        self._undecided: set[int] = set()

    def prepare(self, several: Iterable[Asked], *, calm: bool = False) -> None:
        """Starts computing the next masks of sequences with a rule.

        Args:
          calm: whether a step with drafts is possible: then masks after each draft token are computed, too.
        """
        ruled = [asked for asked in several if asked.rule]
        guesses = self._guesses([asked for asked in ruled if calm and self._tries(asked)])
        for asked in ruled:
            assert asked.rule is not None
            most = self._room(asked.sequence) if calm else 0
            asked.rule.prepare(guesses.get(asked.sequence.id, ()), most)
            self._undecided.add(asked.sequence.id)

    def decide(self, asked: Mapping[int, Asked], limit_s: float) -> list[int]:
        """Waits briefly for masks. Sequences whose masks are not ready are left out of the next step (`pending`).

        Args:
          asked: all sequences by number.
          limit_s: time limit for the constraints of a sequence.

        Returns:
          Sequences that exceeded it, which are to be ended.
        """
        if not self._undecided:
            return []
        undecided = {n: rule for n in self._undecided if n in asked and (rule := asked[n].rule)}
        for rule in undecided.values():
            rule.prepare()  # it may have been cancelled
        rules.wait(undecided.values(), alone=len(undecided) == len(asked))
        self._undecided = {n for n, rule in undecided.items() if not rule.ready}
        for number in undecided:
            asked[number].sequence.pending = number in self._undecided
        late = [n for n in self._undecided if undecided[n].took_s > limit_s]
        if late:
            rules.abandon_threads()
        return late

    def propose(self, decoding: Iterable[Asked], *, calm: bool) -> None:
        """Gives sequences drafts for the next step. A sequence with a host draft must wait until the host knows all its
        tokens, which is slower than planning the next step ahead: nobody drafts if other rows would have to wait, or
        if drafts gain nothing. Sequences with rules wait anyway.

        Args:
          decoding: sequences that the next step may draw for.
          calm: whether a step with drafts is possible.
        """
        several, trying = list(decoding), []
        free = [asked for asked in several if not asked.rule]
        drafting = [asked for asked in free if calm and self._tries(asked)]
        if not worthwhile([asked.pace for asked in drafting if asked.pace], len(several) - len(drafting)):
            drafting = []
        for asked in several:
            asked.sequence.draft = None
            if asked.rule and calm and asked.sequence.known and asked.rule.ready:
                asked.sequence.draft = Draft.of(asked.rule.ahead.draft)
        for asked in free:
            asked.sequence.paced = False
        for asked in drafting:
            asked.sequence.paced = True
            if self._source and self._source.on_device:
                self._look_up(asked)
            elif asked.sequence.known:
                trying.append(asked)
        guesses = self._guesses(trying)
        for asked in trying:
            asked.sequence.draft = Draft.of(guesses[asked.sequence.id])

    def _look_up(self, asked: Asked) -> None:
        """Lets the device look for a draft, once a suffix of the text has occurred in it before. To send the device the
        text, the host must know all of it: only this once does the sequence wait."""
        sequence, pace = asked.sequence, asked.pace
        assert isinstance(pace, Drafter)
        likely = sequence.remembered or bool(pace.find(sequence.tokens, 1))
        sequence.paced = likely and not sequence.remembered
        if likely and (sequence.remembered or sequence.known):
            sequence.draft = Draft(min(pace.length, self._room(sequence)))

    def _tries(self, asked: Asked) -> bool:
        """Whether to look for a draft of a sequence."""
        sequence, pace = asked.sequence, asked.pace
        return pace is not None and self._room(sequence) > 0 and pace.active(len(sequence.tokens))

    def _room(self, sequence: Sequence) -> int:
        """Room of a sequence for draft tokens; a step draws one token more."""
        return max(0, min(self._drafts, sequence.limit - sequence.drawn - 1))

    def _guesses(self, trying: ListOf[Asked]) -> dict[int, tuple[int, ...]]:
        """Drafts by sequence number."""
        if self._source is None or not trying:
            return {}
        wanted = [Wanted(asked.sequence, asked.pace, self._room(asked.sequence)) for asked in trying if asked.pace]
        drafts = self._source.propose(wanted)
        return {each.sequence.id: draft for each, draft in zip(wanted, drafts, strict=True)}
