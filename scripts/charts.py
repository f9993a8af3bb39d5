"""Draws docs/charts/*.svg, each for a light and a dark page: measurements of docs/measured, and the structure.

    uv run --group docs python scripts/charts.py
    uv run --group docs python scripts/charts.py --check
    uv run --group docs python scripts/charts.py --measured FOLDER

`--check` draws them elsewhere, and fails where a stored chart is another: the data has changed since, or the drawing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import pictures
from matplotlib.axes import Axes

from llama_jax.config import preset
from llama_jax.plan.costs import step_bytes

DOCS = Path(__file__).parents[1] / "docs"
MEASURED, CHARTS = DOCS / "measured", DOCS / "charts"
DEVICE = "h200"
DARK, LIGHT, GREY, AMBER, GREEN = "#3d7ab8", "#9cc3e6", "#a0a0a0", "#e0a030", "#4d9a6a"
INKS = {"": "#1c1c1c", "-dark": "#e4e4e4"}
"""Colours of text and lines, by the suffix of the file's name."""

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


def read(path: Path) -> dict[str, Any]:
    """A result of the benchmarks."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def static() -> None:
    """Decode rate over that of PyTorch, and the rate of a prompt batch, beside other engines."""
    found = read(MEASURED / "h100-static.json")
    engines = found["engines"]
    figure, (decode, prefill) = plt.subplots(1, 2, figsize=(6.4, 2.7), width_ratios=[4, 1.4])
    colors = dict(zip((engine["name"] for engine in engines), (DARK, LIGHT, AMBER, GREY), strict=True))
    batches = list(engines[0]["decode_tok_s"])
    for i, engine in enumerate(engines):
        # Steps are bound by reading: rates are compared as bytes a step over what the card of the run reads.
        shares = [_mbu(found, engine, batch) for batch in batches]
        places = [x + 0.2 * (i - 1.5) for x in range(len(batches))]
        bars = decode.bar(places, shares, 0.19, color=colors[engine["name"]], label=engine["name"])
        decode.bar_label(bars, [f"{share:.2f}"[1:] for share in shares], padding=1, fontsize=7)
        rate = engine["prefill_tok_s"]["8x512"]
        label = prefill.bar([i], [rate / 1000], 0.8, color=colors[engine["name"]])
        prefill.bar_label(label, [f"{rate / 1000:.1f}"], padding=1, fontsize=7)
    decode.set_xticks(range(len(batches)), batches)
    decode.set_xlabel("batch")
    decode.set_ylabel("decode: share of bandwidth (MBU)")
    decode.set_ylim(0, 1.18)
    decode.legend(frameon=False, ncols=4, fontsize=7, loc="upper left", columnspacing=1, handlelength=1)
    prefill.set_xticks([])
    prefill.set_ylabel("prefill 8 x 512: 1000 tok/s")
    figure.suptitle(_title(found), x=0.01, ha="left", fontsize=9)


def _mbu(found: dict[str, Any], engine: dict[str, Any], batch: str, new: int = 64) -> float:
    """Bytes that a step must read, over what the card reads in its time."""
    read = step_bytes(preset(found["model"]), 2, int(batch), found["prompt"] + new // 2)
    seconds = int(batch) / engine["decode_tok_s"][batch]
    share: float = read / seconds / (engine["read_tb_s"] * 1e12)
    return share


def throughput(job: dict[str, Any], static: dict[str, Any]) -> None:
    """Output tokens a second of one job: static batches, the engine, the ideal schedule."""
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


def chat(*runs: dict[str, Any]) -> None:
    """Time to the first token, and between tokens, at several arrival rates."""
    figure, (first, between) = plt.subplots(1, 2, figsize=(6.4, 2.5))
    _pairs(first, runs, "ttft", ("p50", "p99"), "first token, ms")
    _pairs(between, runs, "itl", ("p50", "p95"), "between tokens, ms")
    figure.suptitle(_title(runs[0]), x=0.01, ha="left", fontsize=9)


def _pairs(axes: Axes, runs: Sequence[dict[str, Any]], time: str, numbers: tuple[str, str], label: str) -> None:
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
    found = read(MEASURED / "quality-smollm2-135m.json")
    _, axes = plt.subplots(figsize=(6.4, 3.0))
    colors = {"rtn": GREY, "hqq": LIGHT, "awq": AMBER, "gptq": DARK}
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


ENGINE: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "engine-throughput": (throughput, ("engine-sharegpt", "engine-static")),
    "engine-chat": (chat, ("engine-chat-4", "engine-chat-8", "engine-chat-16")),
}
"""Charts of one device's engine, and the files that they are drawn from."""
OTHER: dict[str, Callable[[], None]] = {
    "static": static,
    "quality": quality,
    "rooms": pictures.rooms,
    "request": pictures.request,
    "tensor": pictures.tensor,
}


def charts(measured: Path, prefix: str = "") -> dict[str, Callable[[], None]]:
    """The engine's charts that can be drawn from the files in a folder."""
    found: dict[str, Callable[[], None]] = {}
    for name, (chart, sources) in ENGINE.items():
        paths = [measured / f"{prefix}{source}.json" for source in sources]
        if all(path.exists() for path in paths):
            found[name] = partial(chart, *map(read, paths))
    return found


def draw(drawn: dict[str, Callable[[], None]], folder: Path) -> None:
    """Draws charts into a folder, each in both inks."""
    folder.mkdir(exist_ok=True)
    for name, chart in drawn.items():
        for suffix, ink in INKS.items():
            matplotlib.rcParams.update(
                {
                    "text.color": ink,
                    "axes.labelcolor": ink,
                    "axes.edgecolor": ink,
                    "xtick.color": ink,
                    "ytick.color": ink,
                }
            )
            chart()
            plt.savefig(folder / f"{name}{suffix}.svg", transparent=True, metadata={"Date": None, "Creator": None})
            plt.close()


def main() -> None:
    """Draws the charts, or checks those that are stored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is stored, and change nothing")
    parser.add_argument("--measured", type=Path, metavar="FOLDER", help="draw the charts of reproduce.py's files there")
    args = parser.parse_args()
    if args.measured:
        draw(charts(args.measured), args.measured)
        return
    everything = charts(MEASURED, f"{DEVICE}-") | OTHER
    if not args.check:
        draw(everything, CHARTS)
        return
    with tempfile.TemporaryDirectory() as folder:
        draw(everything, Path(folder))
        stored = {path.name: path.read_bytes() for path in CHARTS.glob("*.svg")}
        if stored != {path.name: path.read_bytes() for path in Path(folder).iterdir()}:
            sys.exit("docs/charts is not what scripts/charts.py draws; run it and commit what it draws")


if __name__ == "__main__":
    main()
