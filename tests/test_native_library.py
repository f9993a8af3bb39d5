"""The CPU's library of `integer_matmul`: built here, against the reference, and under sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_integer import LAYOUTS, exact, example

from llama_jax.kernels.checking.compare import run_checks
from llama_jax.kernels.dispatch import operation as dispatch
from llama_jax.kernels.integer_matmul import (
    integer_matmul,
    integer_matmul_op,
    library,
    native,
)
from llama_jax.kernels.quantized_matmul.shapes import layout_of

pytestmark = [pytest.mark.slow, pytest.mark.skipif(library.compiler() is None, reason="there is no C++ compiler")]
FUZZ = Path(__file__).parent / "native" / "fuzz_products.cpp"


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    library.prepare()
    assert library.missing() is None


def test_cases() -> None:
    found = [check for check in run_checks({"integer_matmul": integer_matmul_op}) if check.backend == "native"]
    assert len(found) == len(integer_matmul_op.cases())
    assert [check for check in found if check.problem] == []


@settings(max_examples=25)
@given(
    layout=st.sampled_from(LAYOUTS),
    rows=st.integers(1, 9),
    out=st.integers(1, 50),
    groups=st.integers(1, 7),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_shape(layout: str, rows: int, out: int, groups: int, seed: int, data: st.DataObject) -> None:
    """By every set of instructions; a number that is none is one of its row alone."""
    instructions = data.draw(st.sampled_from(library.instructions()))
    x, members = example(layout, rows, out, (layout_of(layout).group or 32) * groups, seed)
    if seed % 5 == 0:
        x[seed % rows, seed % x.shape[1]] = np.nan
    found = native.run(
        jnp.asarray(x), jax.tree.map(jnp.asarray, members), layout=layout_of(layout), instructions=instructions
    )
    expected = exact(x, members, layout)
    scale = np.nanmax(np.abs(expected), initial=1e-3)
    np.testing.assert_allclose(found / scale, expected / scale, atol=5e-6)


def test_within_programs() -> None:
    """Chosen by itself, in a loop, over a weight of several dimensions and a batch."""
    x, members = (jax.tree.map(jnp.asarray, each) for each in example("int4_g32_min", 6, 2 * 24, 96))
    joint = {name: member.reshape(2, 24, *member.shape[1:]) for name, member in members.items()}
    layout = layout_of("int4_g32_min")

    @jax.jit
    def repeated(x: jax.Array) -> jax.Array:
        none = jnp.zeros((2, 3, 2, 24), jnp.float32)
        return jax.lax.fori_loop(0, 3, lambda _, y: y + integer_matmul(x, joint, layout=layout), none)

    assert "llama_jax_integer_matmul" in repeated.lower(x.reshape(2, 3, 96)).as_text()
    expected = 3 * exact(np.asarray(x), jax.tree.map(np.asarray, members), "int4_g32_min").reshape(2, 3, 2, 24)
    np.testing.assert_allclose(repeated(x.reshape(2, 3, 96)), expected, rtol=1e-4, atol=1e-3)


def test_what_it_refuses() -> None:
    x, members = (jax.tree.map(jnp.asarray, each) for each in example("int8", 1, 8, 48))
    assert "multiples of 32" in str(native.unsupported(dispatch.current(), x, members, layout=layout_of("int8")))
    x, members = (jax.tree.map(jnp.asarray, each) for each in example("int8", 1, 8, 64))
    with pytest.raises(Exception, match="does not have sse9"):
        jax.block_until_ready(native.run(x, members, layout=layout_of("int8"), instructions="sse9"))
    short = members | {"scales": members["scales"][:4]}
    with pytest.raises(Exception, match="do not belong together"):
        jax.block_until_ready(native.run(x, short, layout=layout_of("int8")))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that has built nothing, with sources of its own."""
    monkeypatch.setattr(library, "_loaded", [])
    monkeypatch.setattr(library, "_problem", [])
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    shutil.copytree(library.SOURCES, tmp_path / "cpp")
    monkeypatch.setattr(library, "SOURCES", tmp_path / "cpp")
    monkeypatch.setattr(library, "TARGET", "llama_jax_of_a_test")
    return tmp_path / "cpp"


def rename_handler(sources: Path) -> None:
    main = sources / "integer_matmul.cpp"
    main.write_text(main.read_text().replace("SYMBOL(llama_jax_integer_matmul", "SYMBOL(llama_jax_of_a_test"))


def test_a_library_that_computes_wrong_is_not_used(fresh: Path) -> None:
    rename_handler(fresh)
    rounding = fresh / "activations.h"
    rounding.write_text(rounding.read_text().replace("size / 127.0f", "size / 126.0f"))
    said: list[str] = []
    before = dispatch.disabled()
    try:
        library.prepare(said.append)
        assert "it was wrong on this processor" in dispatch.disabled()["integer_matmul", "native"]
    finally:
        dispatch._disabled.set_global(tuple(before.items()))
    assert "a row is off by" in said[-1]
    assert not library.path().exists()


def test_sources_that_do_not_compile(fresh: Path) -> None:
    (fresh / "product.h").write_text("#error no such processor\n")
    said: list[str] = []
    library.prepare(said.append)
    assert "no such processor" in said[-1]
    assert "no such processor" in str(library.missing())
    assert not library.path().exists()


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    """Shapes of all kinds in buffers of exactly their size, compared with float64."""
    compiler = library.compiler()
    assert compiler is not None
    flags = ["-std=c++17", "-O1", "-g", "-pthread", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    command = [compiler, *flags, f"-I{library.SOURCES}", str(FUZZ), "-o", str(tmp_path / "fuzz")]
    done = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in done.stderr:
        pytest.skip(f"the compiler has no library for -fsanitize={sanitizer}")
    assert done.returncode == 0, done.stderr
    ran = subprocess.run([tmp_path / "fuzz", "150", "1"], capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stdout + ran.stderr
    assert ran.stdout.split() == list(library.instructions())
