"""Can the tests fail? Each mutation of `mutations.py` is made in a process of its own, and its killers must notice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mutant
import pytest
from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parent.parent


def run(folder: Path, tests: Iterable[str], file: str | None = None, text: str = "") -> tuple[int, dict[str, Any], str]:
    """pytest's exit code, what `mutant.main` reports, and what pytest printed."""
    out, report = folder / "out.txt", folder / "report.json"
    process = mutant.fork_server().Process(target=mutant.main, args=(tuple(tests), file, text, out, report))
    process.start()
    try:
        process.join()
    finally:
        process.kill()  # a test that has timed out leaves none behind
    code, output = process.exitcode, out.read_text()
    assert report.exists(), output
    return code, json.loads(report.read_text()), output


# ---- the table


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_table(mutation: Mutation) -> None:
    """Each entry still fits the source: the old text occurs once, and the killers' functions exist."""
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1
    assert mutation.new not in (mutation.old, "")
    compile(text.replace(mutation.old, mutation.new), mutation.file, "exec")
    assert mutation.killers
    for killer in mutation.killers:
        file, _, test = killer.partition("::")
        assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8"), killer


def test_names_are_unique() -> None:
    assert len(MUTATIONS) >= 16
    assert max(Counter(m.name for m in MUTATIONS).values()) == 1
    assert max(Counter((m.file, m.old, m.new) for m in MUTATIONS).values()) == 1


# ---- the runs


@pytest.mark.slow
def test_killers_pass_without_a_mutation(tmp_path: Path) -> None:
    """The control, with every 16th killer: of the unchanged source they pass. The suite itself runs all of them."""
    killers = sorted({killer for m in MUTATIONS for killer in m.killers})[::16]
    code, report, output = run(tmp_path, killers)
    assert code == 0, output
    assert report["outcomes"] == {killer: ["call", None] for killer in killers}


@pytest.mark.slow
@pytest.mark.sampled(8)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutation_is_killed(mutation: Mutation, tmp_path: Path) -> None:
    """Every killer fails, and by what it asserts: a mutation that merely crashes shows nothing about the tests."""
    text = (ROOT / mutation.file).read_text(encoding="utf-8").replace(mutation.old, mutation.new)
    code, report, output = run(tmp_path, mutation.killers, mutation.file, text)
    assert report["loaded"], output
    assert code == 1, output  # pytest's "some tests failed"
    outcomes = report["outcomes"]
    survived = [killer for killer in mutation.killers if outcomes.get(killer) == ["call", None]]
    assert not survived, f"{mutation.name} survived\n{output}"
    by_assertion = (["call", "AssertionError"], ["call", "Failed"])  # "Failed": pytest.raises saw no error
    assert all(outcomes.get(killer) in by_assertion for killer in mutation.killers), output
