"""Products of int8 activations with quantised weights: the contract against numpy, and models that compute by it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import error, random_params, random_tokens, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import LLAMA, write_hf

import llama_jax as lj
from llama_jax.config import LayerSpec
from llama_jax.errors import KernelError, RequestError
from llama_jax.kernels.integer_matmul import integer_matmul, integer_matmul_reference, library, multiplies
from llama_jax.kernels.integer_matmul.reference import quantize
from llama_jax.kernels.quantized_matmul import quantized_matmul_reference
from llama_jax.kernels.quantized_matmul.shapes import layout_of
from llama_jax.model.fuse import fuse_params
from llama_jax.model.quantization import quantize_params
from llama_jax.model.weights import linear
from llama_jax.quantized.layout import ORDER, pack_codes
from llama_jax.recipe import check_activations, recipe, usual_form
from llama_jax.targets import find
from llama_jax.targets.table import CPU

LAYOUTS = (
    *("int8", "int4", "int8_g32", "int4_g32", "int4_g64_min", "int4_g32_zero", "int4_g32_min_bf16"),
    *("int8_g32_min", "int8_g64_zero", "int8_zero"),
)


def example(layout: str, rows: int, out: int, inner: int, seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Random x float32 [rows, inner] and members of a weight [out, inner]; by numpy, which compiles nothing."""
    where, rng = layout_of(layout), np.random.default_rng(seed)
    shape = (out,) if where.group is None else (out, inner // where.group)
    low, high = (-8, 8) if where.bits == 4 else (-127, 128)
    stored = rng.integers(low, high, (out, inner), np.int8)
    members = {layout: pack_codes(stored) if where.bits == 4 else stored}
    members["scales"] = rng.uniform(0.5, 1.5, shape).astype(where.scale_dtype)
    if where.offset == "min":
        members["minima"] = rng.uniform(-8, -4, shape).astype(where.scale_dtype)
    if where.offset == "zero":
        members["zeros"] = rng.integers(-8, 8, shape, np.int8)
    return rng.standard_normal((rows, inner), np.float32), members


def exact(x: np.ndarray, members: dict[str, np.ndarray], layout: str) -> np.ndarray:
    """In float64, from activations that are rounded and weights that are decoded here."""
    where = layout_of(layout)
    grouped = x.reshape(len(x), -1, where.group or x.shape[-1])
    scales = np.abs(grouped).max(-1, keepdims=True) / np.float32(127)
    with np.errstate(invalid="ignore"):
        rounded = np.rint(grouped / np.where(scales, scales, 1)).astype(np.float64) * scales
    stored = members[layout]
    if where.bits == 4:
        halves = np.stack([stored << 4, stored], axis=-1).reshape(*stored.shape[:-1], -1)
        stored = halves.view(np.int8) >> 4
    number = {name: x.astype(np.float64).reshape(len(x), -1, 1) for name, x in members.items() if name != layout}
    codes = stored.reshape(len(stored), -1, where.group or x.shape[-1]).astype(np.float64)
    scale = number["scales"]
    weight = (codes - number["zeros"] if where.offset == "zero" else codes) * scale
    if where.offset == "min":
        weight = weight - where.lowest * scale + number["minima"]
    return rounded.reshape(x.shape) @ weight.reshape(stored.shape).T


def reference(x: np.ndarray, members: dict[str, np.ndarray], layout: str) -> jax.Array:
    return jax.jit(partial(integer_matmul_reference, layout=layout_of(layout)))(x, members)


@settings(max_examples=8)
@given(st.sampled_from(LAYOUTS), st.sampled_from([1, 2, 3, 17]), st.integers(1, 3), st.integers(0, 99))
def test_the_reference(layout: str, rows: int, groups: int, seed: int) -> None:
    x, members = example(layout, rows, 24, 64 * groups, seed)
    x[0, :32] = 0  # a group without a number but 0
    assert error(reference(x, members, layout), exact(x, members, layout)) < 1e-5


def test_rounding() -> None:
    """Codes are the nearest, ties to even; the largest of a group is 127 either way."""
    found, scales = quantize(jnp.asarray([[-2.54, 0.03, 0.05, 1.0, 127.0, -0.5, 2.5, 1.5]]), 4)
    np.testing.assert_array_equal(found[0], [[-127, 2, 2, 50], [127, 0, 2, 2]])
    np.testing.assert_allclose(scales, [[0.02, 1.0]], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_in_its_row(bad: float) -> None:
    x, members = example("int4_g32_min", 3, 8, 64)
    sound = reference(x, members, "int4_g32_min")
    x[1, 5] = bad
    found = reference(x, members, "int4_g32_min")
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[::2], sound[::2])


def test_gradient() -> None:
    """That of the product with activations as they are: through rounding it would be 0."""
    x, members = (jax.tree.map(jnp.asarray, each) for each in example("int8_g32", 3, 8, 64))
    layout = layout_of("int8_g32")

    def weighted(product: jax.Array) -> jax.Array:
        return jnp.sum(product * jnp.arange(8.0))

    found = jax.grad(lambda x: weighted(integer_matmul(x, members, layout=layout, backend="reference")))(x)
    np.testing.assert_allclose(
        found, jax.grad(lambda x: weighted(quantized_matmul_reference(x, members, layout=layout)))(x), rtol=1e-6
    )


@pytest.mark.parametrize(("weights", "fused"), [("int8", True), ("int4_g32_min", False)])
def test_a_model(weights: str, fused: bool) -> None:
    """Every product with a quantised weight takes rounded inputs, and no other: logits are those of the captured
    hidden state, which differ from those without rounding by little."""
    config = tiny_config(LayerSpec(mlp=96), hidden_size=64, tie_word_embeddings=False)
    params, config = quantize_params(random_params(config), config, recipe(weights, lm_head="int8"))
    params = fuse_params(params, config) if fused else params
    tokens = random_tokens(config, 2, 5)
    plain, _ = lj.forward(params, config, tokens)
    rounded = config.replace(activations="int8")
    found, _, seen = lj.forward(params, rounded, tokens, capture=("final_norm", "layers.0.attn_in", "layers.0.v"))
    head = params["lm_head"]
    logits = integer_matmul_reference(seen["final_norm"], head, layout=layout_of("int8"), dtype=jnp.float32)
    np.testing.assert_allclose(found, logits, atol=1e-5)
    assert 1e-4 < error(found, plain) < 0.1
    if not fused:
        v = params["layers"]["0"]["attn"]["v_proj"]
        expected = integer_matmul_reference(seen["layers.0.attn_in"], v, layout=layout_of(weights))
        np.testing.assert_allclose(seen["layers.0.v"].reshape(expected.shape), expected, atol=1e-5)


@pytest.mark.parametrize("layout", ["int4_g32_zero", "int8"])
def test_columns_in_another_order(layout: str) -> None:
    """Each input meets its own column, and is rounded with the inputs whose columns share its scale."""
    x, members = example(layout, 3, 16, 64)
    order = np.random.default_rng(1).permutation(64).astype(np.int32)
    found = linear(jnp.asarray(x), members | {ORDER: order}, activations="int8")
    assert error(found, exact(x[:, order], members, layout)) < 1e-5


def test_requests() -> None:
    config = tiny_config().replace(schemes=(("layers.0.attn.q_proj", "fp8"),))
    check_activations(config, None)
    with pytest.raises(RequestError, match="'int4' are not known"):
        check_activations(config, "int4")
    for without in (config, tiny_config()):
        with pytest.raises(RequestError, match="the model has none"):
            check_activations(without, "int8")
    grouped = tiny_config().replace(schemes=(("layers.0.attn.q_proj", "int4_g32"),))
    check_activations(grouped, "int8")
    check_activations(tiny_config().replace(schemes=(("layers.0.attn.q_proj", "int4_g32_zero_ordered"),)), "int8")
    assert not multiplies(layout_of("fp8_g128"))
    for target in (CPU, find("h100"), find("mi300x")):
        assert usual_form(target, config.schemes, split=False, activations="int8") == "stored"


def test_loading(tmp_path: Path) -> None:
    write_hf(tmp_path, LLAMA)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}')
    options: dict[str, Any] = {"convert": False, "activations": "int8", "kernels": {"integer_matmul": "reference"}}
    model, _ = lj.load(tmp_path, weights="int8", **options)
    assert model.config.activations == "int8"
    with pytest.raises(RequestError, match="the model has none"):
        lj.load(tmp_path, **options)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """XLA multiplies, and it is said why; a kernel that is named is an error."""
    monkeypatch.setattr(library, "_loaded", [])
    monkeypatch.setattr(library, "_problem", [])
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    said: list[str] = []
    library.prepare(said.append)
    assert said == [
        "int8 activations are multiplied by XLA, which is slower: there is no C++ compiler (c++, g++, clang++)"
    ]
    library.prepare(said.append)
    assert len(said) == 1
    assert library.instructions() == ()
    x, members = example("int8", 2, 8, 64)
    layout = layout_of("int8")
    assert error(integer_matmul(x, members, layout=layout), exact(x, members, "int8")) < 1e-5
    with pytest.raises(KernelError, match=r"there is no C\+\+ compiler"):
        integer_matmul(x, members, layout=layout, backend="native")
