"""The reference of the routed experts against a loop over tokens in float64."""

from __future__ import annotations

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import KernelError
from llama_jax.kernels.moe import routed_experts

run = jax.jit(routed_experts, static_argnames=("activation", "backend"))


def brute_force(
    x: np.ndarray,
    expert_ids: np.ndarray,
    gate: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    input_scale: np.ndarray | None,
    output_scale: np.ndarray | None,
) -> np.ndarray:
    """[tokens, hidden] in float64, silu experts."""
    x, gate, up, down = (np.asarray(a, np.float64) for a in (x, gate, up, down))
    out = np.zeros(x.shape)
    for token in range(x.shape[0]):
        for slot, expert in enumerate(expert_ids[token]):
            row = x[token] * (1.0 if input_scale is None else input_scale[token, slot])
            g, u = gate[expert] @ row, up[expert] @ row
            row = down[expert] @ (g / (1 + np.exp(-g)) * u)
            out[token] += row * (1.0 if output_scale is None else output_scale[token, slot])
    return out


@st.composite
def cases(draw: st.DrawFn) -> dict:
    """Any assignment of tokens to experts: all to one, some experts without a token, an expert twice."""
    tokens, top_k, experts = draw(st.sampled_from([(1, 1, 3), (7, 2, 4), (5, 3, 3)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    row = st.lists(st.integers(0, experts - 1), min_size=top_k, max_size=top_k)
    hidden, width = 6, 5
    which = draw(st.sampled_from(["none", "input", "output"]))
    scale = rng.standard_normal((tokens, top_k)).astype(np.float32)
    return {
        "x": rng.standard_normal((tokens, hidden)).astype(np.float32),
        "expert_ids": np.array(draw(st.lists(row, min_size=tokens, max_size=tokens)), np.int32),
        "gate": rng.standard_normal((experts, width, hidden)).astype(np.float32),
        "up": rng.standard_normal((experts, width, hidden)).astype(np.float32),
        "down": rng.standard_normal((experts, hidden, width)).astype(np.float32),
        "input_scale": scale if which == "input" else None,
        "output_scale": scale if which == "output" else None,
    }


@hypothesis.given(cases())
def test_against_the_definition(case: dict) -> None:
    out = run(**case, activation=jax.nn.silu)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, brute_force(*case.values()), rtol=1e-4, atol=1e-4)


def example(seed: int = 0, tokens: int = 6, top_k: int = 2) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = ((tokens, 6), (4, 5, 6), (4, 5, 6), (4, 6, 5))
    x, gate, up, down = (rng.standard_normal(s).astype(np.float32) for s in shapes)
    return [x, rng.integers(0, 4, (tokens, top_k)).astype(np.int32), gate, up, down]


def test_order_does_not_matter() -> None:
    """A token's result depends neither on its neighbours nor on the order of its experts."""
    x, ids, *weights = example()
    out = run(x, ids, *weights, activation=jax.nn.silu)
    order = np.array([3, 0, 5, 1, 4, 2])
    chex.assert_trees_all_close(run(x[order], ids[order], *weights, activation=jax.nn.silu), out[order], atol=1e-6)
    chex.assert_trees_all_close(run(x, ids[:, ::-1], *weights, activation=jax.nn.silu), out, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(dtype: str) -> None:
    x, ids, *weights = example()
    x, *weights = (jnp.asarray(a, dtype) for a in (x, *weights))
    out = run(x, ids, *weights, activation=jax.nn.silu)
    assert out.dtype == jnp.dtype(dtype)
    expected = brute_force(*(np.asarray(a, np.float32) for a in (x,)), ids, *weights, None, None)
    assert np.abs(np.asarray(out, np.float64) - expected).max() < 0.03 * np.abs(expected).max()


def test_experts_without_tokens_have_no_gradient() -> None:
    x, _, *weights = example()
    ids = np.array([[1, 3]] * len(x), np.int32)

    def loss(x: jax.Array, *weights: jax.Array) -> jax.Array:
        return routed_experts(x, ids, *weights, activation=jax.nn.silu).std()

    for grad in jax.grad(loss, argnums=(1, 2, 3))(x, *weights):
        chex.assert_tree_all_finite(grad)
        assert [bool(np.any(expert)) for expert in np.asarray(grad)] == [False, True, False, True]


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(KernelError, match="'moe' has no backend 'megablox'") as caught:
        routed_experts(*example(), activation=jax.nn.silu, backend="megablox")
    assert "reference" in caught.value.hint
