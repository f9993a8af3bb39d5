"""Kills conversions at random moments and looks at what they leave; a program that `test_convert_faults.py` runs.

    python kill_conversions.py FOLDER KILLS SEED

Everything is imported once, then each conversion is a fork. Prints one JSON line for each kill.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax  # noqa: F401
from tiny_models import LLAMA, write_hf

from llama_jax.checkpoint import is_checkpoint, open_checkpoint, verify, write
from llama_jax.convert import convert
from llama_jax.convert.run import open_source

write.BATCH_BYTES = 6000  # a handful of parts


def forked(src: Path, dst: Path, *, overwrite: bool, kill_after: float | None = None) -> tuple[int, float]:
    """Converts in a child process; its exit code (-9 when it was killed) and how many seconds it took."""
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            convert(src, dst, overwrite=overwrite)
            code = 0
        finally:
            os._exit(code)
    while kill_after is not None and time.monotonic() - began < kill_after:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), time.monotonic() - began
        time.sleep(0.001)
    if kill_after is not None:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - began


def state(path: Path) -> Any:
    """The state of a name: None, "bad", or the checkpoint's digests.

    Looked at in a child process, since the array store must not be used before a fork.
    """
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(into, json.dumps(_state(path)).encode())
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return json.loads(text)


def _state(path: Path) -> Any:
    if not path.exists():
        return None
    if not is_checkpoint(path) or not verify(path).ok:
        return "bad"
    return {name: info.digest for name, info in open_checkpoint(path).tensors.items()}


def main() -> None:
    folder, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    write_hf(folder / "hf", LLAMA)
    write_hf(folder / "other", LLAMA, seed=1)
    open_source(folder / "hf").close()  # imports the readers, which every fork would do again
    dst = folder / "out"
    _, seconds = forked(folder / "hf", folder / "whole", overwrite=False)
    _, seconds = forked(folder / "hf", folder / "whole", overwrite=True)  # files and code are warm now
    forked(folder / "other", folder / "old", overwrite=False)
    new, old = state(folder / "whole"), state(folder / "old")
    for kill in range(kills):
        replace = kill % 2 == 1
        if replace:
            shutil.copytree(folder / "old", dst)
        code, took = forked(folder / "hf", dst, overwrite=replace, kill_after=rng.uniform(0, 1.1 * seconds))
        if code == 0:
            # Processor time comes and goes: a conversion that outran its kill says how long one takes now.
            seconds = took
        left = state(dst)
        parts = len(list(folder.glob("out.partial/parts/*/part.json")))
        again, _ = forked(folder / "hf", dst, overwrite=left is not None)
        result = {
            "killed": code == -signal.SIGKILL,
            "left": "bad" if left == "bad" else "new" if left == new else "old" if left == old else left,
            "expected": ["old", "new"] if replace else [None, "new"],
            "parts": parts,
            "rerun": again,
            "same": state(dst) == new,
            "litter": sorted(p.name for p in folder.iterdir() if p.name.startswith("out") and p != dst),
        }
        print(json.dumps(result), flush=True)
        shutil.rmtree(dst)


if __name__ == "__main__":
    main()
