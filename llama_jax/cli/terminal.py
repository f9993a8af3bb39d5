"""The terminal: model text that cannot take it over, JSON, errors, tables, sizes; and Ctrl-C."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from llama_jax.library.sizes import size_text as size_text

# C0 and C1 control characters and DEL as visible signs, so that no escape sequence in a model's output reaches the
# terminal. Newline and tab stay; a carriage return could overwrite a line, and is of no use without that.
# Overrides of the writing direction are replaced too: they can disguise a line.
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
      ValueError: the value contains NaN or infinity, which JSON lacks.
    """
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")
    sys.stdout.flush()


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table whose columns are aligned; the last column has any width."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    ]


def dtypes_text(dtype: str, kv_dtype: str | None) -> str:
    """The dtype that a model computes in, and that of its cache if it is another."""
    return f"{dtype}, cache in {kv_dtype}" if kv_dtype else dtype


def pairs_text(pairs: Mapping[str, object]) -> str:
    """Names and values as in "data=2 tensor=4"."""
    return " ".join(f"{name}={value}" for name, value in pairs.items())


def flops_text(flops: float | None) -> str:
    """Multiplications and additions in units of 10^12, "unknown" for None."""
    return "unknown" if flops is None else f"{flops / 1e12:,.3g} TFLOP"


def ms_text(seconds: float | None) -> str:
    """Seconds as milliseconds with three figures, "unknown" for None."""
    return "unknown" if seconds is None else f"{seconds * 1e3:.3g} ms"


def meter(share: float, width: int) -> str:
    """A share from 0 to 1 as a bar of `width` characters."""
    full = round(min(share, 1) * width)
    return "#" * full + "." * (width - full)


def share_text(share: float | None) -> str:
    """A share of a measured ceiling in five columns, "void" for None."""
    return " void" if share is None else f"{share:5.2f}"


def installing(text: str) -> str:
    """A hint with commands that install into this environment: one that uv made has no pip of its own, so the shell
    would find another Python's."""
    return text if importlib.util.find_spec("pip") else re.sub(r"(?<!uv )\bpip install\b", "uv pip install", text)


def print_error(message: str, hint: str) -> None:
    """Writes an error for people to standard error."""
    # Names of files and tensors are not ours to trust.
    print(f"error: {printable(message)}", file=sys.stderr)
    if hint:
        print(f"hint: {printable(hint)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def catch_interrupt(
    notice: str = "", signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
) -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C, or a request to terminate, into a flag that can be polled; the next one raises KeyboardInterrupt.

    Args:
      notice: text that the first one writes to standard error.
    """
    asked = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        if notice:
            print(notice, file=sys.stderr, flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals arrive in the main thread
        return
    before = {number: signal.signal(number, handle) for number in signals}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
