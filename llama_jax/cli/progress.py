"""Progress of conversions, loads and compilations on standard error: a bar in a terminal, elsewhere lines."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llama_jax.cli.terminal import size_text

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

    from llama_jax.engine.compiled import Compiled

SHOW_AFTER_S = 0.4
"""An unannounced stage that ends sooner shows nothing, and saves importing rich."""
LINE_EVERY_S = 2.0


class Reporter:
    """Shows what a long call is doing; a context manager.

    `progress` and `notify` are made for the arguments of these names of `llama_jax.load`, `convert` and `resolve`: the
    stages of one call (conversion, then loading) follow one another, each with its own bar.

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

        def line(seconds: float, before: int) -> str:
            share = f"{size_text(done)} of {size_text(total)} ({done / max(total, 1):.0%})"
            return f"{share}{_speed(seconds, done - before, total - done)}, {name}"

        self._show(done, total, line, _byte_columns)

    def counted(self, done: int, total: int, name: str) -> None:
        """Takes how many are done, how many there are in all, and what they are called."""

        def line(seconds: float, before: int) -> str:
            rest = (total - done) * seconds / (done - before) if done > before else 0.0
            return f"{done} of {total} {name}" + (f", {left_text(rest)}" if rest else "")

        self._show(done, total, line, _count_columns)

    def compiled(self, news: Compiled) -> None:
        """Takes news of a program that an engine has compiled before it is ready; for `compiling` of `LLM`."""
        if self._began is None:
            self._label = "Compiling"

        def line(*_: object) -> str:
            took = "from the cache" if news.from_cache else f"{news.seconds:.1f} s"
            return f"{news.done} of {news.total} programs, {left_text(news.left_s)}, {news.key}: {took}"

        self._show(news.done, news.total, line, _count_columns)

    def _show(
        self,
        done: int,
        total: int,
        line: Callable[[float, int], str],
        columns: Callable[[], Sequence[ProgressColumn]],
    ) -> None:
        """Shows the state of a stage.

        Args:
          line: what to print where there are no bars, from the seconds since the stage began and what was done then.
          columns: of the bar, right of it.
        """
        if self._quiet:
            return
        now = time.monotonic()
        if self._began is None:
            self._began, self._last_line = (now, done), now
        if self._bars:
            if self._announced or now - self._began[0] > SHOW_AFTER_S or self._bar:
                self._update_bar(done, total, columns)
        elif now - self._last_line > LINE_EVERY_S:
            self._last_line = now
            print(f"{self._label}: {line(now - self._began[0], self._began[1])}", file=sys.stderr, flush=True)
        if done >= total:
            self._end_stage()
            self._label = self._default_label

    def _update_bar(self, done: int, total: int, columns: Callable[[], Sequence[ProgressColumn]]) -> None:
        if self._bar is None:
            # Imported here: quick stages and other output do without.
            from rich import progress as bars
            from rich.console import Console

            left = bars.TextColumn("{task.description}"), bars.BarColumn()
            self._bar = bars.Progress(
                *left, *columns(), bars.TimeRemainingColumn(), console=Console(stderr=True), transient=True
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
    """Bytes per second and the remaining time at that rate; empty while there is no basis for them."""
    if seconds <= 0 or done <= 0:
        return ""
    rate = done / seconds
    return f", {size_text(round(rate))}/s, {left_text(left / rate)}"


def left_text(seconds: float) -> str:
    """Formats the time that is left."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{f'{minutes} min ' if minutes else ''}{rest} s left"


def _byte_columns() -> Sequence[ProgressColumn]:
    from rich import progress as bars

    return bars.TaskProgressColumn(), bars.DownloadColumn(), bars.TransferSpeedColumn()


def _count_columns() -> Sequence[ProgressColumn]:
    from rich import progress as bars

    return bars.MofNCompleteColumn(), bars.TimeElapsedColumn()
