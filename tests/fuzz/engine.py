"""Fuzzes one target in this process for some seconds; started by run.py.

    python engine.py TARGET --seconds N --work DIR --cases DIR [--engine atheris|random]

atheris (https://github.com/google/atheris, libFuzzer) keeps inputs that reach new code and mutates those; it writes
inputs that kill the process into DIR/artifacts. "random" mutates the seeds and knows nothing of the code.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from fuzz.mutate_json import Mutator
    from fuzz.targets import Target

type Read = Callable[[bytes], None]

MAX_BYTES = 1 << 18
HANGS = 300
"""Seconds of wall time after which an input that even the time limit cannot stop ends the process; many, since a
process that somebody has suspended must not look like one that hangs."""


class Recorder:
    """Runs inputs and keeps the smallest one for each finding."""

    def __init__(self, read: Read, cases: Path):
        self._read, self._cases = read, cases
        self._sizes: dict[str, int] = {}
        self.executions = 0

    def __call__(self, data: bytes) -> None:
        from fuzz.guard import check

        self.executions += 1
        finding = check(lambda: self._read(data))
        if finding is None or len(data) >= self._sizes.get(finding.slug, sys.maxsize):
            return
        if finding.slug not in self._sizes:
            print(f"FINDING {finding.slug}\n{finding.detail}", flush=True)
        self._sizes[finding.slug] = len(data)
        self._cases.mkdir(parents=True, exist_ok=True)
        for old in self._cases.glob(f"{finding.slug}-????????"):
            old.unlink()
        (self._cases / f"{finding.slug}-{hashlib.sha256(data).hexdigest()[:8]}").write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--engine", choices=("atheris", "random"), required=True)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args()
    {"atheris": with_atheris, "random": at_random}[args.engine](args)


def with_atheris(args: argparse.Namespace) -> None:
    """Does not return: libFuzzer ends the process when the time is over."""
    import atheris

    with atheris.instrument_imports(include=["llama_jax"]):
        from fuzz.targets import TARGETS
    read, seeds, mutate = prepared(TARGETS, args)
    for folder in ("corpus", "seeds", "artifacts"):
        (args.work / folder).mkdir(exist_ok=True)
    for i, seed in enumerate(seeds):
        (args.work / "seeds" / str(i)).write_bytes(seed)

    def custom(data: bytes, limit: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.1:
            return atheris.Mutate(data, limit)
        try:
            return mutate(data, rng)[:limit]
        except Exception:  # libFuzzer would take it for a finding
            traceback.print_exc()
            os._exit(1)

    options = {
        "max_total_time": args.seconds,
        "max_len": MAX_BYTES,
        "timeout": HANGS,
        "rss_limit_mb": 4096,
        "artifact_prefix": f"{args.work / 'artifacts'}/",
        "seed": args.seed,
        "print_final_stats": 1,
    }
    folders = [str(args.work / "corpus"), str(args.work / "seeds")]
    arguments = [sys.argv[0], *(f"-{key}={value}" for key, value in options.items()), *folders]
    atheris.Setup(arguments, Recorder(read, args.cases), custom_mutator=custom)
    atheris.Fuzz()


def prepared(targets: Mapping[str, Target], args: argparse.Namespace) -> tuple[Read, list[bytes], Mutator]:
    """The function to fuzz, the seeds, and how to make inputs of them. The caller imports the targets in its way."""
    if args.target not in targets:
        sys.exit(f"no target {args.target}; there are {', '.join(targets)}")
    target = targets[args.target]
    read, seeds = target.prepare(args.work / "files")
    return read, seeds, target.mutator(seeds)


def at_random(args: argparse.Namespace) -> None:
    from fuzz.targets import TARGETS

    read, seeds, mutate = prepared(TARGETS, args)
    record, rng = Recorder(read, args.cases), random.Random(args.seed)
    for seed in seeds:
        record(seed)
    end = time.monotonic() + args.seconds
    while time.monotonic() < end:
        data = rng.choice(seeds)
        for _ in range(rng.choice((1, 1, 2, 4))):
            data = mutate(data, rng)[:MAX_BYTES]
        record(data)
    print(f"stat::number_of_executed_units: {record.executions}")


if __name__ == "__main__":
    main()
