"""Communication between the devices of a program."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind and size in a program.

    Attributes:
      kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast".
      devices: that take part in each.
      count: how often one runs; those in a loop as often as the loop runs.
      bytes: of the whole array of one of them: the result of an all-gather, the operand of a reduce-scatter, either of
        all others, on one device.
      unknown_trips: whether one of them is in a loop whose number of turns the compiler does not know; those are
        counted once.
    """

    kind: str
    devices: int
    count: int
    bytes: int
    unknown_trips: bool = False

    @property
    def traffic(self) -> float:
        """Bytes that each device sends for all of them: what a ring needs (Thakur, Rabenseifner, Gropp 2005)."""
        share = (self.devices - 1) / self.devices
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}.get(self.kind, share)
        return self.count * self.bytes * factor
