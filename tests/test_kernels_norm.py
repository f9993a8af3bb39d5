"""The residual sum and its norm: the reference against numpy in float64, the kernel against the reference."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bench_norm as bench

from llama_jax.errors import KernelError
from llama_jax.kernels.checking.compare import worst_row_error
from llama_jax.kernels.norm import add_rms_norm, add_rms_norm_op, add_rms_norm_reference, pallas_triton, rms_norm
from llama_jax.kernels.norm.cases import norm_cases, norm_models, norm_shape
from llama_jax.kernels.norm.shapes import MEASURED, ROWS, SHAPES, NormShape
from llama_jax.kernels.norm.tiles import Tiles, candidates, default_tiles
from llama_jax.targets import TARGETS, find

GPUS = [target for target in TARGETS if target.vendor != "cpu"]
EPS = 1e-5
BACKENDS = ["reference", pytest.param("pallas_triton", marks=pytest.mark.gpu), "pallas_interpret"]


def arrays(*shape: int, dtype: str = "float32", seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng((seed, *shape))
    made = {
        "x": rng.standard_normal(shape),
        "delta": rng.standard_normal(shape),
        "weight": rng.random(shape[-1:]) + 0.5,
    }
    return {name: jnp.asarray(x, dtype) for name, x in made.items()}


def norm64(total: Any, weight: Any) -> np.ndarray:
    wide = np.asarray(total, np.float64)
    return wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + EPS) * np.asarray(weight, np.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 96), (7, 128), (1000,), (2, 1, 3, 20)], ids=str)
def test_against_float64(backend: str, shape: tuple[int, ...]) -> None:
    call = arrays(*shape)
    total, normed = jax.jit(partial(add_rms_norm, eps=EPS, backend=backend))(**call)
    assert total.shape == normed.shape == shape
    np.testing.assert_array_equal(total, np.asarray(call["x"]) + np.asarray(call["delta"]))
    np.testing.assert_allclose(normed, norm64(total, call["weight"]), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_norm_is_that_of_the_rounded_sum(backend: str, dtype: str) -> None:
    """Where most of the sum cancels, its rounding is a large part of what is left over."""
    call = arrays(64, 96, dtype=dtype)
    call["delta"] = call["delta"] * jnp.asarray(2.0**-7, dtype) - call["x"]
    call["x"] = call["x"] + jnp.asarray(3, dtype)
    run = partial(add_rms_norm, eps=EPS, backend=backend)
    # In one program with its conversion back to float32, XLA may leave out the rounding of the sum.
    total, normed = run(**call) if backend == "reference" else jax.jit(run)(**call)
    exact = np.asarray(call["x"], np.float32) + np.asarray(call["delta"], np.float32)
    rounded = jnp.asarray(exact).astype(dtype)
    assert (exact != np.asarray(rounded, np.float32)).any()
    np.testing.assert_array_equal(total, rounded)
    # Rounded before the weight multiplies and after.
    step = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(normed, np.float64), norm64(rounded, call["weight"]), rtol=1.01 * step)


def test_the_reference_is_a_sum_and_a_norm() -> None:
    """Bit for bit what the model computed when these were two operations."""
    for dtype in ("float32", "bfloat16"):
        call = arrays(5, 96, dtype=dtype)

        def apart(x: jax.Array, delta: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
            total = x + delta
            return total, rms_norm(total, weight, EPS)

        together = jax.jit(partial(add_rms_norm, eps=EPS, backend="reference"))(**call)
        for mine, theirs in zip(together, jax.jit(apart)(**call), strict=True):
            assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [Tiles(1, 1), Tiles(2, 4), Tiles(8, 2), Tiles(16, 16)], ids=str)
def test_any_cut_gives_the_same(tiles: Tiles) -> None:
    """Also where the last program has fewer rows than the others, and rows fewer columns than a program."""
    for shape in [(7, 80), (16, 64), (1, 33)]:
        call = arrays(*shape)
        found = jax.jit(partial(pallas_triton.run, eps=EPS, tiles=tiles, interpret=True))(**call)
        assert worst_row_error(found, add_rms_norm_reference(**call, eps=EPS)) < 1e-6


def test_gradients() -> None:
    """Of both outputs, by all arguments; the sum's own gradient is not lost."""
    call = arrays(5, 96)

    def loss(run: Any, call: dict[str, jax.Array]) -> jax.Array:
        total, normed = run(**call, eps=EPS)
        return jnp.sum(jnp.sin(total) + total * normed**2)

    want = jax.grad(partial(loss, add_rms_norm_reference))(call)
    found = jax.grad(partial(loss, partial(add_rms_norm, backend="pallas_interpret")))(call)
    for name, gradient in want.items():
        np.testing.assert_allclose(found[name], gradient, rtol=1e-4, atol=1e-4, err_msg=name)
    low = {name: x.astype(jnp.bfloat16) for name, x in call.items()}
    found = jax.grad(partial(loss, partial(add_rms_norm, backend="pallas_interpret")))(low)
    assert {x.dtype.name for x in found.values()} == {"bfloat16"}


