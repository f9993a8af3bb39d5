"""Writing to standard output and standard error: model text that cannot take over a terminal, JSON, sizes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from llama_jax.library.sizes import size_text as size_text

# C0 and C1 control characters and DEL as visible signs, so that no escape sequence of a model's output reaches the
# terminal. Newline and tab stay; a carriage return could overwrite a line, and is of no use without that.
# Overrides of the writing direction go too: they can make a line read as something that it is not.
_VISIBLE: dict[int, int | None] = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    ord("\r"): None,
    0x7F: 0x2421,
    **dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),
}


def printable(text: str) -> str:
    """The text as a terminal may show it: control characters other than newline and tab become visible signs."""
    return text.translate(_VISIBLE)


def write_text(text: str) -> None:
    """Writes a piece of a model's text to standard output at once; a terminal gets it without control characters.

    Characters that the output's encoding lacks are written as escapes.
    """
    out = sys.stdout
    if out.isatty():
        text = printable(text)
    encoding = out.encoding or "utf-8"
    out.write(text.encode(encoding, "backslashreplace").decode(encoding))
    out.flush()


def print_json(value: Any) -> None:
    """Writes one JSON value and a newline to standard output, in ASCII, so that it passes through every locale.

    Raises:
      ValueError: the value holds NaN or infinity, which JSON has not.
    """
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")
    sys.stdout.flush()


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table whose columns are aligned; the last column has any width."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    ]
