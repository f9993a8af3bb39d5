"""The routed experts in Pallas: the schedule, both products in interpret mode, gradients, limits, lowering for GPUs."""

from __future__ import annotations

import dataclasses
import functools
import json
import runpy
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh
from test_kernels_moe import brute_force

from llama_jax.errors import KernelError
from llama_jax.kernels.dispatch import Backend
from llama_jax.kernels.moe import pallas_triton, routed_experts, routed_experts_op
from llama_jax.kernels.moe.pallas_triton import Tiles, candidates, default_tiles
from llama_jax.kernels.moe.schedule import schedule, tile_count
from llama_jax.kernels.moe.shapes import DECODE_TOKENS, PREFILL_TOKENS, SHAPES, MoeShape
from llama_jax.targets import TARGETS, find

# Most are quick; together they take a while.
pytestmark = pytest.mark.slow

SMALL = Tiles(16, 16, 16, 32, 16, 1, num_warps=4, num_stages=1)
plan_of = jax.jit(schedule, static_argnums=(1, 2))
run = jax.jit(pallas_triton.run, static_argnames=("activation", "tiles", "interpret"))
BACKENDS = ["pallas_interpret", pytest.param("pallas_triton", marks=pytest.mark.gpu)]


@st.composite
def routings(draw: st.DrawFn, tokens: int, top_k: int, experts: int) -> np.ndarray:
    """expert_ids [tokens, top_k]: uneven, some experts without a token, or one with all."""
    favourites = draw(st.lists(st.integers(0, experts - 1), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.choice(np.array(favourites, np.int32), (tokens, top_k))


@hypothesis.given(st.data(), st.sampled_from([(1, 1, 3, 16), (20, 1, 1, 16), (50, 2, 8, 1), (97, 3, 40, 64)]))
def test_schedule(data: st.DataObject, sizes: tuple[int, int, int, int]) -> None:
    """Every pair is in one tile, a tile is of one expert and not too long, tiles of an expert are neighbours."""
    *shape, experts, block_rows = sizes
    ids = data.draw(routings(*shape, experts))
    order, expert, start, end = map(np.asarray, plan_of(ids, experts, block_rows))
    assert len(expert) == tile_count(ids.size, experts, block_rows)
    assert ((expert >= 0) & (expert < experts)).all()
    lengths = end - start
    assert ((lengths >= 0) & (lengths <= block_rows)).all()
    rows = np.concatenate([np.arange(a, b) for a, b in zip(start, end, strict=True)])
    np.testing.assert_array_equal(np.sort(order[rows]), np.arange(ids.size))
    np.testing.assert_array_equal(ids.reshape(-1)[order[rows]], np.repeat(expert, lengths))
    used = expert[lengths > 0]
    assert (np.diff(used) >= 0).all()
    # As few tiles as can be: all but the last of an expert are full.
    assert len(used) == sum(-(-n // block_rows) for n in np.bincount(ids.reshape(-1)))


@pytest.mark.parametrize(("pairs", "experts", "rows"), [(2, 8, 16), (128, 8, 16), (7, 3, 4), (8192, 8, 128)])
def test_the_worst_routing_needs_all_tiles(pairs: int, experts: int, rows: int) -> None:
    """One pair more than full tiles for every expert but the first."""
    groups = min(pairs, experts)
    ids = np.concatenate([np.arange(1, groups), np.zeros(pairs - groups + 1, int)]).astype(np.int32)
    plan = schedule(jnp.asarray(ids[:, None]), experts, rows)
    used = int((plan.end > plan.start).sum())
    assert used <= tile_count(pairs, experts, rows) <= used + groups - 1
    if (pairs - groups + 1) % rows == 1:
        assert used == tile_count(pairs, experts, rows)


def example(seed: int, tokens: int, top_k: int, experts: int, hidden: int, width: int, ids: Any = None) -> dict:
    """float32 arguments; ids by default at random, an expert perhaps twice."""
    rng = np.random.default_rng(seed)
    shapes = {"x": (tokens, hidden), "gate": (experts, width, hidden), "up": (experts, width, hidden)}
    shapes |= {"down": (experts, hidden, width), "input_scale": (tokens, top_k), "output_scale": (tokens, top_k)}
    case: dict[str, Any] = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return case | {"expert_ids": rng.integers(0, experts, (tokens, top_k), np.int32) if ids is None else ids}


NAMES = ("x", "expert_ids", "gate", "up", "down", "input_scale", "output_scale")

# Tokens, experts of each, experts, hidden and intermediate size: widths that tiles divide, and that they do not.
SIZES = {
    (1, 1, 3, 32, 64): (SMALL, ("input_scale", "output_scale")),
    (50, 2, 8, 40, 24): (Tiles(32, 32, 32, 16, 32, 3, num_warps=4, num_stages=2), ()),
    (20, 3, 4, 6, 5): (SMALL, ("input_scale",)),
    (97, 1, 40, 96, 33): (Tiles(32, 32, 32, 16, 16, 2, num_warps=4, num_stages=2), ("output_scale",)),
}


@hypothesis.given(st.data(), st.sampled_from(sorted(SIZES)), st.integers(0, 2**32 - 1))
def test_against_the_definition(data: st.DataObject, sizes: tuple[int, int, int, int, int], seed: int) -> None:
    tokens, top_k, experts, hidden, width = sizes
    tiles, without = SIZES[sizes]
    ids = data.draw(routings(tokens, top_k, experts))
    arguments = example(seed, tokens, top_k, experts, hidden, width, ids) | dict.fromkeys(without)
    out = run(**arguments, activation=jax.nn.silu, tiles=tiles, interpret=True)
    expected = brute_force(*(arguments[name] for name in NAMES))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "tokens", "dtype"),
    [
        (MoeShape(8, 2, 256, 448, "output"), 1, "bfloat16"),
        (MoeShape(4, 2, 128, 192, "output"), 200, "bfloat16"),
        (MoeShape(16, 1, 128, 320, "input"), 40, "float16"),
    ],
)
def test_sixteen_bits(backend: str, shape: MoeShape, tokens: int, dtype: str) -> None:
    """Small models with the tiles of real ones; inner sums are float32, so the result is nearer than the reference."""
    args = shape.example(jax.random.key(tokens), tokens, jnp.dtype(dtype))
    call = jax.jit(functools.partial(routed_experts, activation=jax.nn.silu), static_argnames="backend")
    out = call(**args, backend=backend)
    assert out.dtype == jnp.dtype(dtype)
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), args) | {"expert_ids": np.asarray(args["expert_ids"])}
    expected = brute_force(*(exact.get(name) for name in NAMES))
    error = np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)
    # Rounded once inside (activation * up) and once or twice at the end, each by at most half a unit in the last place.
    assert error < 0.6 * float(jnp.finfo(dtype).eps)


