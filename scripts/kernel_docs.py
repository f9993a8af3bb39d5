"""Writes the tables of `docs/kernels.md` and `docs/kernels-products.md` from the shipped tables, the budgets, the table
of targets and measurements.

python scripts/kernel_docs.py           # writes; a test holds the pages equal to what this makes

Measurements are what `bench_attention.py` and `bench_moe.py` write with `--json`: `h100-attention.json` and
`h100-moe.json` in `docs/measured`. What several runs measured may lie in several files (`h100-attention-floors.json`);
of what was measured twice, the file whose name sorts last counts. None need be there, and none need hold every case.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp

from llama_jax.kernels.attention.shapes import MEASURED_DECODES, MEASURED_PREFILLS
from llama_jax.kernels.dispatch.cases import Case
from llama_jax.kernels.dispatch.operation import REFERENCE
from llama_jax.kernels.dispatch.tables import shipped_rules
from llama_jax.kernels.registry import OPERATIONS, operation
from llama_jax.targets import Target, find

ROOT = Path(__file__).parents[1]
PAGES = tuple(ROOT / "docs" / name for name in ("kernels.md", "kernels-products.md"))
BUDGETS = ROOT / "tests" / "amd_budgets"
MEASUREMENTS = ROOT / "docs" / "measured"
CHOICES = ("mi250x", "mi300x", "mi355x", "rx7900xtx", "radeon8060s", "rx9070xt", "h100", "cpu")
FLOORS = ("mi250x", "mi300x", "mi355x", "rx7900xtx", "rx9070xt", "h100")
PREDICTED, MEASURED_ON = "mi300x", "h100"
OTHER_CYCLES = 4
"""A wave of 64 on a SIMD of 16 lanes takes four cycles for an instruction."""
READ_SHARE = 0.8
"""Of the peak bandwidth, assumed for kernels that are bound by reading: the share that they aim at."""
Row = tuple[object, ...]
Report = dict[str, Any]
"""Results that a benchmark wrote."""
NOTHING = "Not measured yet."
NOT_YET, FAILED, NO_SUCH_CALL = "", "failed", "–"
KERNEL = "pallas_triton"
PEERS = ("stock", "torch_flash", "torch_cudnn", "torch_flex")
BESIDE: dict[str, tuple[Sequence[Any], tuple[str, ...]]] = {
    "flash_attention": (MEASURED_PREFILLS, ("reference", "cudnn", KERNEL, *PEERS)),
    "decode_attention": (MEASURED_DECODES, ("reference", KERNEL, *PEERS)),
}
"""By operation: the cases that are measured with every backend and peer, and these."""


def table(header: Row, rows: Iterator[Row]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _on_gpus(op: str) -> bool:
    """Whether there is a kernel for GPUs, which is held to a floor."""
    return "pallas_triton" in operation(op).backends


def choices() -> Iterator[Row]:
    """Operation by target: what `auto` takes first, for 16-bit arrays."""
    for name in OPERATIONS:
        cells = []
        for target in map(find, CHOICES):
            taken = [r for r in shipped_rules(name, target) if r.applies("bfloat16", "any")]
            named = dict.fromkeys(r.backend for r in taken if r.dtype != "*" or r is taken[0])
            cells.append(", else ".join(named) or REFERENCE)
        yield (f"`{name}`", *cells)


def budgets(arch: str) -> Iterator[Row]:
    """Each kernel by what it needs: cases that differ in registers and loops alone share a row of ranges."""
    results = json.loads((BUDGETS / f"{arch}.json").read_text(encoding="utf-8"))["operations"]
    for op in OPERATIONS:
        found: dict[Row, list[tuple[str, dict[str, Any]]]] = {}
        for label, entry in results.get(op, {"cases": {}})["cases"].items():
            for kernel in entry.get("kernels", ()):
                key = (kernel["name"], kernel["lds_bytes"], kernel["waves"], kernel["occupancy"])
                found.setdefault(key, []).append((label, kernel))
        for (name, lds_bytes, waves, occupancy), group in found.items():
            loops = [kernel["loop"] for _, kernel in group if "loop" in kernel]
            yield (
                f"`{name}`",
                f"{group[0][0]}{f' and {len(group) - 1} more' if len(group) > 1 else ''}",
                _range([kernel["vgpr"] for _, kernel in group], "{}"),
                f"{lds_bytes} bytes" if int(str(lds_bytes)) < 1024 else f"{int(str(lds_bytes)) / 1024:g} KiB",
                waves,
                occupancy,
                _range([loop["matrix"] / loop["instructions"] for loop in loops], "{:.0%}"),
                _range([loop["wide_loads"] / max(loop["loads"], 1) for loop in loops], "{:.0%}"),
            )


def _range(numbers: list[float], form: str) -> str:
    ends = [form.format(number) for number in (min(numbers), max(numbers))] if numbers else [""]
    return " to ".join(dict.fromkeys(ends))


def floors(op: str, reports: Sequence[Report]) -> Iterator[Row]:
    """Microseconds that each case takes at least on each target; what is predicted, and what has been measured."""
    found = measured(reports, op)
    for case in operation(op).models(None):
        dtype = jnp.dtype(next(iter(case.abstract().values())).dtype).name
        cells = [_floor(case, find(name), dtype) for name in FLOORS]
        yield (
            case.name,
            *(text for _, text in cells),
            predicted(op, case, dtype),
            fastest(found, op, case.name, dtype),
        )


def _floor(case: Case, target: Target, dtype: str) -> tuple[float, str]:
    rate = target.rates.of(dtype)
    compute = case.flops / rate if rate else 0.0
    memory = case.bytes / target.bandwidth
    seconds = max(compute, memory)
    return seconds, f"{_microseconds(seconds)} {'C' if compute > memory else 'M'}"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.3g}" if seconds < 1e-3 else f"{seconds * 1e6:.0f}"


def predicted(op: str, case: Case, dtype: str) -> str:
    """The floor divided by the share of it that the code can reach, as said on the page; "" if nothing says so."""
    seconds, text = _floor(case, find(PREDICTED), dtype)
    if text.endswith("M"):
        return _microseconds(seconds / READ_SHARE)
    path = BUDGETS / f"{find(PREDICTED).arch}.json"
    entry: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["operations"].get(op, {"cases": {}})["cases"]
    loops = [kernel["loop"] for kernel in entry.get(case.name, {}).get("kernels", ()) if kernel["multiplies"]]
    if not loops or not all("matrix_cycles" in loop for loop in loops):
        return ""
    busy = sum(loop["matrix_cycles"] for loop in loops)
    other = sum(OTHER_CYCLES * (loop["instructions"] - loop["matrix"]) for loop in loops)
    return _microseconds(seconds * (busy + other) / busy)


def read_reports(folder: Path) -> list[Report]:
    """The files of measurements, in the order of their names."""
    paths = [p for kind in ("attention", "moe") for p in sorted(folder.glob(f"{MEASURED_ON}-{kind}*.json"))]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def measured(reports: Sequence[Report], op: str) -> list[dict[str, Any]]:
    """Rows of an operation without gradients, with the tiles that it takes by itself; of rows made twice, the later."""
    rows = [row for report in reports for row in report["rows"] if row["operation"] == op]
    rows = [row for row in rows if "tiles" not in row and not row.get("backward")]
    return list({(row["case"], row["dtype"], row["backend"]): row for row in rows}.values())


def fastest(rows: Sequence[dict[str, Any]], op: str, case: str, dtype: str) -> str:
    """Microseconds of the fastest of this project's backends and their share of the ceiling; its name unless it is our
    kernel."""
    ours = operation(op).backends
    mine = [r for r in rows if (r["case"], r["dtype"]) == (case, dtype) and r["backend"] in ours]
    done = [row for row in mine if "us" in row]
    if not done:
        return FAILED if mine else NOT_YET
    best = min(done, key=lambda row: row["us"])
    name = "" if best["backend"] == KERNEL else f", `{best['backend']}`"
    return f"{_microseconds(best['us'] * 1e-6)} ({best['share_of_ceiling']:.0%}{name})"


def beside(op: str, reports: Sequence[Report]) -> str:
    """The versions measured with, and a table of rates and shares of every backend and peer, the fastest in bold.

    Cases that have not been measured are left out.
    """
    cases, backends = BESIDE[op]
    rows = {(r["case"], r["dtype"], r["backend"]): r for r in measured(reports, op)}
    shown = [rows[key] for case in cases for name in backends if (key := (case.name, case.dtype, name)) in rows]
    if not shown:
        return NOTHING

    def lines() -> Iterator[Row]:
        for case in cases:
            mine = [rows.get((case.name, case.dtype, backend)) for backend in backends]
            if any(mine):
                best = min((row["us"] for row in mine if row and "us" in row), default=0)
                yield (case.name, *(_rate(row, best) for row in mine))

    header = ("Case", *(f"`{backend}`" for backend in backends))
    return f"{origin(reports, shown)}\n\n{table(header, lines())}"


def _rate(row: dict[str, Any] | None, best: float) -> str:
    if row is None:
        return NO_SUCH_CALL
    if "us" not in row:
        return FAILED
    rate = f"{row['TFLOP_per_s']:.0f}" if "TFLOP_per_s" in row else f"{row['TB_per_s']:.2f}"
    text = f"{rate} ({row['share_of_ceiling']:.0%})"
    return f"**{text}**" if row["us"] == best else text


def origin(reports: Sequence[Report], rows: Sequence[dict[str, Any]]) -> str:
    """The versions and ceilings of rows: a sentence for each run and dtype."""
    runs = [
        f"Measured on {report['device']} with jax {report['jax']}"
        + (f" and torch {report['torch']}" if "torch" in report else "")
        + f"; ceilings in {dtype}: {limits['read_bytes_per_s'] / 1e12:.2f} TB/s and "
        f"{limits['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s."
        for report in reports
        for dtype, limits in report["ceilings"].items()
        if any(row["dtype"] == dtype and any(row is one for one in rows) for row in report["rows"])
    ]
    return "\n".join(runs)


def sections(measurements: Path = MEASUREMENTS) -> dict[str, str]:
    """Name of each generated part of the pages, and its text."""
    reports = read_reports(measurements)
    budget = (
        "Kernel",
        "Case",
        "VGPRs",
        "LDS",
        "Waves",
        "Waves a SIMD",
        "MFMA of the main loop",
        "16-byte loads of its loads",
    )
    floor = ("Case", *(find(name).label or name for name in FLOORS), "MI300X, predicted", "H100, measured")
    return {
        "choices": table(("Operation", *(find(name).label or name for name in CHOICES)), choices()),
        "gfx942": table(budget, budgets("gfx942")),
        **{f"floors of {op}": table(floor, floors(op, reports)) for op in OPERATIONS if _on_gpus(op)},
        **{f"measured {op}": beside(op, reports) for op in BESIDE},
    }


def filled(pages: Sequence[str], measurements: Path = MEASUREMENTS) -> list[str]:
    """The pages with their generated parts made anew.

    Args:
      measurements: the folder of the files that benchmarks wrote.

    Raises:
      ValueError: a part has no place on any page, or several.
    """
    made = list(pages)
    for name, text in sections(measurements).items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        places = [n for n, page in enumerate(made) if begin in page and end in page]
        if len(places) != 1:
            raise ValueError(f"{begin} ... {end} is on {len(places)} pages")
        before, _, rest = made[places[0]].partition(begin)
        made[places[0]] = f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
    return made


if __name__ == "__main__":
    for path, text in zip(PAGES, filled([path.read_text(encoding="utf-8") for path in PAGES]), strict=True):
        path.write_text(text, encoding="utf-8")
