"""Runs the guides in docs/guides, and renews what they print and their pictures.

    uv run --group docs python scripts/guides.py                       # all of them
    uv run --group docs python scripts/guides.py probe                 # one
    uv run --group docs python scripts/guides.py probe --script        # prints its code, as a script

A guide is a page whose ```python blocks run in order, in one namespace and an empty folder. A block of text behind
`<!-- output -->` holds what the block before it prints. tests/test_guides.py runs and compares them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "docs" / "guides"
CODE = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?P<output>\n<!-- output -->\n```text\n(?P<text>.*?)^```\n)?", re.S | re.M
)


def pages() -> list[Path]:
    """The guides, without their list."""
    return sorted(path for path in FOLDER.glob("*.md") if path.stem != "index")


def code(page: Path) -> str:
    """A guide's code, as one script."""
    return "\n\n".join(block["code"].rstrip() for block in CODE.finditer(page.read_text(encoding="utf-8"))) + "\n"


def run(page: Path) -> tuple[str, dict[str, Any]]:
    """Runs a guide in the working directory; returns the page with what it prints now, and its namespace."""
    text, namespace = page.read_text(encoding="utf-8"), {"__name__": "__main__"}
    parts, end = [], 0
    for block in CODE.finditer(text):
        printed = io.StringIO()
        line = text.count("\n", 0, block.start("code"))
        with contextlib.redirect_stdout(printed):  # empty lines make tracebacks point at the page's own
            exec(compile("\n" * line + block["code"], str(page), "exec"), namespace)
        if block["output"] is None:
            if printed.getvalue():
                raise SystemExit(f"{page}, line {line}: it prints, and no <!-- output --> follows")
            continue
        parts.append(text[end : block.start("text")])
        parts.append("".join(f"{row.rstrip()}\n" for row in printed.getvalue().splitlines()))
        end = block.end("text")
    return "".join(parts) + text[end:], namespace


# ---- pictures, drawn from a guide's variables


def perplexity(axes: Any, found: dict[str, Any]) -> None:
    """Surprise of each token."""
    axes.bar(range(len(found["pieces"])), found["surprise"], color="#1f5a94")
    axes.set_xticks(range(len(found["pieces"])), found["pieces"], rotation=60, ha="right")
    axes.set_ylabel("nats")


def probe(axes: Any, found: dict[str, Any]) -> None:
    """Accuracy by layer, and with shuffled labels."""
    layers = range(-1, len(found["accuracies"]) - 1)
    axes.plot(layers, found["accuracies"], color="#1f5a94", marker="o", markersize=3, label="continent")
    axes.plot(layers, found["chance"], color="#b8b8b8", marker="o", markersize=3, label="labels shuffled")
    axes.set_xlabel("layer (-1: embedding)")
    axes.set_ylabel("accuracy on 20 cities")
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False, loc="lower right")


def activation_patching(axes: Any, found: dict[str, Any]) -> None:
    """The share that is restored, by token and layer."""
    picture = axes.imshow(found["by_place"], aspect="auto", cmap="Blues", vmin=0, vmax=1, origin="lower")
    axes.set_xticks(range(len(found["words"])), found["words"], rotation=30)
    axes.set_ylabel("layer")
    axes.figure.colorbar(picture, label="restored")


PICTURES: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "perplexity": perplexity,
    "probe": probe,
    "activation-patching": activation_patching,
}


def draw(name: str, found: dict[str, Any]) -> None:
    """Draws a guide's picture beside its page."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "llama-jax", "font.size": 9})
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 2.8), layout="constrained")
    PICTURES[name](axes, found)
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)


def main() -> None:
    """Renews guides, or prints one as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *(page.stem for page in pages())])
    parser.add_argument("--script", action="store_true", help="print the code, and run nothing")
    asked = parser.parse_args()
    for page in pages():
        if asked.names and page.stem not in asked.names:
            continue
        if asked.script:
            print(code(page), end="")
            continue
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            text, found = run(page)
        page.write_text(text, encoding="utf-8")
        if page.stem in PICTURES:
            draw(page.stem, found)
        print(page.stem)


if __name__ == "__main__":
    main()
