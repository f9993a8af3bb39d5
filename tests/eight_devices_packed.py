"""Packed attention on a mesh; `test_kernels_attention_packed.py` runs these in a process of its own, on simulated
devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TOLERANCE, error, random_params, random_tokens, run, tiny_config
from test_kernels_attention_packed import packed_call

from llama_jax import sharding
from llama_jax.cache import PagedCache
from llama_jax.config import LayerSpec
from llama_jax.kernels.attention import Rule, Visibility, attention, attention_reference
from llama_jax.kernels.dispatch import using
from llama_jax.model import forward
from llama_jax.model.fuse import arrange

RULE = Rule(Visibility("sliding", 20), 0.3, chunk_rows=1)


@pytest.mark.parametrize("backend", ["reference", "pallas_interpret"])
@pytest.mark.parametrize(("mesh", "ways"), [("data=2,tensor=2", 2), ("tensor=4", 1)])
def test_every_device_has_its_own_heads(mesh: str, ways: int, backend: str) -> None:
    """Where the two key/value heads divide. Tokens and pages are whole on each device: any row may use any page."""
    call = packed_call((1, 20, 0, 1), (9, 30, 5, 0), length=24, extras=True)
    expected = attention_reference(call.q, call.kv, call.places, RULE, sinks=call.sinks)
    arrays = jax.tree.map(jnp.asarray, (call.q, call.kv, call.places, call.sinks))

    def compute(q: jax.Array, kv: Any, places: Any, sinks: Any) -> jax.Array:
        return attention(q, kv, places, RULE, sinks=sinks, backend=backend)

    with sharding.on(sharding.make_mesh(mesh)):
        out = jax.jit(compute)(*arrays)
        text = str(jax.make_jaxpr(compute)(*arrays))
    np.testing.assert_allclose(out[0, call.real], expected[0, call.real], rtol=1e-5, atol=1e-5)
    assert "shard_map" in text
    assert out.sharding.shard_shape(out.shape)[2] == call.q.shape[2] // ways


@pytest.mark.parametrize("backend", ["reference", "pallas_interpret"])
def test_a_step_of_prompts_and_decoding_rows(backend: str) -> None:
    """The whole model, into pages whose heads are split over two devices."""
    config = tiny_config(LayerSpec(mlp=24), LayerSpec("sliding", 5, mlp=24))
    params, tokens = random_params(config), random_tokens(config, 1, 24)
    rows = np.asarray([[0, *[2] * 20, 1, 3, 9]], np.int32)
    positions = np.asarray([[0, *range(20), 0, 0, -1]], np.int32)

    def cache() -> PagedCache:
        return PagedCache.create(config, 4, 32, jnp.float32, page_size=16)

    want, _ = run(params, config, tokens, positions, cache(), rows=rows)
    mesh = sharding.make_mesh(tensor=2)
    split, of_mesh = arrange(params, config, mesh)
    step = jax.jit(forward, static_argnames=("config", "chunk_rows"))
    with sharding.on(mesh), using(flash_attention=backend, decode_attention=backend):
        got, after = step(split, of_mesh, tokens, positions, cache(), rows=rows, chunk_rows=1)
    assert error(got[0, :23], want[0, :23]) < TOLERANCE
    assert after.lengths.tolist() == [1, 1, 20, 1]
