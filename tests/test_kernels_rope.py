"""Rotary embedding with the cache write, against complex numbers of numpy and within a model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import error, random_params, random_tokens, tiny_config

from llama_jax.cache import DenseCache, PagedCache
from llama_jax.kernels import report
from llama_jax.kernels.dispatch import using
from llama_jax.kernels.rope import rope_and_store
from llama_jax.model.fuse import fuse_params
from llama_jax.model.transformer import forward

BACKENDS = ["reference", pytest.param("pallas_triton", marks=pytest.mark.gpu), "pallas_interpret"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_against_complex_numbers(backend: str, interleaved: bool) -> None:
    """Pairs as complex numbers times e^(i angle); a token without a page changes nothing."""
    rng = np.random.default_rng(0)
    qkv, angles = rng.standard_normal((2, 1, 2, 5, 16)), rng.random((2, 1, 8)) * 6
    k, v = rng.standard_normal((2, 3, 2, 4, 16))
    page, slot = jnp.asarray([[1], [3]]), jnp.asarray([[2], [0]])
    arrays = [jnp.asarray(x, jnp.float32) for x in (qkv, np.cos(angles), np.sin(angles), k, v)]
    q, new_k, new_v, *_ = jax.jit(lambda *x: rope_and_store(*x, slot, page, interleaved=interleaved, backend=backend))(
        *arrays
    )

    def turned(x: np.ndarray) -> np.ndarray:
        a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :8], x[..., 8:])
        z = (a + 1j * b) * np.exp(1j * angles)[:, :, None, None]
        return np.stack([z.real, z.imag], -1).reshape(x.shape) if interleaved else np.concatenate([z.real, z.imag], -1)

    expected = turned(qkv)
    np.testing.assert_allclose(q.reshape(2, 1, 2, 3, 16), expected[..., :3, :], atol=2e-6)
    k[1, :, 2], v[1, :, 2] = expected[0, 0, :, 3], qkv[0, 0, :, 4]
    np.testing.assert_allclose(new_k, k, atol=2e-6)
    np.testing.assert_allclose(new_v, v, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "paged", "dense int8"])
def test_steps_of_a_model(kind: str) -> None:
    """The kernel's steps give what the reference's do, and the report names it."""
    heads = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    config = tiny_config(dtype="bfloat16", **heads)
    params = fuse_params(jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(config)), config)
    tokens = random_tokens(config, 2, 5)
    dtype: Any = "int8" if "int8" in kind else jnp.bfloat16

    def logits(backend: str) -> jax.Array:
        make = PagedCache.create if kind == "paged" else DenseCache.create
        cache: Any = make(config, 2, 16, dtype)
        with using(rope_and_store=backend):
            _, cache = forward(params, config, tokens, jnp.broadcast_to(jnp.arange(5), (2, 5)), cache)
            return forward(params, config, tokens[:, :1], jnp.full((2, 1), 5), cache)[0]

    assert error(logits("pallas_interpret"), logits("reference")) < 3e-2
    assert any(c.operation == "rope_and_store" and c.backend == "pallas_interpret" for c in report())
