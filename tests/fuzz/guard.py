"""Running a reader under limits, and saying what is wrong with how it ended.

A reader may return, or raise a `LlamaJaxError` that one can print. Anything else is a finding: another exception, more
than SECONDS of processor time, more than MEMORY bytes of additional address space.
"""

from __future__ import annotations

import os
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from llama_jax.errors import LlamaJaxError

SECONDS = 5.0
MEMORY = 512 << 20
MESSAGE = 10_000
"""Characters of an error that still are a message and not a copy of the file."""

_FUZZ = Path(__file__).parent


@dataclass(frozen=True)
class Finding:
    """A forbidden act of a reader.

    Attributes:
      kind: type of the exception, "TooSlow", "TooLong" (a message) or "Unprintable" (a message).
      where: innermost place in the code under test, "file-function".
      detail: the traceback.
    """

    kind: str
    where: str
    detail: str

    @property
    def slug(self) -> str:
        """Names the finding; the same for all inputs that end the same way."""
        return "".join(c if c.isalnum() or c in "_-" else "_" for c in f"{self.kind}-{self.where}")


class TooSlow(BaseException):
    """Raised in the reader when its time is over; no `except Exception` catches it."""


def check(
    read: Callable[[], object], *, seconds: float = SECONDS, memory: int = MEMORY, message: int = MESSAGE
) -> Finding | None:
    """Runs a reader in the main thread; None if it behaved."""
    try:
        with _time_limit(seconds), _memory_limit(memory):
            read()
    except LlamaJaxError as error:
        return _judge(error, message)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return _finding(type(error).__name__, error)
    return None


def _judge(error: LlamaJaxError, limit: int) -> Finding | None:
    text = str(error)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return _finding("Unprintable", error)
    return _finding("TooLong", error) if len(text) > limit else None


def _finding(kind: str, error: BaseException) -> Finding:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "llama_jax" in Path(f.filename).parts and _FUZZ not in Path(f.filename).parents]
    frame = (ours or frames)[-1]
    lines = traceback.format_exception(type(error), error, error.__traceback__, limit=-6)
    detail = "".join(lines)[:MESSAGE].encode("utf-8", "backslashreplace").decode()
    return Finding(kind, f"{Path(frame.filename).stem}-{frame.name}", detail)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Counts processor time, since a busy machine must not look like a slow reader."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TooSlow(f"more than {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def _memory_limit(extra: int) -> Iterator[None]:
    """Lets the address space grow by `extra` bytes; an allocation beyond fails with MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
