"""Products fused with what is around them: the contract in float64, a model's decode steps, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import error, random_tokens, run

from llama_jax.config import LlamaConfig, preset
from llama_jax.errors import KernelError
from llama_jax.kernels import report
from llama_jax.kernels.dispatch import using
from llama_jax.kernels.norm import rms_norm
from llama_jax.kernels.quantized_matmul.fused import Normed, fused_matmul, fused_matmul_reference, pallas_triton
from llama_jax.kernels.quantized_matmul.fused.cases import fused_cases, fused_models, fused_shape
from llama_jax.kernels.quantized_matmul.fused.shapes import SHAPES, FusedShape, Place
from llama_jax.kernels.quantized_matmul.fused.tiles import candidates, default_tiles
from llama_jax.kernels.quantized_matmul.operands import SQUARED
from llama_jax.kernels.quantized_matmul.tiles import COLUMNS, Tiles
from llama_jax.model.fuse import fuse_params
from llama_jax.model.quantization import quantize_params
from llama_jax.model.transformer import forward
from llama_jax.params import Params, init_params
from llama_jax.quantized import codes
from llama_jax.recipe import recipe
from llama_jax.targets import TARGETS, find

GPUS = [target for target in TARGETS if target.vendor != "cpu"]
AROUND = ("squares", "residual", "gain")


def arguments(shape: FusedShape) -> dict[str, Any]:
    arrays = shape.example(jax.random.key(shape.rows))
    beside = {name: arrays.pop(name) for name in AROUND if name in arrays}
    return {"x": arrays.pop("x"), "members": arrays, **beside, **shape.static}


def exact(shape: FusedShape, call: dict[str, Any]) -> list[np.ndarray]:
    """The results in float64, from the definition of a norm, of a gated unit, and of a sum."""

    def wide(x: jax.Array) -> np.ndarray:
        return np.asarray(x.astype(jnp.float32), np.float64)

    layout, members = call["layout"], call["members"]
    weight = wide(members["weight"] if layout is None else codes.decode(layout, members, jnp.float32))
    x = wide(call["x"])
    if shape.place == "add":
        total = np.einsum("...i,oi->...o", x, weight) + wide(call["residual"])
        return [total, total * wide(call["gain"]), (total**2).sum(-1, keepdims=True)]
    x /= np.sqrt(wide(call["squares"]).sum(-1, keepdims=True) / shape.inner + call["eps"])
    if shape.place == "norm":
        return [np.einsum("...i,oi->...o", x, weight)]
    gate, other = (np.einsum("...i,oi->...o", x, part) for part in weight)
    return [gate / (1 + np.exp(-gate)) * other]


@pytest.mark.parametrize("place", ["gate", "norm", "add"])
@pytest.mark.parametrize(
    ("layout", "rows", "out"),
    [("plain", 1, 88), ("int4_g128", 1, 88), ("int8", 6, 88), ("int4_g64_min", 2, 88), ("plain", 20, 128)],
)
def test_against_float64(place: Place, layout: str, rows: int, out: int) -> None:
    """The kernel and the contract, both in bfloat16: a wrong half, column, row or sum is off by a hundred times."""
    shape = FusedShape(place, layout, rows, out, 640)
    call = arguments(shape)
    expected = exact(shape, call)
    for found in (fused_matmul(**call, backend="pallas_interpret"), fused_matmul_reference(**call)):
        results = jax.tree.leaves(found)
        if place == "add":
            results[2] = results[2].sum(-1, keepdims=True)
        assert [result.shape for result in results] == [result.shape for result in expected]
        assert max(error(*pair) for pair in zip(results, expected, strict=True)) < 8e-3


def test_a_norm_is_what_its_parts_make() -> None:
    x, gain = jax.random.normal(jax.random.key(0), (3, 64)) * 5, jnp.linspace(0.5, 2, 64)
    squares = jnp.sum((x * x).reshape(3, -1, SQUARED), axis=-1)
    assert error(Normed(x * gain, squares, 1e-2).value(), rms_norm(x, gain, 1e-2)) < 1e-6


def test_a_sum_of_squares_for_each_program() -> None:
    """The next product reads as few as there can be; and a gradient goes through them."""
    call = arguments(FusedShape("add", "plain", 9, 256, 128))
    cut = {"tiles": Tiles(32, 64, 64, 1, 4, 1, 2), "interpret": True}
    squares = pallas_triton.run(**call, **cut)[2]
    assert squares.shape == (9, 256 // 32)
    call |= {name: call[name].astype(jnp.float32) for name in ("x", "residual", "gain")}
    call["members"] = {"weight": call["members"]["weight"].astype(jnp.float32)}

    def loss(x: jax.Array, run: Callable[..., Any], **options: Any) -> jax.Array:
        *_, squares = run(**call | {"x": x}, **options)
        whole = squares.reshape(9, 8, -1).sum(-1)  # of 32 neighbours each
        return jnp.sum(jnp.sin(whole) * jnp.arange(8.0))

    found = jax.grad(loss)(call["x"], pallas_triton.run, **cut)
    assert error(found, jax.grad(loss)(call["x"], fused_matmul_reference)) < 1e-5


def small(layout: str) -> tuple[Params, LlamaConfig]:
    config = preset("llama-3.2-1b").replace(hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=32, vocab_size=96)
    config = config.replace(layers=config.layers[:2])
    params = init_params(config, jax.random.key(0), jnp.bfloat16)
    if layout == "plain":
        attn = params["layers"]["0"]["attn"]
        attn["o_proj"] = {**attn["o_proj"], "bias": jnp.linspace(-1, 1, 128, dtype=jnp.bfloat16)}
    else:
        params, config = quantize_params(params, config, recipe("int4", group=64))
    return fuse_params(params, config), config


@pytest.mark.parametrize("layout", ["plain", pytest.param("int4", marks=pytest.mark.slow)])
def test_a_model_computes_with_them(layout: str) -> None:
    """All products of blocks but the first, the last and one with a bias: as near to float32 as each operation on
    its own."""
    params, config = small(layout)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, params)
    tokens = random_tokens(config, 1, 3)
    expected, _ = run(wide, config, tokens)
    alone = error(run(params, config, tokens)[0], expected)
    before = dict(report())
    with using(fused_matmul="pallas_interpret"):
        assert error(run(params, config, tokens)[0], expected) < 1.3 * alone
    made = [c.shape.split()[0] for c in report() if c.operation == "fused_matmul" and report()[c] != before.get(c)]
    assert set(made) == {"gate", "norm", "add"}


def test_what_is_watched_is_not_fused() -> None:
    """An activation that is kept or changed is there, whatever computes the blocks around it."""
    params, config = small("plain")
    tokens = random_tokens(config, 1, 3)
    names = ("layers.0.attn_out", "layers.0.mlp_in", "layers.1.mlp_hidden")
    plain = forward(params, config, tokens, capture=names)[2]
    with using(fused_matmul="pallas_interpret"):
        seen = forward(params, config, tokens, capture=names)[2]
    assert {name: x.shape for name, x in seen.items()} == {name: x.shape for name, x in plain.items()}
    assert max(error(seen[name], plain[name]) for name in names) < 2e-2


@pytest.mark.slow
def test_a_gradient_goes_through_them() -> None:
    params, config = small("plain")
    tokens = random_tokens(config, 1, 3)

    def loss(params: Params) -> jax.Array:
        return jnp.sum(jnp.sin(forward(params, config, tokens)[0]))

    expected = jax.grad(loss)(params)
    with using(fused_matmul="pallas_interpret"):
        found = jax.grad(loss)(params)
    block = expected["layers"]["0"]
    assert all(bool(jnp.any(x != 0)) for x in jax.tree.leaves(block))
    errors = jax.tree.map(error, found["layers"]["0"], block)
    assert max(jax.tree.leaves(errors)) < 6e-2


def test_refuses() -> None:
    h200 = find("h200")

    def reason(place: Place = "add", layout: str = "int8", rows: int = 1, inner: int = 512, **changed: Any) -> str:
        call = {**arguments(FusedShape(place, layout, rows, 80, inner)), **changed}
        return str(pallas_triton.unsupported(h200, **call))

    assert reason() == reason("gate", "plain") == reason("norm", "int4_g128", 16) == "None"
    assert "33 rows" in reason(rows=33)
    assert "float16" in reason(x=jnp.zeros((1, 512), jnp.float16))
    assert "8-bit floats" in reason(layout="fp8_g128")
    assert "float32" in reason(layout="plain", members={"weight": jnp.zeros((80, 512))})
    assert "64" in reason(layout="plain", inner=96)
    assert "residual" in reason(gain=None)
    assert "multiple of 8" in reason(residual=jnp.zeros((1, 84), jnp.bfloat16))
    assert "erf" in reason("gate", activation=lambda x: jax.nn.gelu(x, approximate=False))
    with pytest.raises(KernelError, match="GPUs only"):
        fused_matmul(**arguments(FusedShape("add", "int8", 1, 64, 64)), backend="pallas_triton")


@pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)
def test_tiles_fit(target: Any) -> None:
    """Whole sums in every program, and columns enough for what follows them."""
    for shape in SHAPES:
        layout = shape.static["layout"]
        row_bytes = shape.inner // (layout.per_byte if layout else 1)
        least = {"gate": 2, "add": SQUARED, "norm": 1}[shape.place]
        sizes = {"rows": shape.rows, "out": shape.out, "row_bytes": row_bytes, "layout": layout, "least": least}
        found = list(candidates(target, **sizes))
        assert found[0] == default_tiles(target, **sizes)
        assert len(set(found)) == len(found) > 1
        for tiles in found:
            assert tiles.splits == 1
            assert tiles.cols >= COLUMNS * tiles.num_warps
            assert tiles.cols // tiles.fold >= least
            assert tiles.fold * shape.rows <= tiles.rows
            assert row_bytes % (tiles.fold * tiles.inner) == 0 or tiles.fold == 1


def test_names() -> None:
    assert fused_shape(**fused_cases()[1].arguments()) == "add int4_g64_min r1 n104 k1152"
    assert len({shape.name for shape in SHAPES}) == len(SHAPES)
    assert len(fused_models()) == len(SHAPES)
    assert not fused_models({"hidden": 64})
    assert FusedShape("norm", "plain", 1, 64, 128).flops == 2 * 64 * 128
