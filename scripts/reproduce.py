"""Measures static batches, the engine and the kernels for docs/benchmarks.md, one program after the other.

    python scripts/reproduce.py            # into measured/TARGET/
    python scripts/reproduce.py --list     # what would run here, and what would not, with the reason

Each row is a command of its own whose JSON goes to a file; a row whose file is there is not measured again, so that an
interrupted run resumes. `all.json` holds all rows, with this machine's report. Peers run where they are installed:
torch and transformers (group hf). Nothing else should use the machine meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from llama_jax.disk import write_file
from llama_jax.doctor import Report, doctor

SCRIPTS = Path(__file__).parent
COMMAND = (sys.executable, "-m", "llama_jax.cli")
ENGINE = ("--context", "2432", "--strict", "--rounds", "1")
"""One context for all of the engine's rows: they share their programs."""
BYTES_8B = 22e9
"""An 8B model in bfloat16, and room for its cache."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A measurement.

    Attributes:
      name: of its file, without `.json`.
      command: prints or writes one JSON object.
      writes: whether the command takes `--json FILE`; else its standard output is kept.
      without: why it cannot run here; empty if it can.
    """

    name: str
    command: tuple[str, ...]
    writes: bool = True
    without: str = ""


def rows(report: Report) -> Iterator[Row]:
    """All rows, for the devices of a report."""
    gpu = report.backend != "cpu" and bool(report.devices)
    memory = (report.devices[0]["memory"] or 0) if gpu else 0
    no_gpu = "" if gpu else "needs a GPU"
    large = no_gpu or ("" if memory >= BYTES_8B else f"needs {BYTES_8B / 1e9:.0f} GB of GPU memory")
    torch = "" if importlib.util.find_spec("transformers") else "needs torch and transformers (uv sync --group hf)"
    batches = [word for batch in (1, 8, 32, 64) for word in ("--batch", str(batch))]
    for preset, without in (("llama-3.1-8b", large), ("llama-3.2-1b", no_gpu)):
        random = ("--preset", preset)
        static = (*COMMAND, "bench", *random, "--prompt", "512", *batches, "--json")
        yield Row(f"static-{preset}", static, writes=False, without=without)
        for weights in ("int8", "int4"):
            quantised = (*COMMAND, "bench", *random, "--prompt", "512", *batches, "--weights", weights, "--json")
            yield Row(f"static-{preset}-{weights}", quantised, writes=False, without=without)
    random = ("--preset", "llama-3.1-8b")
    for mix in ("sharegpt", "prefix", "fixed"):
        yield Row(f"engine-{mix}", (*COMMAND, "bench", "throughput", *random, "--mix", mix, *ENGINE), without=large)
    static = ("--mix", "sharegpt", "--static", "64", *ENGINE)
    yield Row("engine-static", (*COMMAND, "bench", "throughput", *random, *static), without=large)
    yield Row("engine-latency", (*COMMAND, "bench", "latency", *random, *ENGINE), without=large)
    for rate in ("4", "8", "16"):
        load = ("--mix", "chat", "--requests", "128", "--rate", rate, *ENGINE[:3])
        yield Row(f"engine-chat-{rate}", (*COMMAND, "bench", "serve", *random, *load), without=large)
    for name in ("attention", "moe", "quantized"):
        yield Row(f"kernels-{name}", (sys.executable, str(SCRIPTS / f"bench_{name}.py")), without=no_gpu)
    yield Row("cpu-static", (*COMMAND, "bench", "--json"), writes=False, without="needs no GPU" if gpu else "")
    small = ("bench", "throughput", "--mix", "mixed", "--rounds", "1")
    yield Row("cpu-engine-mixed", (*COMMAND, *small), without="needs no GPU" if gpu else "")
    yield Row("cpu-transformers", (sys.executable, str(SCRIPTS / "bench_transformers.py")), without=torch)


def run(row: Row, folder: Path) -> bool:
    """Runs a row; True if its file is there then. What it says goes to `NAME.log`."""
    result, log = folder / f"{row.name}.json", folder / f"{row.name}.log"
    unfinished = result.with_suffix(".unfinished")
    command = [*row.command, "--json", str(unfinished)] if row.writes else list(row.command)
    with log.open("wb") as said:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=said, check=False)
        if row.writes:
            said.write(done.stdout)
    if not row.writes:
        unfinished.write_bytes(done.stdout)
    try:
        json.loads(unfinished.read_bytes())
    except (OSError, ValueError):
        return False
    if done.returncode:
        return False
    unfinished.rename(result)
    return True


def main() -> None:
    """Measures what is missing, then writes `all.json` and the charts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="default: measured/TARGET")
    parser.add_argument("--list", action="store_true", help="show the rows, and run nothing")
    args = parser.parse_args()
    report = doctor()
    target = (report.system["targets"] or [report.backend or "none"])[0]
    folder: Path = args.folder or Path("measured") / target
    found = list(rows(report))
    if not args.list:
        folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for i, row in enumerate(found, 1):
        head = f"[{i}/{len(found)}] {row.name}: "
        if row.without or args.list or (folder / f"{row.name}.json").exists():
            print(head + (row.without or ("would run" if args.list else "there already")), flush=True)
            continue
        print(head + " ".join(row.command[1:]), flush=True)
        began = time.monotonic()
        if run(row, folder):
            print(f"    {time.monotonic() - began:.0f} s", flush=True)
        else:
            failed.append(row.name)
            print(f"    failed; see {folder / row.name}.log", flush=True)
    if args.list:
        return
    results = {row.name: folder / f"{row.name}.json" for row in found}
    measured = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in results.items() if path.exists()}
    everything = {"report": dataclasses.asdict(report), "measured": measured}
    write_file(folder / "all.json", json.dumps(everything, indent=1).encode())
    subprocess.run([sys.executable, str(SCRIPTS / "charts.py"), "--measured", str(folder)], check=True)
    print(f"{len(measured)} of {len(found)} rows are in {folder / 'all.json'}, charts beside it")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
