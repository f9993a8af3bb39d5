"""Every kernel on every AMD architecture stays within its budgets, by results that are as old as the kernels' sources.

`scripts/amd_sweep.py` compiles and writes them. Here their age and their numbers are checked, and some are compiled again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llama_jax.kernels.dispatch import tables
from llama_jax.kernels.dispatch.fingerprint import source_hash
from llama_jax.kernels.registry import OPERATIONS, operation
from llama_jax.targets import find

ROOT = Path(__file__).parents[1]
ARCHS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1151", "gfx1201")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("amd_sweep", ROOT / "scripts" / "amd_sweep.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["amd_sweep"] = module
    spec.loader.exec_module(module)
    return module


sweep: Any = load_script()


@pytest.fixture
def compiler() -> str:
    """The version of the AMD compiler. Without it the tests that need it are skipped, but not where all must run."""
    try:
        return version("jax-rocm7-pjrt")
    except PackageNotFoundError:
        if os.environ.get("CI") or os.environ.get("LLAMA_JAX_REQUIRE_AMD"):
            raise
        pytest.skip("needs the AMD compiler: pip install 'llama-jax[rocm-aot]'")


def results_of(arch: str, op: str) -> dict[str, Any]:
    return json.loads((ROOT / "tests" / "amd_budgets" / f"{arch}.json").read_text())["operations"][op]


# --- The results that are stored --------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("arch", ARCHS)
def test_results_are_of_these_sources(arch: str, op: str) -> None:
    results = results_of(arch, op)
    assert results["made_with"]["sources"] == source_hash(op), "the kernels have changed: run scripts/amd_sweep.py"
    assert results["made_with"]["compiler"] == results["made_with"]["jax"]
    labels = [label for label, _, _ in sweep.variants(operation(op))]
    assert list(results["cases"]) == labels
    assert len(set(labels)) == len(labels) > 3


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_exceeds_its_budget(arch: str, op: str) -> None:
    results, target = results_of(arch, op), find(sweep.TARGETS[arch])
    assert target.arch == arch
    assert sweep.problems_of(arch, op, results, target) == []
    kernels = [kernel for entry in results["cases"].values() for kernel in entry.get("kernels", ())]
    assert any(kernel["matrix_instructions"] for kernel in kernels)
    for label, entry in results["cases"].items():
        assert ("unsupported" in entry) != bool(entry.get("kernels")), label


def test_auto_takes_only_kernels_that_were_compiled() -> None:
    """A table that chooses a Pallas kernel for an AMD architecture has the results of all its cases to show."""
    for file in (Path(tables.__file__).parents[1] / "table").glob("*.json"):
        for op, rules in tables.shipped(file.stem).items():
            if file.stem.startswith(("gfx", "amd")) and any(rule.backend == "pallas_triton" for rule in rules):
                assert file.stem in ARCHS
                supported = [e for e in results_of(file.stem, op)["cases"].values() if "kernels" in e]
                assert len(supported) > 3


# --- What counts as too much ------------------------------------------------------------------------------------------

FINE = {
    "name": "kernel",
    "vgpr": 128,
    "agpr": 0,
    "sgpr": 32,
    "spills": 0,
    "scratch_bytes": 0,
    "lds_bytes": 65536,
    "waves": 16,
    "occupancy": 1,
    "matrix_instructions": 1,
    "multiplies": True,
}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"multiplies": False, "matrix_instructions": 0}, None),
        ({"spills": 1}, "1 spilled registers"),
        ({"scratch_bytes": 4}, "4 bytes of scratch"),
        ({"lds_bytes": 65537}, "65537 bytes of local memory, of 65536"),
        ({"waves": 17}, "17 waves of 64, of 1024 threads"),
        ({"matrix_instructions": 0}, "without matrix instructions"),
        ({"matrix_instructions": None}, "without matrix instructions"),
        ({"occupancy": 0}, "no wave of it fits"),
        ({"occupancy": None}, "no wave of it fits"),
    ],
)
def test_budgets(changes: dict[str, Any], problem: str | None) -> None:
    found = sweep.exceeded(FINE | changes, find("mi300x"))
    if problem is None:
        assert found == []
    else:
        (said,) = found
        assert problem in said
        assert said.startswith("kernel: ")


def test_local_memory_of_a_larger_chip() -> None:
    assert sweep.exceeded(FINE | {"lds_bytes": 160 << 10}, find("mi355x")) == []
    assert sweep.exceeded(FINE | {"waves": 32}, find("rx7900xtx")) == []


def test_results_are_written_a_line_a_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sweep, "BUDGETS", tmp_path)
    kernel = FINE | {"loop": {"instructions": 10, "matrix": 4}}
    cases: dict[str, Any] = {"a": {"kernels": [kernel, kernel]}, "b": {"unsupported": "why, {not}"}}
    cases["c"] = {"kernels": [], "tiles": {"n": 1}}
    results = {"arch": "gfx942", "operations": {"moe": {"made_with": {"jax": "1"}, "cases": cases}}}
    sweep.dump(results)
    assert sweep.load("gfx942") == results
    lines = (tmp_path / "gfx942.json").read_text().splitlines()
    assert len([line for line in lines if '"vgpr"' in line and '"matrix"' in line]) == 2


# --- Compiled here and now --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("arch", "op"), [("gfx942", "flash_attention"), ("gfx1100", "decode_attention"), ("gfx942", "moe")]
)
def test_one_case_compiles_to_what_is_stored(arch: str, op: str) -> None:
    label, case, gradients = next(iter(sweep.variants(operation(op))))
    found = sweep.compile_case(operation(op), case, gradients, find(sweep.TARGETS[arch]))
    assert found == results_of(arch, op)["cases"][label]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("arch", ARCHS)
def test_all_cases_compile_to_what_is_stored(arch: str, op: str, compiler: str) -> None:
    stored = results_of(arch, op)
    if stored["made_with"]["compiler"] != compiler:
        pytest.skip(f"the results are of compiler {stored['made_with']['compiler']}, this is {compiler}")
    found = {
        label: sweep.compile_case(operation(op), case, gradients, find(sweep.TARGETS[arch]))
        for label, case, gradients in sweep.variants(operation(op))
    }
    assert found == stored["cases"]


def test_kernels_of_a_program() -> None:
    """Found inside of calls and loops, and whether they multiply."""
    from jax.experimental import pallas as pl

    def product(x_ref: Any, out_ref: Any) -> None:
        out_ref[...] = x_ref[...] @ x_ref[...]

    def copy(x_ref: Any, out_ref: Any) -> None:
        out_ref[...] = x_ref[...]

    def f(x: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        x = jax.jit(pl.pallas_call(product, out_shape=shape, interpret=True))(x)
        return jax.lax.fori_loop(0, 2, lambda i, x: pl.pallas_call(copy, out_shape=shape, interpret=True)(x), x)

    jaxpr = jax.make_jaxpr(f)(jnp.ones((16, 16))).jaxpr
    assert sweep.pallas_kernels(jaxpr) == {"product": True, "copy": False}
    assert [sweep.plain(name) for name in ("a_b", "a_b_1", "a_b__2", "a_b_1__2")] == ["a_b"] * 4
