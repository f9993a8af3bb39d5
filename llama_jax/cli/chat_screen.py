"""The chat's terminal: reading messages with editing and history, or lines from a pipe; showing text and notes."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import termios
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.cli.chat_activity import Activity, LineActivity, NotedActivity
from llama_jax.cli.chat_conversation import is_open
from llama_jax.cli.terminal import printable, write_text
from llama_jax.errors import RequestError, StorageError

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    from llama_jax.cli.chat_markdown import LiveMarkdown

PROMPT = ">>> "
CONTINUATION = "... "
_LEAVE_HINT = "Ctrl-D or /exit leaves"

Reader = Callable[[], str | None]
"""Returns what the user enters next, or None at the end."""


class Screen:
    """Destination of answers and notes.

    Attributes:
      interactive: a person sits at a terminal. Otherwise only answers and what commands print go to standard output.
      as_json: answers are JSON objects; everything else goes to standard error.
      columns: width for notes.
      markdown: answers are shown as markdown; only if a terminal can do more than print.
      status: gives the line below what is typed.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False, plain: bool = False):
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.as_json = as_json
        self.status: Callable[[], str] = lambda: ""
        self._quiet = quiet
        self._plain = not sys.stdout.isatty() or os.environ.get("TERM") == "dumb" or bool(os.environ.get("NO_COLOR"))
        self._dim, self._normal = ("", "") if self._plain else ("\x1b[2m", "\x1b[0m")
        self.markdown = self.can_draw and not plain

    @property
    def can_draw(self) -> bool:
        """Whether a person sits at a terminal that has colours and a cursor that moves."""
        return self.interactive and not self.as_json and not self._plain

    @property
    def columns(self) -> int:
        return shutil.get_terminal_size().columns if self.interactive else 200

    def reply(self, text: str) -> None:
        """Shows the result of a command."""
        if self.as_json:
            print(text, file=sys.stderr, flush=True)
        else:
            write_text(text + "\n")

    def note(self, text: str) -> None:
        """Shows a remark, dimmed; in a pipe on standard error."""
        if self.interactive and not self.as_json:
            print(f"{self._dim}{_wrapped(printable(text), self.columns)}{self._normal}", flush=True)
        elif self.interactive or not self._quiet:
            print(printable(text), file=sys.stderr, flush=True)

    def thought(self, text: str) -> None:
        """Shows a person a piece of the model's reasoning, dimmed."""
        if self.interactive and not self.as_json:
            print(f"{self._dim}{printable(text)}{self._normal}", end="", flush=True)

    @contextlib.contextmanager
    def answer(self) -> Iterator[Callable[[str], None]]:
        """Returns the display of an answer's text, piece by piece; JSON is shown elsewhere, in one piece."""
        if self.as_json:
            yield lambda text: None
            return
        shown = self._live_markdown() if self.markdown else _PlainText()
        with _without_echo() if self.interactive else contextlib.nullcontext():
            try:
                yield shown.add
            finally:
                shown.end()

    def message(self, message: Mapping[str, Any]) -> None:
        """Shows a message of the conversation again; answers as they were shown first."""
        if message["role"] != "assistant":
            self.note(f"{message['role']}: {message['content']}")
            return
        with self.answer() as write:
            write(message["content"])

    def _live_markdown(self) -> LiveMarkdown:
        from llama_jax.cli.chat_markdown import LiveMarkdown  # takes 0.1 s

        return LiveMarkdown(sys.stdout, *shutil.get_terminal_size())

    def activity(self) -> Activity:
        """The display that tells a person that an answer is coming, until it begins."""
        if self.can_draw:
            return LineActivity(self._dim, self._normal)
        return NotedActivity(self.note if self.interactive and not self.as_json else lambda text: None)

    def reader(self, history: Path | None, words: Sequence[str]) -> Reader:
        """The reader of this terminal or pipe.

        Args:
          history: file that keeps the input history, private to its owner; None for no history.
          words: completions of the tab key at the beginning of a line.

        Raises:
          StorageError: the history file cannot be used.
        """
        if history is not None:
            self._secure(history)
        if self.interactive and os.environ.get("TERM", "dumb") != "dumb":
            return _edited(history, words, self.note, lambda: self.status())
        return _remembering(_typed(self.note) if self.interactive else _piped(), history)

    def _secure(self, path: Path) -> None:
        """Creates a file for its owner only; revokes others' rights to an existing one, and says so."""
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
            try:
                status = os.fstat(handle)
                if not stat.S_ISREG(status.st_mode):
                    raise StorageError(f"{path} is not a regular file", hint="choose another --history file")
                if status.st_mode & 0o077:
                    os.fchmod(handle, 0o600)
                    self.note(f"{path} was open to others (mode {stat.S_IMODE(status.st_mode):03o}); now only to you")
            finally:
                os.close(handle)
        except OSError as error:
            raise StorageError(
                f"cannot use {path} for the history: {error.strerror}", hint="choose another --history file"
            ) from error


