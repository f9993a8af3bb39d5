"""The pieces of a block against numpy in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import arange_positions, random_tokens, tiny_config

from llama_jax.config import LayerSpec, MoeSpec, QueryScale, RopeSpec
from llama_jax.kernels.norm import rms_norm
from llama_jax.kernels.rope import rotate
from llama_jax.model.adapters import Adapters
from llama_jax.model.layers import ACTIVATIONS, Dims, mlp, moe, position_queries_and_keys, project_qkv
from llama_jax.model.rope import rope_angles
from llama_jax.model.weights import linear, matmul, product

RNG_SHAPE = (2, 5, 16)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def norm64(x: np.ndarray, eps: float) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def test_linear() -> None:
    x, weight, bias = normal(*RNG_SHAPE), normal(6, 16), normal(6)
    np.testing.assert_allclose(linear(x, {"weight": weight}), x @ weight.T, atol=1e-5)
    np.testing.assert_allclose(linear(x, {"weight": weight, "bias": bias}), x @ weight.T + bias, atol=1e-5)
    a, b = normal(2, 16, seed=1), normal(6, 2, seed=2)
    slots = {"a": np.stack([a, a]), "b": np.stack([b.T, b.T]), "scale": np.float32([0.25, 0.25])}
    expected = x @ (weight + 0.25 * b @ a).T + bias
    adapted = linear(x, {"weight": weight, "bias": bias}, Adapters(slots, jnp.ones((2, 1), jnp.int32)))
    np.testing.assert_allclose(adapted, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1), (2, 8), (17,), (3, 40)])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_product_of_few_and_many_rows(shape: tuple[int, ...], transform: Callable) -> None:
    """Up to 16 rows take another road on the CPU; values and gradients are those of float64."""
    x, weight, direction = normal(*shape, 40), normal(24, 40), normal(*shape, 24)
    x64, weight64, direction64 = (np.asarray(a, np.float64) for a in (x, weight, direction))
    out, pull = jax.vjp(transform(product), x, weight)
    grad_x, grad_weight = pull(direction)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, x64 @ weight64.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grad_x, direction64 @ weight64, rtol=1e-5, atol=1e-5)
    expected = direction64.reshape(-1, 24).T @ x64.reshape(-1, 40)
    np.testing.assert_allclose(grad_weight, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_linear_keeps_the_dtype_and_sums_in_float32(dtype: str) -> None:
    x = jnp.ones((1, 4096), dtype)
    weight = jnp.full((1, 4096), 1.001, dtype)
    exact = float(weight[0, 0]) * 4096
    out = matmul(x, weight)
    assert out.dtype == jnp.dtype(dtype)
    assert float(out[0, 0]) == pytest.approx(exact, rel=5e-3)  # a bfloat16 sum would stop at 256
    leaf = {"weight": weight, "bias": jnp.ones(1, jnp.float32)}
    for slots in (2, 8):
        adapter = {"a": jnp.ones((slots, 2, 4096)), "b": jnp.ones((slots, 2, 1)), "scale": jnp.full(slots, 0.5)}
        assert linear(x, leaf, Adapters(adapter, jnp.ones(1, jnp.int32))).dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm(eps: float) -> None:
    x, weight = 0.1 * normal(*RNG_SHAPE), normal(16)
    np.testing.assert_allclose(rms_norm(x, weight, eps), norm64(x, eps) * weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rms_norm(x, None, eps), norm64(x, eps), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(rms_norm(jnp.zeros((1, 16)), weight, eps), jnp.zeros((1, 16)))


def test_rms_norm_of_large_float16() -> None:
    """Squares of 300 overflow float16; the norm is computed in float32."""
    x = jnp.full((1, 16), 300.0, jnp.float16)
    out = rms_norm(x, jnp.ones(16, jnp.float16), 1e-5)
    assert out.dtype == jnp.float16
    np.testing.assert_allclose(out, np.ones((1, 16)), rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("silu", lambda x: x / (1 + math.exp(-x))),
        ("gelu", lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
        ("gelu_tanh", lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2),
        ("relu", lambda x: max(x, 0.0)),
    ],
)
def test_activations(name: str, function: object) -> None:
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    np.testing.assert_allclose(ACTIVATIONS[name](x), [function(float(v)) for v in x], atol=2e-6)


def mlp_params(hidden: int, width: int, seed: int = 0) -> dict:
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    return {name: {"weight": normal(*s, seed=seed + i)} for i, (name, s) in enumerate(shapes.items())}


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def mlp64(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def test_mlp() -> None:
    x, params = normal(*RNG_SHAPE), mlp_params(16, 24)
    expected = mlp64(x, *(params[n]["weight"] for n in ("gate_proj", "up_proj", "down_proj")))
    np.testing.assert_allclose(mlp(x, params, Dims.of(tiny_config())), expected, rtol=1e-4, atol=1e-4)


def moe64(x: np.ndarray, params: dict, spec: MoeSpec) -> np.ndarray:
    """Mixtral's and Llama 4's routing, one token at a time."""
    out = np.zeros(x.shape)
    weights = {n: params["experts"][n]["weight"] for n in ("gate_proj", "up_proj", "down_proj")}
    for at in np.ndindex(x.shape[:-1]):
        token = np.asarray(x[at], np.float64)
        logits = params["router"]["weight"].astype(np.float64) @ token
        best = sorted(range(len(logits)), key=lambda e: (-logits[e], e))[: spec.top_k]
        total = sum(math.exp(logits[e]) for e in best)
        for e in best:
            expert = [weights[n][e] for n in ("gate_proj", "up_proj", "down_proj")]
            if spec.router == "softmax":
                out[at] += math.exp(logits[e]) / total * mlp64(token, *expert)
            else:
                out[at] += mlp64(token / (1 + math.exp(-logits[e])), *expert)
        if spec.shared_intermediate_size:
            out[at] += mlp64(token, *(params["shared"][n]["weight"] for n in weights))
    return out


def moe_params(spec: MoeSpec, hidden: int = 16) -> dict:
    n, width = spec.num_experts, spec.intermediate_size
    shapes = {"gate_proj": (n, width, hidden), "up_proj": (n, width, hidden), "down_proj": (n, hidden, width)}
    params = {
        "router": {"weight": normal(n, hidden)},
        "experts": {name: {"weight": normal(*s, seed=i)} for i, (name, s) in enumerate(shapes.items())},
    }
    if spec.shared_intermediate_size:
        params["shared"] = mlp_params(hidden, spec.shared_intermediate_size, seed=5)
    return params


@pytest.mark.parametrize(
    "spec",
    [
        MoeSpec(4, 2, 8),
        MoeSpec(3, 3, 8),
        MoeSpec(4, 1, 8, router="sigmoid", shared_intermediate_size=12),
        MoeSpec(4, 2, 8, router="sigmoid"),
    ],
    ids=str,
)
def test_moe(spec: MoeSpec) -> None:
    x, params = normal(*RNG_SHAPE), moe_params(spec)
    out = moe(x, params, Dims.of(tiny_config()), spec)
    np.testing.assert_allclose(out, moe64(x, params, spec), rtol=1e-4, atol=1e-3)


def test_moe_ties_go_to_the_first_expert() -> None:
    """A router of equal rows: the experts of lower index take part, with equal weights."""
    spec = MoeSpec(4, 2, 8)
    x, params = normal(1, 3, 16), moe_params(spec)
    params["router"]["weight"] = np.tile(params["router"]["weight"][:1], (4, 1))
    out = moe(x, params, Dims.of(tiny_config()), spec)
    np.testing.assert_allclose(out, moe64(x, params, spec), rtol=1e-4, atol=1e-3)


def test_moe_router_is_float32() -> None:
    """Two experts whose logits are equal in bfloat16 and not in float32."""
    spec = MoeSpec(2, 1, 8)
    params = moe_params(spec)
    router = np.zeros((2, 16), np.float32)
    router[0, :2], router[1, :2] = (1.0, 0.0), (1.0, 2.0**-6)
    params["router"]["weight"] = router
    x = np.zeros((1, 1, 16), np.float32)
    x[..., 0], x[..., 1] = 1.0, 2.0**-6  # the logits are 1 and 1 + 2^-12
    out = moe(jnp.asarray(x, jnp.bfloat16), params, Dims.of(tiny_config()), spec)
    second = [params["experts"][n]["weight"][1] for n in ("gate_proj", "up_proj", "down_proj")]
    expected = mlp64(x[0, 0], *second)
    assert np.abs(np.asarray(out[0, 0], np.float64) - expected).max() < 0.05 * np.abs(expected).max()


def test_project_qkv() -> None:
    config = tiny_config(qkv_bias=True)
    x = normal(*RNG_SHAPE)
    params = {
        name: {"weight": normal(out, 16, seed=i), "bias": normal(out, seed=i)}
        for i, (name, out) in enumerate({"q_proj": 32, "k_proj": 16, "v_proj": 16}.items())
    }
    for out, name, heads in zip(project_qkv(x, params, Dims.of(config)), params, (4, 2, 2), strict=True):
        expected = (x @ params[name]["weight"].T + params[name]["bias"]).reshape(2, 5, heads, 8)
        np.testing.assert_allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize("interleaved", [False, True])
def test_learned_norm_comes_before_rope_and_unlearned_after_it(interleaved: bool) -> None:
    config = tiny_config(rope=RopeSpec(100.0, interleaved=interleaved))
    q, k, positions = normal(2, 5, 4, 8), normal(2, 5, 2, 8), arange_positions(2, 5) + 3
    angles = rope_angles(config.rope, 8, positions, jnp.array([[8], [8]]))
    params = {"q_norm": {"weight": normal(8)}, "k_norm": {"weight": normal(8, seed=3)}}

    def turn(x: np.ndarray) -> np.ndarray:
        return np.asarray(rotate(jnp.asarray(x, jnp.float32), *angles, interleaved=interleaved))

    out = position_queries_and_keys(q, k, params, Dims.of(config), LayerSpec(qk_norm="rms"), positions, angles)
    for got, x, name in zip(out, (q, k), ("q_norm", "k_norm"), strict=True):
        np.testing.assert_allclose(got, turn(norm64(x, 1e-5) * params[name]["weight"]), atol=2e-5)
    out = position_queries_and_keys(q, k, {}, Dims.of(config), LayerSpec(qk_norm="l2"), positions, angles)
    for got, x in zip(out, (q, k), strict=True):
        np.testing.assert_allclose(got, norm64(turn(x), 1e-5), atol=2e-5)
    for got, x in zip(
        position_queries_and_keys(q, k, {}, Dims.of(config), LayerSpec(rope=False), positions, angles),
        (q, k),
        strict=True,
    ):
        np.testing.assert_array_equal(got, x)


def test_query_scale() -> None:
    spec = LayerSpec(rope=False, query_scale=QueryScale(0.1, 4))
    config = tiny_config(spec)
    positions = jnp.array([[-1, 0, 2, 3, 4, 6, 7, 8191]])
    q, k = normal(1, 8, 4, 8), normal(1, 8, 2, 8)
    angles = rope_angles(config.rope, 8, positions, jnp.array([[8192]]))
    scaled, same = position_queries_and_keys(q, k, {}, Dims.of(config), spec, positions, angles)
    np.testing.assert_array_equal(same, k)
    steps = np.array([0, 0, 0, 1, 1, 1, 2, 2048])
    np.testing.assert_allclose(scaled, q * (1 + 0.1 * np.log(1 + steps))[None, :, None, None], rtol=1e-5)


def test_random_tokens_are_in_range() -> None:
    """The other tests rely on it: an index out of range would be clamped silently."""
    config = tiny_config()
    tokens = random_tokens(config, 8, 64)
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < config.vocab_size
