"""Errors of the emulator."""

from __future__ import annotations


class EmulatorError(RuntimeError):
    """Base of both kinds; the message ends with kernel, program counter and instruction where they are known."""


class Fault(EmulatorError):
    """The program did what it must not: an access out of bounds, a race, a read of what nobody wrote, no end."""


class NotModelled(EmulatorError):
    """The emulator does not know an instruction, a modifier or a step of the executable; nothing is guessed."""
