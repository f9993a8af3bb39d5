"""Markdown in the terminal while it is being written."""

from __future__ import annotations

import itertools
import re
import time
from typing import Any, ClassVar, TextIO

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.segment import Segment
from rich.syntax import Syntax

from llama_jax.cli.terminal import printable

DRAW_EVERY_S = 0.08
"""Seconds between redraws of a growing block."""
_BLANK = re.compile(r"(\x1b\[[\d;]*m|\s)*")
_CODE_THEME = "ansi_dark"  # the terminal's own colours, so that it fits dark and light ones
# HTML, images and link definitions are shown verbatim: rich would drop them.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable(["image", "reference"])


class LiveMarkdown:
    """A growing text shown as markdown. Finished blocks are written once; the last one is redrawn in place, only its
    end if it is taller than the screen."""

    def __init__(self, out: TextIO, columns: int, rows: int):
        """Starts empty, on a terminal `columns` wide and `rows` high."""
        self._out, self._most = out, max(rows - 1, 1)
        self._console = Console(file=out, width=columns, force_terminal=True, highlight=False, legacy_windows=False)
        self._open = ""  # the text of the last block
        self._begun = False  # whether there is something above it
        self._drawn = 0  # lines of it on the screen
        self._next = 0.0

    def add(self, text: str) -> None:
        """Shows more of the text."""
        self._open += printable(text)
        if (now := time.monotonic()) >= self._next:
            self._draw()
            self._next = now + DRAW_EVERY_S

    def end(self) -> None:
        """Shows the rest of the text."""
        self._draw(last=True)

    def _draw(self, *, last: bool = False) -> None:
        done, self._open = (self._open, "") if last else _split(self._open)
        parts = [f"\x1b[{self._drawn}A\r\x1b[J" if self._drawn else ""]
        for block in _blocks(done):
            parts += self._lines(block)
            self._begun = True
        growing = [line for block in _blocks(self._open) for line in self._lines(block)][-self._most :]
        self._drawn = len(growing)
        self._out.write("".join([*parts, *growing]))
        self._out.flush()

    def _lines(self, block: str) -> list[str]:
        """One block as lines of the terminal, with an empty one before it unless it is the first."""
        with self._console.capture() as captured:
            self._console.print(_Shown(block))
        lines = captured.get().split("\n")
        while len(lines) > 1 and _BLANK.fullmatch(lines[-1]):
            lines.pop()
        while len(lines) > 1 and _BLANK.fullmatch(lines[0]):
            del lines[0]
        return [f"{line}\n" for line in ["", *lines][not self._begun :]]


def _starts(text: str) -> list[int]:
    """Start positions of blocks: paragraphs, lists, pieces of code."""
    lines = [0, *itertools.accumulate(len(line) + 1 for line in text.split("\n"))]
    return [lines[token.map[0]] for token in _PARSER.parse(text) if token.map and token.level == 0]


def _blocks(text: str) -> list[str]:
    return [text[a:b] for a, b in itertools.pairwise([*_starts(text), len(text)])]


def _split(text: str) -> tuple[str, str]:
    """The blocks that more text cannot change, and the rest: only a complete line reveals its kind."""
    _, *later = _starts(text[: text.rfind("\n") + 1]) or [0]
    at = later[-1] if later else 0
    return text[:at], text[at:]


class _Heading(Heading):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text


class _CodeBlock(CodeBlock):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Syntax(str(self.text).rstrip(), self.lexer_name, theme=self.theme, word_wrap=True, padding=(0, 2))


class _Shown(Markdown):
    """Markdown that keeps line breaks, shows link addresses, and has no control characters."""

    elements: ClassVar[dict[str, Any]] = Markdown.elements | {
        "heading_open": _Heading,
        "fence": _CodeBlock,
        "code_block": _CodeBlock,
    }

    def __init__(self, text: str):
        super().__init__("", code_theme=_CODE_THEME, hyperlinks=False)
        self.parsed = _PARSER.parse(text)
        for token in self._flatten_tokens(self.parsed):
            if token.type == "softbreak":
                token.type = "hardbreak"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in super().__rich_console__(console, options):
            if isinstance(part, Segment):  # an entity may encode a control character
                part = part._replace(text=printable(part.text))
            yield part
