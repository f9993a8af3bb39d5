"""A terminal's screen, as far as the chat uses one: text with its lines, cursor movements, erasing; and one with
`llama-jax top` in it."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import unicodedata
from collections.abc import Mapping, Sequence

_PART = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])|([\s\S])")


class TerminalScreen:
    """Text on the screen after some output. Lines that leave the screen at its top can no longer be written to.

    Attributes:
      colours: how many escape sequences set colours.
    """

    def __init__(self, columns: int, rows: int):
        self.columns, self.rows = columns, rows
        self._lines: list[list[str]] = [[]]
        self._row = self._column = self.colours = 0

    def write(self, text: str) -> int:
        for parameters, final, sign in _PART.findall(text):
            if sign:
                self._sign(sign)
            elif final == "A":
                top = max(len(self._lines) - self.rows, 0)
                self._row = max(self._row - int(parameters or 1), top)
            elif final == "J":
                del self._lines[self._row + 1 :], self._lines[self._row][self._column :]
            elif final == "K":
                del self._lines[self._row][self._column :]
            elif final == "m":
                self.colours += 1
            else:
                raise AssertionError(f"unknown sequence {parameters}{final}")
        return len(text)

    def flush(self) -> None:
        pass

    def _sign(self, sign: str) -> None:
        if sign == "\n":  # the driver makes a carriage return of it, too
            self._row, self._column = self._row + 1, 0
            if self._row == len(self._lines):
                self._lines.append([])
        elif sign == "\r":
            self._column = 0
        else:
            assert unicodedata.category(sign) not in ("Cc", "Cf"), repr(sign)
            if self._column == self.columns:
                self._sign("\n")
            line = self._lines[self._row]
            line += " " * (self._column - len(line))
            line[self._column : self._column + 1] = sign
            self._column += 1

    @property
    def text(self) -> str:
        """All lines, those that have left the screen too."""
        return "\n".join("".join(line).rstrip() for line in self._lines).rstrip()


def show_top(command: Sequence[str], key: bytes, environment: Mapping[str, str] = os.environ) -> None:
    """Runs `llama-jax top` in a terminal until it shows a running request, and ends it by a key."""
    master, slave = pty.openpty()
    environment = {**environment, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment) as shown:
        os.close(slave)
        text = b""
        while b"leaves" not in text:
            text += os.read(master, 1 << 16)
        assert b"running" in text
        os.write(master, key)
        while True:
            try:
                if not os.read(master, 1 << 16):
                    break
            except OSError:  # the other side is closed
                break
    os.close(master)
    assert shown.returncode == 0
