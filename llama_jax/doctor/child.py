"""A child process that may hang inside a driver."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Mapping, Sequence


def run_child(
    command: Sequence[str], environ: Mapping[str, str], *, deadline_s: float
) -> subprocess.CompletedProcess[str] | None:
    """Runs a command to its end; None if it was killed at the deadline.

    Raises:
      OSError: it cannot be started.
    """
    child = subprocess.Popen(
        command,
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        out, err = child.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        child.kill()
        # A process that hangs inside a driver does not even die.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=5)
        return None
    except BaseException:
        child.kill()
        raise
    return subprocess.CompletedProcess(command, child.returncode, out, err)
