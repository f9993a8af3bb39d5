"""Every Python example in README.md and docs/ runs as it stands, and every relative link leads somewhere.

The blocks of one file share one namespace and run in order, in an empty folder. `<!-- skip: REASON -->` on the line
before a block leaves it out.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import hf_tensors

from llama_jax.config import config_from_hf
from llama_jax.convert import convert
from llama_jax.library import resolve
from llama_jax.loading import load
from llama_jax.params import flatten

ROOT = Path(__file__).parents[1]
PAGES = [
    p for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("C*.md"))) if p.exists()
]
BLOCK = re.compile(r"(?:^<!-- (?P<skip>skip\b.*?) -->\n+)?^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(?:#[^)]*)?\)")


def python_blocks(text: str) -> list[tuple[int, str]]:
    """(line of the first code line, code) of each ```python block that is not skipped.

    Raises:
      ValueError: a block is skipped without a reason.
    """
    blocks = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        skip = match["skip"]
        if skip is None:
            blocks.append((line, match["code"]))
        elif not re.fullmatch(r"skip: .*\w.*", skip):
            raise ValueError(f"line {line}: say why: `<!-- skip: REASON -->`")
    return blocks


SLOW = {
    "README.md",
    "activations.md",
    "adapters.md",
    "checkpoints.md",
    "engine.md",
    "python.md",
    "quickstart.md",
    "receipts.md",
    "scoring.md",
    "structured-output.md",
    "training.md",
}
"""Pages whose examples compile for a while."""

WHOLE = {"README.md", "activations.md", "python.md", "scoring.md"}
"""Slow pages that name a layer or a fact of the bundled model. The others get its first layers, which compile in a
fraction of the time."""
LAYERS = 4


@pytest.fixture(scope="module")
def first_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder whose bundled model has only its first layers."""
    model, folder, cache = resolve(), tmp_path_factory.mktemp("hf"), tmp_path_factory.mktemp("cache")
    hf = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(model / file, folder)
    (folder / "config.json").write_text(json.dumps(hf))
    leaves = {
        name: np.asarray(leaf) for name, leaf in flatten(load(model, dtype="float32", fuse=False)[0].params).items()
    }
    save_file(hf_tensors(config_from_hf(hf), leaves), folder / "model.safetensors", metadata={"format": "pt"})
    convert(folder, cache / "models" / model.name)
    return cache


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow) if page.name in SLOW else page
        for page in PAGES
        if page.parent.name != "guides"  # test_guides.py
    ],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_examples_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    if page.name in SLOW - WHOLE:
        monkeypatch.setenv("LLAMA_JAX_CACHE", str(request.getfixturevalue("first_layers")))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, code in python_blocks(page.read_text(encoding="utf-8")):
        # Empty lines in front make tracebacks point at the page's own lines.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert [link for link in LINK.findall(text) if not (page.parent / link).exists()] == []


def test_blocks_are_found_with_their_lines() -> None:
    text = "a\n```python\nx = 1\n```\n```bash\nrm\n```\n"
    text += "<!-- skip: needs a GPU -->\n```python\nboom\n```\n\n```python\ny = x\n```\n"
    assert python_blocks(text) == [(3, "x = 1\n"), (14, "y = x\n")]


@pytest.mark.parametrize("marker", ["<!-- skip -->", "<!-- skip: -->"])
def test_skipping_needs_a_reason(marker: str) -> None:
    with pytest.raises(ValueError, match="line 3"):
        python_blocks(f"{marker}\n```python\nboom\n```\n")
