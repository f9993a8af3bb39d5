"""Every kernel on every AMD architecture stays within its budgets, by results that are as old as the kernels' sources.

`scripts/amd_sweep.py` compiles and writes them. Here their age and their numbers are checked, and a few kernels are
compiled again.
"""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llama_jax.aot.compiler import topology
from llama_jax.aot.compiler.instructions import Loop, main_loop, matrix_instructions
from llama_jax.kernels.dispatch import tables
from llama_jax.kernels.dispatch.cases import Case
from llama_jax.kernels.dispatch.fingerprint import source_hash
from llama_jax.kernels.registry import OPERATIONS, operation
from llama_jax.targets import find

ROOT = Path(__file__).parents[1]
ARCHS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1151", "gfx1201")


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


sweep: Any = load_script("amd_sweep")


KERNELS = [name for name in OPERATIONS if sweep.BACKEND in operation(name).backends]


def results_of(arch: str, op: str) -> dict[str, Any]:
    return json.loads((ROOT / "tests" / "amd_budgets" / f"{arch}.json").read_text())["operations"][op]


# --- The results that are stored --------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("arch", ARCHS)
def test_results_are_of_these_sources(arch: str, op: str) -> None:
    results = results_of(arch, op)
    assert results["made_with"]["sources"] == source_hash(op), "the kernels have changed: run scripts/amd_sweep.py"
    assert results["made_with"]["compiler"] == results["made_with"]["jax"]
    labels = [label for label, _, _ in sweep.variants(operation(op))]
    assert list(results["cases"]) == labels
    assert len(set(labels)) == len(labels) > 3


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_exceeds_its_budget(arch: str, op: str) -> None:
    results, target = results_of(arch, op), find(sweep.TARGETS[arch])
    assert target.arch == arch
    assert sweep.problems_of(arch, op, results, target) == []
    kernels = [kernel for entry in results["cases"].values() for kernel in entry.get("kernels", ())]
    assert kernels
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


@pytest.mark.amd
@pytest.mark.parametrize(
    ("arch", "op"), [("gfx942", "flash_attention"), ("gfx1100", "decode_attention"), ("gfx942", "moe")]
)
def test_one_case_compiles_within_its_budget(arch: str, op: str) -> None:
    """To what is stored, where that is of this compiler; plugins for different generations of ROCm count as one."""
    label, case, gradients = next(iter(sweep.variants(operation(op))))
    target, stored = find(sweep.TARGETS[arch]), results_of(arch, op)
    found = sweep.compile_case(operation(op), case, gradients, target)
    assert [problem for kernel in found["kernels"] for problem in sweep.exceeded(kernel, target)] == []
    if stored["made_with"]["compiler"] == topology.compiler()[1]:
        assert found == stored["cases"][label]


@pytest.mark.amd
@pytest.mark.slow
@pytest.mark.sampled(3)
@pytest.mark.timeout(900)
@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("arch", ARCHS)
def test_cases_compile_to_what_is_stored(arch: str, op: str) -> None:
    """Each case is compiled for one architecture, another one after each change of the kernels."""
    turn = (ARCHS.index(arch) + int(source_hash(op), 16)) % len(ARCHS)
    stored, compiler = results_of(arch, op), topology.compiler()[1]
    if stored["made_with"]["compiler"] != compiler:
        pytest.skip(f"the results are of compiler {stored['made_with']['compiler']}, this is {compiler}")
    cases = list(sweep.variants(operation(op)))
    assert {label for label, _, _ in cases} == set(stored["cases"])
    for label, case, gradients in cases[turn :: len(ARCHS)]:
        found = sweep.compile_case(operation(op), case, gradients, find(sweep.TARGETS[arch]))
        assert found == stored["cases"][label], label


def test_the_main_loop_of_a_kernel() -> None:
    """Machine code by hand: an outer loop with an innermost one in it, which loads twice and multiplies three times."""
    nop, end = [0xBF800000], [0xBF810000]
    product_32, product_16 = [0xD3E00000, 0], [0xD3E10000, 0]
    wide, narrow = [0xDC008000 | 23 << 18, 0], [0xDC008000 | 20 << 18, 0]

    def back(words: int) -> list[int]:
        return [0xBF850000 | (-words - 1 & 0xFFFF)]

    body = [*product_32, *wide, *narrow, *product_16, *product_16, *nop]
    inner = [*body, *back(len(body))]
    outer = [*product_32, *inner, *nop]
    words = [*nop, *outer, *back(len(outer)), *end]
    code = struct.pack(f"<{len(words)}I", *words)
    assert main_loop("gfx942", code) == Loop(7, 3, 32 + 16 + 16, 2, 1)
    assert main_loop("gfx90a", code) == Loop(7, 3, 0, 2, 1)  # its cycles are others
    assert main_loop("gfx942", struct.pack("<2I", *nop, *end)) is None
    assert main_loop("gfx1100", code) is None
    assert matrix_instructions("gfx942", code) == 4


def test_kernels_of_a_program() -> None:
    """Found inside of calls and loops, with what they multiply."""
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
    assert sweep.pallas_kernels(jaxpr) == {"product": {"float32"}, "copy": set()}
    assert [sweep.plain(name) for name in ("a_b", "a_b_1", "a_b__2", "a_b_1__2")] == ["a_b"] * 4


# --- The page that is made of them ------------------------------------------------------------------------------------


def test_the_pages_of_kernels_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    docs: Any = load_script("kernel_docs")
    pages = [path.read_text(encoding="utf-8") for path in docs.PAGES]
    assert docs.filled(pages) == pages, "run scripts/kernel_docs.py"
    monkeypatch.setattr(docs, "sections", lambda measurements: {"choices": ""})
    with pytest.raises(ValueError, match=r"begin choices .* is on 0 pages"):
        docs.filled([page.replace("<!-- begin choices -->", "") for page in pages])


def test_floors_and_predictions() -> None:
    docs: Any = load_script("kernel_docs")
    target = find("mi300x")
    reading = Case("reading", lambda key: {}, bytes=target.bandwidth * 1e-4)
    assert docs._floor(reading, target, "bfloat16") == (pytest.approx(1e-4), "100 M")
    assert docs.predicted("moe", reading, "bfloat16") == "125"
    label, entry = next((k, e) for k, e in results_of("gfx942", "moe")["cases"].items() if "4096 tokens" in k)
    computing = Case(label, lambda key: {}, flops=target.rates.bf16 * 1e-3)
    busy = sum(kernel["loop"]["matrix_cycles"] for kernel in entry["kernels"])
    other = sum(4 * (kernel["loop"]["instructions"] - kernel["loop"]["matrix"]) for kernel in entry["kernels"])
    assert docs._floor(computing, target, "bfloat16")[1] == "1000 C"
    assert float(docs.predicted("moe", computing, "bfloat16")) == pytest.approx(1000 * (1 + other / busy), rel=1e-2)
