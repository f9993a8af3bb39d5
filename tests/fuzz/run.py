"""Fuzzes the readers, one process a target, one after another; prints a line for each and keeps what was found.

    python tests/fuzz/run.py --seconds 600 [TARGET ...]

Exit code 1 if anything was found. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
MAX_DEATHS = 20
GRACE = 240
"""Seconds beyond its time after which a process that does not end is killed."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the readers of files.")
    parser.add_argument("targets", nargs="*", help="by default all")
    parser.add_argument("--seconds", type=int, default=600, help="time for each target")
    parser.add_argument("--engine", choices=("atheris", "random"), default="atheris")
    parser.add_argument("--cases", type=Path, default=HERE / "cases", help="where findings are kept")
    parser.add_argument("--work", type=Path, help="keeps logs and corpora here (an empty folder that goes away)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.engine == "atheris" and find_spec("atheris") is None:
        parser.error("atheris is not installed: `uv run --with atheris python ...`, or --engine random")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    work = args.work or Path(tempfile.mkdtemp(prefix="llama-jax-fuzz-", dir=_fast_folder()))
    found = 0
    try:
        for name in args.targets or all_targets():
            found += fuzz(name, args, work / name)
    finally:
        if args.work is None:
            shutil.rmtree(work, ignore_errors=True)
    return 1 if found else 0


def all_targets() -> list[str]:
    sys.path.insert(0, str(HERE.parent))
    from fuzz.targets import TARGETS

    return list(TARGETS)


def fuzz(name: str, args: argparse.Namespace, work: Path) -> int:
    """Runs a target until its time is over, starting it again where an input killed it. Returns the findings."""
    cases, began, deaths, log = args.cases / name, time.monotonic(), 0, ""
    before = set(cases.glob("*")) if cases.exists() else set()
    while (left := round(args.seconds - (time.monotonic() - began))) > 0 and deaths < MAX_DEATHS:
        shutil.rmtree(work / "files", ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        with (work / "log").open("a+", encoding="utf-8", errors="replace") as out:
            start = out.tell()
            command = [sys.executable, str(HERE / "engine.py"), name, "--seconds", str(left), "--seed"]
            command += [str(args.seed + deaths), "--work", str(work), "--cases", str(cases), "--engine", args.engine]
            try:
                code = subprocess.run(command, stdout=out, stderr=out, timeout=left + GRACE, check=False).returncode
            except subprocess.TimeoutExpired:
                code = -9
            out.seek(start)
            log += out.read()
        if code == 0:
            break
        deaths += 1
        if not keep_deadly(work, cases):
            print(log[-4000:], file=sys.stderr)
            print(f"{name}: the process ended with {code} and left no input", file=sys.stderr)
            return deaths
    after = set(cases.glob("*")) if cases.exists() else set()
    runs = sum(int(n) for n in re.findall(r"number_of_executed_units: (\d+)", log))
    covered = re.findall(r"\bcov: (\d+) ft: (\d+) corp: (\d+)", log)
    state = "cov {} features {} corpus {}".format(*covered[-1]) if covered else "no coverage"
    print(f"{name:20} {runs:>9,} runs  {time.monotonic() - began:5.0f} s  {state}  findings {len(after - before)}")
    for case in sorted(after - before):
        print(f"    {case}")
    sys.stdout.flush()
    return len(after - before)


def keep_deadly(work: Path, cases: Path) -> bool:
    """Moves the inputs that killed the process to the cases; libFuzzer writes them, the last input is there anyway."""
    artifacts = [p for p in (work / "artifacts").glob("*") if p.is_file()]
    for path in artifacts:
        cases.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes()
        kind = path.name.partition("-")[0]
        (cases / f"Died-{kind}-{hashlib.sha256(data).hexdigest()[:8]}").write_bytes(data)
        path.unlink()
    return bool(artifacts)


def _fast_folder() -> str | None:
    """Memory rather than a disk: every run writes a file."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


if __name__ == "__main__":
    sys.exit(main())
