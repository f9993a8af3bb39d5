"""Checks every kernel on this machine's device, in a child process: one that crashes or hangs takes nothing along.

The child compiles everything at once, in threads, and then runs one check after the other. A crash while one runs is
due to that one. A crash while several are compiled could be due to any of them: then none is blamed, and the next
child takes one after the other from its tracing to its result.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

DEADLINE_S = 120.0
"""Time limit in seconds without a message from the child: one check, compiling included, may take this long."""
_TRIES = 20
_TOLD = 8
"""Number of compiled checks between progress lines."""

_CHILD = """
import json, sys
from llama_jax import runtime
from llama_jax.kernels.checking.startup import report_checks
runtime.enable_compilation_cache()
report_checks(json.loads(sys.argv[1]), at_once=sys.argv[2] == "at once")
"""


@dataclass(frozen=True)
class Numerics:
    """The findings.

    Attributes:
      checks: one dict a check, the fields of `llama_jax.kernels.checking.compare.Check`.
      device: what the result holds for; "" if the check could not be finished.
      error: why it could not be.
    """

    checks: tuple[dict[str, Any], ...]
    device: str = ""
    error: str = ""

    @property
    def failed(self) -> tuple[dict[str, Any], ...]:
        return tuple(check for check in self.checks if check["problem"])


@dataclass
class _Run:
    """The state of one child, by its messages.

    Attributes:
      prepared, compiled: how many checks have begun to be traced and compiled together, and how many are ready.
      running: whether a check has been started; from then on nothing else is under way.
      current: the check that is under way.
    """

    checks: list[dict[str, Any]] = field(default_factory=list)
    prepared: int = 0
    compiled: int = 0
    running: bool = False
    current: str = ""
    device: str = ""
    end: str = ""


def result_line(check: Mapping[str, Any]) -> str:
    """One check for people; its fields are those of `llama_jax.kernels.checking.compare.Check`."""
    found = check["problem"] or f"agrees, off by {check['error']:.1g} of a row at most ({check['limit']:g} is allowed)"
    return f"{check['operation']}/{check['backend']}, {check['case']}: {found}"


def check_kernels(
    environ: Mapping[str, str],
    *,
    deadline_s: float = DEADLINE_S,
    progress: Callable[[str], None] = lambda line: None,
    code: str = _CHILD,
) -> Numerics:
    """Runs every check. A child that dies or hangs in one is started again without that one.

    Args:
      environ: of the child.
      deadline_s: seconds for a check (and for starting).
      progress: called with a line for each result as it comes, and for what else takes time.
    """
    crashed: dict[str, str] = {}
    at_once = True
    for _ in range(_TRIES):
        run = _child(environ, crashed, at_once, deadline_s, progress, code)
        if run.device:
            return Numerics(tuple(run.checks), run.device)
        if at_once and run.prepared and not run.running:
            at_once = False
            progress(f"kernels were compiled together, and {run.end}; taking one after the other")
            continue
        if not run.current:
            return Numerics(tuple(run.checks), error=run.end)
        crashed[run.current] = run.end
        progress(f"{run.current}: {run.end}; starting again without it")
    return Numerics(tuple(run.checks), error=f"gave up after {_TRIES} crashes; the last one: {run.end}")


def _child(
    environ: Mapping[str, str],
    crashed: Mapping[str, str],
    at_once: bool,
    deadline_s: float,
    progress: Callable[[str], None],
    code: str,
) -> _Run:
    run = _Run()
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(crashed), "at once" if at_once else "one by one"],
            # Only as much of the GPU's memory as it needs: others may be computing there.
            env={"TF_CPP_MIN_LOG_LEVEL": "2", **environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        assert child.stdout is not None
        lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=_read_lines, args=(child.stdout, lines), daemon=True).start()
        try:
            while (line := lines.get(timeout=deadline_s)) is not None:
                if line.startswith(b"{"):
                    _take(json.loads(line), run, progress)
            run.end = f"the process ended with status {child.wait(timeout=deadline_s)}"
        except (queue.Empty, subprocess.TimeoutExpired):
            run.end = f"it took longer than {deadline_s:g} s"
        finally:
            child.kill()
            # A process that hangs inside a driver does not even die.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=5)
        errors.seek(0)
        said = [text.strip() for text in errors.read().decode(errors="replace").splitlines() if text.strip()]
        if said and not run.device:
            run.end += f": {said[-1][:300]}"
    return run


def _read_lines(stream: IO[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def _take(message: dict[str, Any], run: _Run, progress: Callable[[str], None]) -> None:
    if "prepare" in message:
        if not run.prepared:
            progress("compiling all kernels and references, on all processors")
        run.prepared += 1
    elif "compiled" in message:
        run.compiled += 1
        if run.compiled % _TOLD == 0 or run.compiled == run.prepared:
            progress(f"compiled {run.compiled} of {run.prepared}")
    elif "start" in message:
        run.running, run.current = True, message["start"]
        if not run.prepared:
            progress(f"checking {run.current}")
    elif "check" in message:
        run.checks.append(message["check"])
        run.current = ""
        progress(result_line(message["check"]))
    else:
        run.device = message["device"]