def test_activations() -> None:
    args = example(0, 9, 2, 4, 32, 48)
    for activation in (jax.nn.relu, functools.partial(jax.nn.gelu, approximate=True)):
        out = run(**args, activation=activation, tiles=SMALL, interpret=True)
        expected = routed_experts(**args, activation=activation)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def dense(x: Any, gate: Any, up: Any, down: Any, input_scale: Any, output_scale: Any, ids: np.ndarray) -> jax.Array:
    """Every expert for every token, then the chosen ones: no sorting, no ragged product."""
    rows = x[:, None] * input_scale[..., None]
    inner = jax.nn.silu(jnp.einsum("tkh,eih->tkei", rows, gate)) * jnp.einsum("tkh,eih->tkei", rows, up)
    chosen = jax.nn.one_hot(ids, gate.shape[0]) * output_scale[..., None]
    return jnp.einsum("tkeh,tke->th", jnp.einsum("tkei,ehi->tkeh", inner, down), chosen)


def test_gradients() -> None:
    args = example(3, 11, 2, 4, 24, 40)
    ids = args.pop("expert_ids")
    direction = np.random.default_rng(4).standard_normal((11, 24)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        wanted = jax.grad(lambda a: (dense(**a, ids=ids) * direction).sum())(args)

    def loss(args: dict) -> jax.Array:
        out = run(**args, expert_ids=ids, activation=jax.nn.silu, tiles=SMALL, interpret=True)
        return (out * direction).sum()

    for name, gradient in jax.grad(loss)(args).items():
        scale = np.abs(wanted[name]).max()
        assert scale > 0.1
        np.testing.assert_allclose(gradient, wanted[name], atol=2e-5 * scale, err_msg=name)
    # Without scales there is nothing to differentiate by them.
    x_gradient = jax.grad(lambda x: loss(args | {"x": x, "input_scale": None, "output_scale": None}))(args["x"])
    assert np.isfinite(x_gradient).all()
    assert x_gradient.any()


MIXED = {"x": jnp.zeros((2, 32), jnp.bfloat16)}


@pytest.mark.parametrize(
    ("target", "change", "reason"),
    [
        ("cpu", {}, "needs a GPU"),
        ("mi300x", {"activation": functools.partial(jax.nn.gelu, approximate=False)}, "erf"),
        ("rx7900xtx", {}, "float32"),
        ("mi300x", MIXED, "they have bfloat16, float32, float32, float32"),
        ("mi300x", {"tiles": Tiles(128, 128, 64, 256, 64, 1, num_warps=8, num_stages=2)}, "98304 bytes"),
        ("mi300x", {"x": np.zeros((0, 32), np.float32), "expert_ids": np.zeros((0, 2), np.int32)}, "no tokens"),
        ("mi300x", {}, None),
        ("mi355x", {"tiles": Tiles(128, 128, 64, 256, 64, 1, num_warps=8, num_stages=2)}, None),
    ],
)
def test_limits(target: str, change: dict, reason: str | None) -> None:
    args = example(0, 2, 2, 4, 32, 32) | {"activation": jax.nn.silu} | change
    found = pallas_triton.unsupported(find(target), **args)
    assert (reason is None) == (found is None)
    assert reason is None or reason in (found or "")


def test_a_named_backend_does_not_fall_back() -> None:
    args = example(0, 2, 2, 4, 32, 32)
    with pytest.raises(KernelError, match=r"'pallas_triton' of 'moe' .*cannot run this on cpu: it needs a GPU"):
        routed_experts(**args, activation=jax.nn.silu, backend="pallas_triton")
    with pytest.raises(KernelError, match="dtype"):
        routed_experts(**args | MIXED, activation=jax.nn.silu, backend="pallas_interpret")


GPUS = [target for target in TARGETS if target.vendor != "cpu"]


@pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)
def test_tiles_fit(target: Any) -> None:
    for shape in SHAPES:
        for tokens in (*DECODE_TOKENS, *PREFILL_TOKENS):
            for itemsize in (2, 4):
                sizes = {"pairs": tokens * shape.top_k, "experts": shape.experts, "itemsize": itemsize}
                sizes |= {"hidden": shape.hidden, "intermediate": shape.intermediate}
                tiles = default_tiles(target, **sizes)
                assert tiles.lds_bytes(target, itemsize) <= target.lds_bytes
                assert tiles.num_warps * target.wave_size <= 1024
                assert shape.intermediate // (tiles.down_inner * tiles.down_splits) >= 8
                choices = list(candidates(target, **sizes))
                assert choices[0] == tiles
                assert len(set(choices)) == len(choices) > 4
                assert all(choice.lds_bytes(target, itemsize) <= target.lds_bytes for choice in choices)


