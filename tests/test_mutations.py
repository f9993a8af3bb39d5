"""Can the tests fail? Each mutation of `mutations.py` is made in a copy of the source, and its killers must notice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parent.parent
COPIED = ("llama_jax", "kernels", "convert", "scripts", "tests", "pyproject.toml")
SECONDS = 300

# Runs the named tests in the copy and reports, per test, how each phase ended and by which exception. The exit codes 90
# and 91 cannot come from pytest.
RUNNER = """
import json, sys
from pathlib import Path
import pytest
import llama_jax

copy, report, module, *tests = sys.argv[1:]
if Path(llama_jax.__file__) != Path(copy, "llama_jax", "__init__.py"):
    sys.exit(90)

class Recorder:
    def __init__(self):
        self.outcomes = {}
    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        result = yield
        if call.when == "call" or call.excinfo:
            self.outcomes[item.nodeid] = [call.when, call.excinfo.typename if call.excinfo else None]
        return result

recorder = Recorder()
options = ["-q", "--no-header", "--tb=short", "-m", "", "-p", "no:cacheprovider", "-n", "0"]
code = int(pytest.main([*options, *tests], plugins=[recorder]))
Path(report).write_text(json.dumps(recorder.outcomes))
if module and not Path(sys.modules[module].__file__).resolve().is_relative_to(copy):
    sys.exit(91)
sys.exit(code)
"""


def copy_source(folder: Path) -> Path:
    """The package, with its links, and the tests; their data is linked, since no test writes there."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in COPIED:
        if (ROOT / name).is_dir():
            skip = [ROOT / "tests" / "data"] if name == "tests" else []

            def ignore(at: str, names: list[str], skip: list[Path] = skip) -> set[str]:
                return {*ignored(at, names), *(n for n in names if Path(at, n) in skip)}

            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy2(ROOT / name, folder / name)
    (folder / "tests" / "data").symlink_to(ROOT / "tests" / "data")
    return folder


def module_name(file: str) -> str:
    """Import name of a source file: kernels/ and convert/ are imported through the links inside llama_jax."""
    parts = Path(file).with_suffix("").parts
    return ".".join(parts if parts[0] == "llama_jax" else ("llama_jax", *parts))


def run(copy: Path, tests: Iterable[str], module: str = "") -> tuple[int, dict[str, list[Any]], str]:
    """Exit code, [phase, exception or None] of each test, and what pytest printed."""
    ours = ("PYTEST_", "COVERAGE_", "COV_CORE_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    environment |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    report = copy / "outcomes.json"
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(copy), str(report), module, *tests],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    outcomes = json.loads(report.read_text()) if report.exists() else {}
    return done.returncode, outcomes, done.stdout + done.stderr


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
@pytest.mark.timeout(SECONDS + 60)
def test_killers_pass_without_a_mutation(tmp_path: Path) -> None:
    """The control: in an unchanged copy every killer passes."""
    killers = sorted({killer for m in MUTATIONS for killer in m.killers})
    code, outcomes, output = run(copy_source(tmp_path), killers)
    assert code == 0, output
    assert outcomes == {killer: ["call", None] for killer in killers}


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutation_is_killed(mutation: Mutation, tmp_path: Path) -> None:
    """Every killer fails, and by what it asserts: a mutation that merely crashes shows nothing about the tests."""
    copy = copy_source(tmp_path)
    file = copy / mutation.file
    file.write_text(file.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
    code, outcomes, output = run(copy, mutation.killers, module_name(mutation.file))
    assert code == 1, output  # pytest's "some tests failed"
    survived = [killer for killer in mutation.killers if outcomes.get(killer) == ["call", None]]
    assert not survived, f"{mutation.name} survived\n{output}"
    by_assertion = (["call", "AssertionError"], ["call", "Failed"])  # "Failed": pytest.raises saw no error
    assert all(outcomes.get(killer) in by_assertion for killer in mutation.killers), output
