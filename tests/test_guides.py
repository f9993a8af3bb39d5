"""The guides run, and print what they say they print."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import guides

from llama_jax import plugins

NUMBER = re.compile(r" *-?\d+\.\d+")  # with the spaces before it: a zero may or may not have a sign
NEEDS = {"lm-eval": "lm_eval"}


def same(found: str, expected: str) -> bool:
    """Whether two texts are equal up to the rounding of their fractions."""
    if NUMBER.sub("#", found) != NUMBER.sub("#", expected):
        return False
    pairs = zip(NUMBER.findall(found), NUMBER.findall(expected), strict=True)
    return all(float(a) == pytest.approx(float(b), rel=0.03, abs=0.03) for a, b in pairs)


@pytest.mark.timeout(1200)
@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    # XLA takes longer to optimise what the others run than that saves.
    [pytest.param(page, marks=pytest.mark.optimized) if page.stem == "lora" else page for page in guides.pages()],
    ids=lambda page: page.stem,
)
def test_guide(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("LLAMA_JAX_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    plugins.load.cache_clear()  # a guide may install one
    try:
        text, _ = guides.run(page)
    finally:
        plugins.load.cache_clear()
    blocks = zip(guides.CODE.finditer(text), guides.CODE.finditer(page.read_text(encoding="utf-8")), strict=True)
    for now, stored in blocks:
        assert same(now["text"] or "", stored["text"] or ""), now["text"]


def test_guides_are_listed_and_have_their_pictures() -> None:
    listed = (guides.FOLDER / "index.md").read_text(encoding="utf-8")
    for page in guides.pages():
        assert f"]({page.name})" in listed
        assert "```text\n```" not in page.read_text(encoding="utf-8")  # it has been run
        compile(guides.code(page), page.name, "exec")
    assert {path.stem for path in guides.FOLDER.glob("*.svg")} == guides.PICTURES.keys()


def test_comparison() -> None:
    assert same("a 1.00 (0.5)", "a 1.01 (0.5)")
    assert same("a  0.00 b", "a -0.00 b")
    assert not same("a 1.00", "a 1.10")
    assert not same("a 1.00", "b 1.00")
    assert not same("3 of 4", "4 of 4")