def test_decoding_splits_the_inner_axis_and_prefill_does_not() -> None:
    shape = SHAPES[2]
    sizes = {"experts": shape.experts, "hidden": shape.hidden, "intermediate": shape.intermediate}
    assert default_tiles(find("mi300x"), pairs=1, **sizes).down_splits > 1
    assert default_tiles(find("mi300x"), pairs=16384, **sizes).down_splits == 1


def lower(target: Any, shape: MoeShape, tokens: int) -> str:
    """StableHLO of a call for an AMD GPU that is not here."""
    device = AbstractDevice(device_kind=target.arch, num_cores=target.compute_units, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    call = jax.jit(functools.partial(routed_experts, activation=jax.nn.silu, backend="pallas_triton"))
    with use_abstract_mesh(mesh):
        return call.trace(**shape.arguments(tokens)).lower(lowering_platforms=("rocm",)).as_text()


@pytest.mark.parametrize("target", [t for t in GPUS if t.vendor == "amd"], ids=lambda target: target.name)
def test_lowers_for_gpus(target: Any) -> None:
    """Triton's dialect has an operation for each step; the weights reach the kernels as they lie, uncopied."""
    for tokens in (1, 4096):
        text = lower(target, SHAPES[0], tokens)
        calls = [line for line in text.splitlines() if "xla.gpu.triton" in line]
        assert ["moe_gate_up" in line for line in calls] == [True, False]
        assert "moe_down" in calls[1]
        assert calls[0].count("tensor<8x14336x4096xbf16>") == 2
        assert calls[1].count("tensor<8x4096x14336xbf16>") == 1
        assert "transpose" not in text


def test_floors() -> None:
    """Mixtral 8x7B on 5.3 TB/s: one token reads two experts of 176 million weights; 4096 tokens are 2.9 TFLOP."""
    shape = SHAPES[0]
    assert shape.read_bytes(2) == 2 * 3 * 4096 * 14336 * 2
    assert shape.floor_seconds(1, 2, 5.3e12, 1.3e15) == pytest.approx(133e-6, rel=0.01)
    assert shape.flops(4096) == pytest.approx(2.886e12, rel=0.001)
    assert shape.floor_seconds(4096, 8, 5.3e12, 1.3e15) == pytest.approx(2.22e-3, rel=0.01)
    assert shape.expected_experts(1) == pytest.approx(2)
    assert shape.expected_experts(64) == pytest.approx(8, abs=1e-6)


def test_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measuring script, where it can run: tiny shapes, interpreted."""
    path = Path(__file__).parent.parent / "scripts" / "bench_moe.py"
    monkeypatch.syspath_prepend(path.parent)
    main = runpy.run_path(str(path))["main"]
    small = ["--calls", "2", "--repeats", "2", "--ceiling-size", "32", "--sweep", "1"]
    backends = ["--backends", "reference", "pallas_interpret", "pallas_triton"]
    main(["--shapes", "4,2,32,48,output", "--tokens", "3", *backends, *small, "--json", str(tmp_path / "moe.json")])
    report = json.loads((tmp_path / "moe.json").read_text())
    rows = report["rows"]
    assert [row["backend"] for row in rows] == ["reference", "pallas_interpret", "pallas_triton", "pallas_interpret"]
    assert "needs a GPU" in rows[2]["failed"]
    assert set(rows[3]["tiles"]) == {field.name for field in dataclasses.fields(Tiles)}
    for row in (rows[0], rows[1], rows[3]):
        assert row["floor_us"] > 0
        assert row["share_of_ceiling"] == pytest.approx(row["floor_us"] / row["us"])
        assert 0 < row["relative_error"] < 0.01
    assert rows[1]["speedup"] == pytest.approx(rows[0]["us"] / rows[1]["us"])
    with pytest.raises(SystemExit):
        main(["--shapes", "no-such-model"])


def test_the_bench_notices_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parent.parent / "scripts" / "bench_moe.py"
    monkeypatch.setitem(routed_experts_op.__dict__, "backends", {"wrong": Backend(lambda x, *args, **kwargs: x)})
    monkeypatch.syspath_prepend(path.parent)
    rows = runpy.run_path(str(path))["main"](
        ["--shapes", "4,2,32,48,output", "--tokens", "3", "--backends", "wrong", "--ceiling-size", "32"]
    )
    assert rows[0]["failed"].startswith("relative error")


def test_the_operation_has_these_backends() -> None:
    assert {"reference", "pallas_triton", "pallas_interpret"} <= set(routed_experts_op.backends)