def _wrapped(text: str, columns: int) -> str:
    """Lines that a terminal of this width does not break within words."""
    options: dict[str, Any] = {"break_on_hyphens": False, "replace_whitespace": False}
    return "\n".join(textwrap.fill(line, max(columns, 2), **options) for line in text.split("\n"))


class _PlainText:
    """Plain text as it comes, and a final newline if it has begun and lacks one."""

    def __init__(self) -> None:
        self._last: str | None = None

    def add(self, text: str) -> None:
        write_text(text)
        self._last = text[-1:] or self._last or ""

    def end(self) -> None:
        if self._last not in (None, "\n"):
            write_text("\n")


@contextlib.contextmanager
def _without_echo() -> Iterator[None]:
    """Keeps typed input from being echoed into the answer; it is there when the next message is read."""
    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(handle, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)


def _edited(
    history: Path | None, words: Sequence[str], note: Callable[[str], None], status: Callable[[], str]
) -> Reader:
    # Imported here, since it takes 0.2 s and pipes do not need it.
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    session: PromptSession[str] = PromptSession(
        message=PROMPT,
        multiline=True,
        prompt_continuation=CONTINUATION,
        key_bindings=_keys(),
        history=InMemoryHistory() if history is None else FileHistory(str(history)),
        completer=WordCompleter(list(words), sentence=True),
        complete_while_typing=False,
        enable_suspend=True,
        enable_open_in_editor=True,
        tempfile_suffix=".md",
    )

    def read() -> str | None:
        while True:
            try:
                return session.prompt(bottom_toolbar=status())
            except KeyboardInterrupt:
                note(_LEAVE_HINT)
            except EOFError:
                return None

    return read


def _keys() -> KeyBindings:
    """Enter sends, except within an open block of quotes; Alt-Enter (or Esc, Enter) begins a new line."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


def _typed(note: Callable[[str], None]) -> Reader:
    """Reader of a terminal that can only print (TERM=dumb)."""

    def read() -> str | None:
        while True:
            try:
                text = input(PROMPT)
                while is_open(text):
                    text += "\n" + input(CONTINUATION)
                return text
            except KeyboardInterrupt:
                print()
                note(_LEAVE_HINT)
            except EOFError:
                print()
                return None
            except UnicodeDecodeError:
                note("that was not UTF-8; please enter it again")

    return read


def _piped() -> Reader:
    def line() -> str:
        try:
            return sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise RequestError(
                "standard input is not UTF-8", param="messages", hint="convert it, e.g. with iconv"
            ) from error

    def read() -> str | None:
        text = line()
        if not text:
            return None
        while is_open(text):
            more = line()
            if not more:
                raise RequestError(
                    'standard input ends within a block of """', param="messages", hint='end the block with """'
                )
            text += more
        return text

    return read


def _remembering(read: Reader, history: Path | None) -> Reader:
    if history is None:
        return read
    from prompt_toolkit.history import FileHistory

    file = FileHistory(str(history))

    def reading() -> str | None:
        text = read()
        if text is not None and text.strip():
            file.store_string(text.rstrip("\n"))
        return text

    return reading
