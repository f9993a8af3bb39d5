"""Rules for what readers see: the README's length, phrases that need a second reading, and files of a release."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

import llama_jax

ROOT = Path(__file__).parents[1]
PHRASES = {
    r"\bgoes? on where\b": "resumes",
    r"\bstands? (in|beside|with)\b": "is in, is beside",
    r"\bthe way back\b": "export, or the inverse",
    r"\bso many (tokens|rows|devices|steps|bytes|layers|pages)\b": "N, or this many",
    r"\bsums? over (the )?devices\b": "all-reduce",
    r'^ *r?"""What ': "a docstring begins with a verb or a noun",
}
"""Regular expressions, and the plain words in their place."""


def readable() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "*.md", "*.py", "*.toml", "*.ts", "*.sh"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a checkout")
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name) != Path(__file__) and path.is_file()]


def found(text: str) -> list[str]:
    """Lines with one of the phrases, and what to say in its place."""
    return [
        f"{line.strip()[:80]} -> {better}"
        for line in text.splitlines()
        for phrase, better in PHRASES.items()
        if re.search(phrase, line, re.IGNORECASE)
    ]


def test_phrases_that_need_a_second_reading() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in readable()}
    assert len(texts) > 500
    assert [f"{path.relative_to(ROOT)}: {line}" for path, text in texts.items() for line in found(text)] == []


def test_phrases_are_noticed() -> None:
    text = 'It goes on where it was.\n    """What a page is."""\nA sum over devices.\nfine, so many things\n'
    assert len(found(text)) == 3


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 90


def test_citation_has_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == llama_jax.__version__


def test_actions_are_pinned_to_commits() -> None:
    """A tag can be moved to other code; a commit cannot."""
    workflows = sorted((ROOT / ".github/workflows").glob("*.yml"))
    used = [use for path in workflows for use in re.findall(r"uses: (\S+)", path.read_text(encoding="utf-8"))]
    assert len(used) > 5
    assert [use for use in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", use)] == []