def test_what_is_not_supported() -> None:
    call = arrays(2, 16)
    for changes, reason in [
        ({"delta": call["delta"].astype(jnp.bfloat16)}, "float32 and bfloat16"),
        ({"x": call["x"].astype(jnp.int32), "delta": call["x"].astype(jnp.int32)}, "they have int32"),
        ({"delta": call["delta"][:1]}, "do not belong together"),
        ({"weight": call["weight"][:1]}, "do not belong together"),
        (arrays(0, 16), "no rows"),
        (arrays(1, 40000), "longer than 32768"),
    ]:
        with pytest.raises(KernelError, match=reason):
            add_rms_norm(**(call | changes), eps=EPS, backend="pallas_interpret")
    unsupported = add_rms_norm_op.backends["pallas_triton"].unsupported
    assert "GPUs only" in str(unsupported(find("cpu"), **call, eps=EPS))
    assert unsupported(find("mi300x"), **call, eps=EPS) is None
    huge = jax.ShapeDtypeStruct((2**20, 4096), jnp.bfloat16)
    assert "elements" in str(
        unsupported(find("mi300x"), huge, huge, jax.ShapeDtypeStruct((4096,), jnp.bfloat16), eps=EPS)
    )


@pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)
def test_tiles_fit(target: Any) -> None:
    for shape in (*SHAPES, NormShape(1, 32768), NormShape(4096, 32768), NormShape(1, 8)):
        sizes = {"rows": shape.rows, "hidden": shape.hidden}
        tiles = default_tiles(target, **sizes)
        assert tiles.fits(target, shape.hidden)
        for n in (tiles.rows, tiles.num_warps):
            assert n & (n - 1) == 0
        found = list(candidates(target, **sizes))
        assert found[0] == tiles
        assert len(set(found)) == len(found) > 1
        assert all(each.fits(target, shape.hidden) and each.rows <= max(shape.rows, 1) for each in found)
    assert default_tiles(target, rows=1, hidden=576).rows == 1
    assert default_tiles(target, rows=1 << 20, hidden=576).rows == 4


def test_shapes() -> None:
    assert norm_shape(**NormShape(64, 4096).example(jax.random.key(0))) == "h4096 few"
    assert norm_shape(jax.ShapeDtypeStruct((4, 128, 576), jnp.bfloat16)) == "h576 many"
    assert len({shape.name for shape in SHAPES}) == len(SHAPES)
    assert len({case.name for case in norm_cases()}) == len(norm_cases())
    assert [case.abstract()["x"].shape for case in norm_models({"hidden": 96})] == [(rows, 96) for rows in ROWS]
    assert MEASURED[0].bytes() == 5 * 2048 * 2


def lower(vendor: str, device_kind: str, units: int, shape: NormShape, tiles: Tiles) -> str:
    """StableHLO of a call for a GPU that is not here."""
    device = jax.sharding.AbstractDevice(device_kind=device_kind, num_cores=units, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        call = jax.jit(partial(pallas_triton.run, eps=EPS, tiles=tiles))
        platform = {"amd": "rocm", "nvidia": "cuda"}[vendor]
        traced = call.trace(**jax.eval_shape(shape.example, jax.random.key(0)))
        return str(traced.lower(lowering_platforms=(platform,)).as_text())


@pytest.mark.parametrize("shape", [*SHAPES, NormShape(3, 1000)], ids=lambda shape: shape.name)
def test_lowers_for_amd(shape: NormShape) -> None:
    """Triton's dialect has all that the kernel uses, and the call is one kernel."""
    target = find("mi300x")
    tiles = default_tiles(target, rows=shape.rows, hidden=shape.hidden)
    text = lower(target.vendor, target.arch, target.compute_units, shape, tiles)
    assert text.count("xla.gpu.triton") == 1
    assert "add_rms_norm" in text


def test_the_benchmark(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the CPU, with tiny shapes: what runs says how long, what cannot says why, a wrong backend is not timed."""
    monkeypatch.setattr(bench, "UNROLL", 1)
    out = tmp_path / "rows.json"
    tiny = ["--rows", "2", "--hidden", "32", "--dtype", "float32", "--calls", "2", "--repeats", "1"]
    backends = ["--backends", "reference", "pallas_interpret", "nonsense", "--sweep", "1"]
    rows = bench.main([*tiny, *backends, "--json", str(out)])
    assert [(row["backend"], "tiles" in row) for row in rows] == [
        ("reference", False),
        ("pallas_interpret", False),
        ("pallas_interpret", True),
        ("nonsense", False),
    ]
    assert all(row["relative_error"] < 1e-6 and row["us"] > 0 for row in rows[:3])
    assert "no backend" in rows[3]["failed"]
    assert json.loads(out.read_text())["rows"] == rows
    assert "TB/s" in capsys.readouterr().out
    call = arrays(2, 32)
    total, normed = add_rms_norm_reference(**call, eps=EPS)
    assert bench.relative_error((total, normed), call) < 1e-6
    assert bench.relative_error((total, normed * 1.1), call) > 0.09
    assert bench.relative_error((call["x"], rms_norm(call["x"], call["weight"], EPS)), call) > 0.3
