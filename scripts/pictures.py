"""Pictures of the structure for `charts.py`: the rooms as `pyproject.toml` orders them, and two flows."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

ROOT = Path(__file__).parents[1]
FILL, LINE = "#3d7ab8", "#9cc3e6"


def rooms() -> None:
    """The layers of the import rule: a room imports only rooms below it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    _, axes = plt.subplots(figsize=(6.4, 0.3 * len(layers) + 0.2))
    for depth, layer in enumerate(layers):
        names = re.findall(r"\w+", layer)
        width = 1 / len(names)
        for i, name in enumerate(names):
            _box(axes, i * width, -depth, width, 0.84, name)
    axes.annotate(
        "imports", (1.03, -len(layers) + 0.6), (1.03, -0.5), ha="center", arrowprops={"arrowstyle": "->"}, rotation=270
    )
    _frame(axes, (0, 1.08), (-len(layers), 1))


def request() -> None:
    """A request from HTTP to the device and back."""
    _flow(
        [
            ("client", "HTTP, chat, batch file"),
            ("server", "guard, body to request, chat template"),
            ("generation", "tokenizer, queue of a replica"),
            ("engine: scheduler", "rows, pages, chunks of prompts"),
            ("engine: programs", "one dispatch: forward, mask, sample"),
            ("generation", "stop strings, pieces of text"),
            ("client", "events, or one answer"),
        ]
    )


def tensor() -> None:
    """A token through the model: what one decode step computes."""
    _flow(
        [
            ("token ids [rows, 1]", ""),
            ("embedding", "[rows, 1, hidden_size]"),
            ("norm, qkv product, rope", "[rows, 1, heads, head_dim]"),
            ("cache write, decode attention", "keys and values of each row"),
            ("output product, all-reduce", "residual"),
            ("norm, gate, up, down or experts", "all-reduce, residual"),
            ("final norm, lm_head", "logits [rows, vocab_size]"),
            ("penalties, mask, sample", "next ids [rows]"),
        ],
        loop=(2, 5),
    )


def _flow(stations: Sequence[tuple[str, str]], loop: tuple[int, int] | None = None) -> None:
    """Stations under each other, with what each does beside it."""
    _, axes = plt.subplots(figsize=(6.4, 0.46 * len(stations) + 0.1))
    for i, (name, detail) in enumerate(stations):
        _box(axes, 0.06, -i, 0.4, 0.62, name)
        axes.text(0.49, -i + 0.31, detail, va="center", fontsize=8)
        if i:
            axes.annotate("", (0.26, -i + 0.64), (0.26, -i + 0.98), arrowprops={"arrowstyle": "->", "color": LINE})
    if loop:
        first, last = (-i + 0.31 for i in loop)
        axes.plot([0.055, 0.03, 0.03, 0.055], [first, first, last, last], color=LINE)
        axes.text(0.015, (first + last) / 2, "each layer", rotation=90, va="center", ha="center", fontsize=8)
    _frame(axes, (0, 1), (-len(stations) + 0.9, 0.7))


def _box(axes: Axes, x: float, y: float, width: float, height: float, name: str) -> None:
    axes.add_patch(Rectangle((x + 0.005, y), width - 0.01, height, facecolor=FILL, edgecolor="none"))
    axes.text(x + width / 2, y + height / 2, name, ha="center", va="center", color="white", fontsize=8)


def _frame(axes: Axes, xlim: tuple[float, float], ylim: tuple[float, float]) -> None:
    axes.set(xlim=xlim, ylim=ylim)
    axes.axis("off")
    for arrow in axes.texts:  # arrows take the ink of the page
        if isinstance(arrow, mpl.text.Annotation) and arrow.arrow_patch and arrow.get_text():
            arrow.arrow_patch.set_edgecolor(mpl.rcParams["text.color"])
