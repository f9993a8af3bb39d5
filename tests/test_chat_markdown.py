"""Markdown in the terminal while it is being written."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from terminal_screen import TerminalScreen

from llama_jax.cli import chat_markdown
from llama_jax.cli.chat_markdown import LiveMarkdown

COLUMNS, ROWS = 40, 12
TEXT = """# Title

Some **bold** text, `code`,
on two lines. A [link](https://example.org/)

- one
- two
  1. inner

3. three
4. four

```python
def f(x):

    return x + 1
```

| a | b |
|---|---|
| 1 | 2 |

> said
> twice

Heading
---
End
"""
PIECES = (
    "word ",
    "**",
    "`",
    "\n",
    "\n\n",
    "# ",
    "- ",
    "1. ",
    "```",
    "> ",
    "| ",
    "|-|",
    "---",
    "    ",
    "[a](b)",
    "<b>",
    "#",
)


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece is drawn."""
    monkeypatch.setattr(chat_markdown, "DRAW_EVERY_S", 0.0)


def shown(*pieces: str, columns: int = COLUMNS, rows: int = ROWS) -> TerminalScreen:
    screen = TerminalScreen(columns, rows)
    screen.write(">>> before\n")
    live = LiveMarkdown(screen, columns, rows)
    for piece in pieces:
        live.add(piece)
    live.end()
    return screen


def test_what_is_seen() -> None:
    lines = [line.strip() for line in shown(TEXT).text.splitlines() if line.strip()]
    assert lines == [
        ">>> before",
        "Title",
        "Some bold text, code,",
        "on two lines. A link",
        "(https://example.org/)",
        "• one",
        "• two",
        "1 inner",
        "3 three",
        "4 four",
        "def f(x):",
        "return x + 1",
        "a  b",
        "────",
        "1  2",
        "▌ said",
        "▌ twice",
        "Heading",
        "End",
    ]
    assert shown(TEXT).colours > 10


@pytest.mark.parametrize("text", [TEXT, "one\n#two", "one\n-two", "one\n```two` three"])
def test_letter_by_letter_it_comes_to_the_same(text: str) -> None:
    """A line that has only begun may look like the beginning of another block."""
    assert shown(*text).text == shown(text).text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=25), st.integers(2, 9))
def test_however_it_comes_it_is_the_same(pieces: list[str], rows: int) -> None:
    """Also on a screen that is lower than a block: nothing is left of what was drawn meanwhile."""
    assert shown(*pieces, rows=rows).text == shown("".join(pieces)).text


def test_a_block_that_is_higher_than_the_screen_shows_its_end() -> None:
    screen = TerminalScreen(COLUMNS, 5)
    live = LiveMarkdown(screen, COLUMNS, 5)
    for i in range(30):
        live.add(f"- item {i}\n")
    assert [line.strip() for line in screen.text.splitlines()] == [f"• item {i}" for i in range(26, 30)]
    live.end()
    assert len(screen.text.splitlines()) == 30


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a\x1b[31mb\x07c", "a␛[31mb␇c"),
        ("&#27;[31m &#x202e; &#7; `&#27;`", "�[31m � � &#27;"),
        ("```\n\x1b]0;title\x07\n```", "␛]0;title␇"),
        ("```\x1b[2J\nx\n```", "x"),
        ("Use <b>bold</b>\n<!-- note -->", "Use <b>bold</b>\n<!-- note -->"),
        ("<script>\nx\n</script>", "<script>\nx\n</script>"),
        ("![picture](http://a.b/?q)", "!picture (http://a.b/?q)"),
        ("[x][1]\n\n[1]: http://a.b", "[x][1]\n\n[1]: http://a.b"),
        ("[red]not a style[/red] :smile:", "[red]not a style[/red] :smile:"),
    ],
)
def test_a_model_cannot_take_over_the_terminal_nor_hide(text: str, seen: str) -> None:
    """`TerminalScreen` refuses control characters and sequences that it does not know."""
    text = shown(text).text
    assert [line.strip() for line in text.splitlines()] == [">>> before", *seen.split("\n")]
