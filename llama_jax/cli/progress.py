"""Progress of conversions and loads on standard error: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

from llama_jax.cli.terminal import size_text

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SHOW_AFTER_S = 0.4
"""A stage that was not announced and is over sooner shows nothing, and does not pay for importing rich."""
LINE_EVERY_S = 2.0


class Reporter:
    """Shows what a long call is doing; a context manager.

    `progress` and `notify` are made for the arguments of these names of `llama_jax.load`, `convert` and `resolve`: the
    stages of one call (conversion, then loading) follow one another, and each has a bar of its own.

    Args:
      quiet: show nothing.
      label: what the first stage does, e.g. "Loading".
    """

    def __init__(self, *, quiet: bool = False, label: str = "Loading"):
        self._quiet = quiet
        self._default_label = self._label = label
        self._bars = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._began: tuple[float, int] | None = None
        self._announced = False
        self._last_line = 0.0

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_stage()

    def notify(self, message: str) -> None:
        """Prints a line; a participle at its beginning names the stage that follows ("Converting …")."""
        self._end_stage()
        if not self._quiet:
            print(message, file=sys.stderr, flush=True)
        word = message.split(maxsplit=1)[0]
        if word.endswith("ing"):
            self._label, self._announced = word, True

    def warn_of_unused_gpu(self) -> None:
        """Prints a warning if jax computes on the CPU though there is a GPU and nobody asked for that; imports jax."""
        from llama_jax.targets.hardware import unused_gpu_warning

        if not self._quiet and (warning := unused_gpu_warning()):
            print(warning, file=sys.stderr, flush=True)

    def progress(self, done: int, total: int, name: str) -> None:
        """Takes bytes done, bytes in all, and the name of the tensor just finished."""
        if self._quiet:
            return
        now = time.monotonic()
        if self._began is None:
            self._began, self._last_line = (now, done), now
        if self._bars:
            if self._announced or now - self._began[0] > SHOW_AFTER_S or self._bar:
                self._update_bar(done, total)
        elif now - self._last_line > LINE_EVERY_S:
            self._last_line = now
            share = f"{size_text(done)} of {size_text(total)} ({done / max(total, 1):.0%})"
            speed = _speed(now - self._began[0], done - self._began[1], total - done)
            print(f"{self._label}: {share}{speed}, {name}", file=sys.stderr, flush=True)
        if done >= total:
            self._end_stage()
            self._label = self._default_label

    def _update_bar(self, done: int, total: int) -> None:
        if self._bar is None:
            # Imported here: quick stages and other output do without.
            from rich import progress as bars
            from rich.console import Console

            self._bar = bars.Progress(
                bars.TextColumn("{task.description}"),
                bars.BarColumn(),
                bars.TaskProgressColumn(),
                bars.DownloadColumn(),
                bars.TransferSpeedColumn(),
                bars.TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=total)
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total)

    def _end_stage(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = self._began = None
        self._announced = False


def _speed(seconds: float, done: int, left: int) -> str:
    """Bytes a second and the time that the rest will take at that rate; empty while there is nothing to go by."""
    if seconds <= 0 or done <= 0:
        return ""
    rate = done / seconds
    minutes, rest = divmod(round(left / rate), 60)
    return f", {size_text(round(rate))}/s, {f'{minutes} min ' if minutes else ''}{rest} s left"
