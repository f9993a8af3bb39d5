"""Progress shown to a person until an answer begins."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from llama_jax.cli.progress import LINE_EVERY_S, SHOW_AFTER_S

TICK_S = 1.0
"""Seconds between updates of the line while nothing is reported, e.g. during compilation."""
_COMPILING = " (programs are compiled the first time)"


class Activity(Protocol):
    """Display of progress before an answer begins."""

    def read(self, done: int, total: int) -> None:
        """Reports how many prompt tokens have been read; 0 of 0 if unknown."""
        ...

    def close(self) -> None:
        """Ends the display: the answer begins, or nobody waits for it any longer."""
        ...


class LineActivity:
    """A terminal line that is overwritten, and erased at the end. A thread counts the seconds."""

    def __init__(self, style: str, normal: str):
        """Starts hidden; the escape sequences are put around the text."""
        self._style, self._normal = style, normal
        self._what, self._began, self._shown = "waiting for the first token", time.monotonic(), False
        self._lock, self._ended = threading.Lock(), threading.Event()
        threading.Thread(target=self._tick, daemon=True).start()

    def read(self, done: int, total: int) -> None:
        """See `Activity`."""
        if done < total:
            self._what = f"reading the prompt: {done} of {total} tokens{_COMPILING if done == 0 else ''}"
            self._write()

    def close(self) -> None:
        """See `Activity`."""
        with self._lock:
            self._ended.set()
            if self._shown:
                print("\r\x1b[K", end="", flush=True)
            self._shown = False

    def _tick(self) -> None:
        while not self._ended.wait(TICK_S):
            self._write()

    def _write(self) -> None:
        waited = time.monotonic() - self._began
        with self._lock:
            if waited > SHOW_AFTER_S and not self._ended.is_set():
                text = f"{self._what}, {waited:.0f} s"
                print(f"\r\x1b[K{self._style}{text}{self._normal}", end="", flush=True)
                self._shown = True


class NotedActivity:
    """Occasional notes, for outputs whose lines cannot be overwritten."""

    def __init__(self, note: Callable[[str], None]):
        """Starts without notes."""
        self._note, self._began, self._last = note, time.monotonic(), time.monotonic()

    def read(self, done: int, total: int) -> None:
        """See `Activity`."""
        now = time.monotonic()
        if done < total and now - self._began > SHOW_AFTER_S and now - self._last > LINE_EVERY_S:
            self._note(f"reading the prompt: {done} of {total} tokens")
            self._last = now

    def close(self) -> None:
        """See `Activity`."""
