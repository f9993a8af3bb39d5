"""A forked process that runs tests on a mutated module; `test_mutations.py` starts it through `multiprocessing`.

What never mutates (`PRELOADED`) is imported once, by multiprocessing's fork server, before JAX has a backend or any of
the project's modules is loaded. A mutant is a fork of that, in which the import system gives one module another text.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import sys
from collections.abc import Generator, Sequence
from importlib.abc import MetaPathFinder
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PRELOADED = ("jax", "jax.experimental.pallas.triton", "orbax.checkpoint", "flax.nnx", "pytest", "hypothesis", "gguf")


class Mutated(importlib.machinery.SourceFileLoader):
    """Loads a module from a text in place of its file's; no byte code of it is read or written."""

    def __init__(self, name: str, path: str, text: str) -> None:
        super().__init__(name, path)
        self.text, self.loaded = text, False

    def path_stats(self, path: Any) -> Any:
        raise OSError("as if the file had no time of change, which byte code is compared with")

    def get_data(self, path: str) -> bytes:
        return self.text.encode()

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        self.loaded = True


class Finder(MetaPathFinder):
    def __init__(self, loader: Mutated) -> None:
        self.loader = loader

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.loader.name:
            return None
        return importlib.util.spec_from_file_location(name, self.loader.path, loader=self.loader)


class Recorder:
    """Of each test, how it ended: [phase, exception or None]."""

    def __init__(self) -> None:
        self.outcomes: dict[str, tuple[str, str | None]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        result = yield
        if call.when == "call" or call.excinfo:
            self.outcomes[item.nodeid] = (call.when, call.excinfo.typename if call.excinfo else None)
        return result


def module_name(file: str) -> str:
    """Import name of a source file: kernels/ and convert/ are imported through the links inside llama_jax."""
    parts = Path(file).with_suffix("").parts
    return ".".join(parts if parts[0] == "llama_jax" else ("llama_jax", *parts))


def fork_server() -> ForkServerContext:
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def main(tests: Sequence[str], file: str | None, text: str, out: Path, report: Path) -> None:
    """Runs the tests, with `text` in place of the source file `file`; exits with pytest's code.

    Writes to `report`, as JSON, the tests' outcomes, and whether the text was loaded as the module.
    """
    from jax._src import xla_bridge

    assert not xla_bridge.backends_are_initialized(), "the fork server has started a backend"
    assert not any(name.startswith("llama_jax") for name in sys.modules), "the fork server has loaded the project"
    log = os.open(out, os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # LLAMA_JAX_TEST_CACHE: nothing that a mutant has made may be found by others.
    for name in [n for n in os.environ if n.startswith(("PYTEST_", "COVERAGE_", "COV_CORE_", "LLAMA_JAX_TEST_CACHE"))]:
        del os.environ[name]
    if sys.pycache_prefix:
        sys.dont_write_bytecode = False  # as in conftest.py; the fork server has -B from those who started the tests
    os.chdir(ROOT)
    loader = Mutated(module_name(file), str(ROOT / file), text) if file else None
    if loader:
        sys.meta_path.insert(0, Finder(loader))
    recorder = Recorder()
    # Without a time limit here: one that is passed looks like a failed assertion. The test that waits for this has one.
    options = ["-q", "--no-header", "--tb=short", "-m", "", "-p", "no:cacheprovider", "-n", "0", "--timeout=0"]
    options += ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]  # hypothesis
    code = int(pytest.main([*options, *tests], plugins=[recorder]))
    report.write_text(json.dumps({"outcomes": recorder.outcomes, "loaded": loader.loaded if loader else None}))
    sys.exit(code)
