"""Restart policy: when to rebuild a failed engine, and when to give up."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Restarts:
    """Restarts at once after a first failure, then with exponential backoff, until too many have failed in a row.

    Attributes:
      attempts: most consecutive attempts.
      pause_s: before the second attempt; longest_s: cap of all pauses.
      sound_s: an engine that has worked for this long is sound: its next failure is the first in a row.
      total: attempts so far.
    """

    attempts: int = 5
    pause_s: float = 1.0
    longest_s: float = 60.0
    sound_s: float = 60.0
    total: int = field(default=0, init=False)
    _row: int = field(default=0, init=False)
    _made: float | None = field(default=None, init=False)

    def failed(self, now: float) -> float | None:
        """Record a failure of the engine or of an attempt; return the seconds until the next attempt, None if there is
        none.

        Args:
          now: by a monotonic clock.
        """
        if self._made is not None and now - self._made >= self.sound_s:
            self._row = 0
        self._made = None
        if self._row >= self.attempts:
            return None
        self._row += 1
        self.total += 1
        return min(self.pause_s * 2 ** (self._row - 2), self.longest_s) if self._row > 1 else 0.0

    def made(self, now: float) -> None:
        """Record that it works again."""
        self._made = now

    @property
    def row(self) -> int:
        """Attempts since it last worked soundly."""
        return self._row
