"""Charts of measurements, drawn from docs/measured: docs/charts/*.svg, of the engine and of quantised weights.

    uv run --group docs python scripts/charts.py
    uv run --group docs python scripts/charts.py --check

`--check` draws them elsewhere, and fails where a stored chart is another: the data has changed since, or the drawing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

DOCS = Path(__file__).parents[1] / "docs"
MEASURED, CHARTS = DOCS / "measured", DOCS / "charts"
DEVICE, RATES = "h200", (4, 8, 16)
DARK, LIGHT, GREY = "#1f5a94", "#9cc3e6", "#b8b8b8"

matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "llama-jax",  # the same file each time
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "figure.constrained_layout.use": True,
    }
)


def measured(name: str) -> dict[str, Any]:
    """A result of the engine's benchmarks."""
    found: dict[str, Any] = json.loads((MEASURED / f"{DEVICE}-engine-{name}.json").read_text(encoding="utf-8"))
    return found


def throughput() -> None:
    """Output tokens a second of one job: static batches, the engine, the ideal schedule."""
    job, static = measured("sharegpt"), measured("static")
    same = ("mix", "requests", "seed", "scale")
    if [job["workload"][name] for name in same] != [static["workload"][name] for name in same]:
        raise SystemExit("the static batches are of other requests than the engine's")
    run = job["cold"]
    ideal = run["total_output_tokens"] / run["ideal_s"]
    rates = [static["static"]["output_tokens_per_second"], run["output_tokens_per_second"], ideal]
    names = [f"static batches of {static['static']['batch']}", "engine", "ideal schedule"]
    _, axes = plt.subplots(figsize=(6.4, 1.7))
    bars = axes.barh(names, rates, color=[GREY, DARK, LIGHT], height=0.6)
    axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(rates))
    work = job["workload"]
    axes.set_xlabel(f"output tokens a second, {work['requests']} requests of {work['mix']} at once")
    axes.set_title(_title(job), loc="left", fontsize=9)


def chat() -> None:
    """Time to the first token, and between tokens, at several arrival rates."""
    runs = [measured(f"chat-{rate}") for rate in RATES]
    figure, (first, between) = plt.subplots(1, 2, figsize=(6.4, 2.5))
    _pairs(first, runs, "ttft", ("p50", "p99"), "first token, ms")
    _pairs(between, runs, "itl", ("p50", "p95"), "between tokens, ms")
    figure.suptitle(_title(runs[0]), x=0.01, ha="left", fontsize=9)


def _pairs(axes: Axes, runs: list[dict[str, Any]], time: str, numbers: tuple[str, str], label: str) -> None:
    """Two percentiles of a time at each rate."""
    for shift, number, color in zip((-0.2, 0.2), numbers, (DARK, LIGHT), strict=True):
        values = [run[f"{number}_{time}_ms"] for run in runs]
        bars = axes.bar([i + shift for i in range(len(runs))], values, 0.38, color=color, label=number)
        axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=2)
    axes.set_xticks(range(len(runs)), [f"{run['request_rate']:g}" for run in runs])
    axes.set_xlabel("chats that begin a second")
    axes.set_ylabel(label)
    axes.margins(y=0.35)
    axes.legend(frameon=False, loc="upper left", ncols=2)


def quality() -> None:
    """The rise of log-perplexity over the bytes of the weights, a line a method."""
    found = json.loads((MEASURED / "quality-smollm2-135m.json").read_text(encoding="utf-8"))
    _, axes = plt.subplots(figsize=(6.4, 3.0))
    colors = {"rtn": GREY, "hqq": LIGHT, "awq": "#e0a030", "gptq": DARK}
    rows = [row for row in found["schemes"] if row["weights"] != "int4_g32_min"]  # the model's own grid
    for method, color in colors.items():
        points = [row for row in rows if row["method"] == method]
        sizes, rises = [row["bytes"] / 1e6 for row in points], [row["log_ratio"] for row in points]
        errors = [row["log_ratio_error"] for row in points]
        axes.errorbar(sizes, rises, errors, fmt="o", color=color, label=method, capsize=2)
    for weights in dict.fromkeys(row["weights"] for row in rows):
        top = max((row for row in rows if row["weights"] == weights), key=lambda row: row["log_ratio"])
        place = top["bytes"] / 1e6, top["log_ratio"]
        axes.annotate(weights, place, (3, 6), textcoords="offset points", rotation=30, fontsize=8)
    axes.set_xlabel("MB of weights")
    axes.set_ylabel("rise of log-perplexity")
    axes.margins(x=0.15, y=0.25)
    axes.set_title(f"{found['model']}, perplexity {rows[0]['reference_perplexity']:.2f}", loc="left", fontsize=9)
    axes.legend(frameon=False)


def _title(run: dict[str, Any]) -> str:
    return f"{run['device'].partition(' (')[0]}, {run['model']}, {run['dtype']}, random weights, jax {run['jax']}"


DRAWN: dict[str, Callable[[], None]] = {
    "engine-throughput.svg": throughput,
    "engine-chat.svg": chat,
    "quality.svg": quality,
}


def draw(folder: Path) -> None:
    """Draws every chart into a folder."""
    for name, chart in DRAWN.items():
        chart()
        plt.savefig(folder / name, metadata={"Date": None, "Creator": None})
        plt.close()


def main() -> None:
    """Draws the charts, or checks those that are stored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is stored, and change nothing")
    if not parser.parse_args().check:
        CHARTS.mkdir(exist_ok=True)
        draw(CHARTS)
        return
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder))
        stored = {path.name: path.read_bytes() for path in CHARTS.glob("*.svg")}
        if stored != {path.name: path.read_bytes() for path in Path(folder).iterdir()}:
            sys.exit("docs/charts is not what scripts/charts.py draws; run it and commit what it draws")


if __name__ == "__main__":
    main()
