"""The fused layout: the same numbers with fewer matrix products."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, arange_positions, error, in_slots, random_adapters, random_params, random_tokens, run

from llama_jax.cache import DenseCache
from llama_jax.model import activation_names
from llama_jax.model.fuse import fuse_params, repeat_kv_heads
from llama_jax.params import abstract_params, count_params, flatten


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_same_logits_and_activations(name: str) -> None:
    config = TINY[name]
    params, tokens = random_params(config), random_tokens(config, 2, 6)
    cache = DenseCache.create(config, 2, 6, jnp.float32)
    args = (config, tokens, arange_positions(2, 6), cache)
    names = activation_names(config)
    expected, before, seen = run(params, *args, capture=names)
    logits, after, fused_seen = run(fuse_params(params, config), *args, capture=names)
    assert error(logits, expected) < 1e-5
    chex.assert_trees_all_close(after, before, atol=1e-5)
    chex.assert_trees_all_close(fused_seen, seen, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_layout(name: str) -> None:
    """Nothing is lost or doubled, and the other leaves are the very same arrays."""
    config = TINY[name]
    params = random_params(config)
    before, after = flatten(params), flatten(fuse_params(params, config))
    assert sum(x.size for x in after.values()) == count_params(config)
    for i, layer in enumerate(config.layers):
        heads = (config.num_kv_heads, config.num_heads // config.num_kv_heads + 2, config.head_dim)
        assert after.pop(f"layers.{i}.attn.qkv_proj.weight").shape == (*heads, config.hidden_size)
        if config.qkv_bias:
            assert after.pop(f"layers.{i}.attn.qkv_proj.bias").shape == heads
        width = layer.mlp if isinstance(layer.mlp, int) else layer.mlp.shared_intermediate_size
        where = f"layers.{i}.{'mlp' if isinstance(layer.mlp, int) else 'moe.shared'}.gate_up_proj"
        if width:
            assert after.pop(f"{where}.weight").shape == (2, width, config.hidden_size)
        if width and config.mlp_bias:
            assert after.pop(f"{where}.bias").shape == (2, width)
    assert all(after[key] is before[key] for key in after)
    assert not any("qkv" in key or "gate_up" in key for key in after)


def test_rows_of_one_key_value_head_stand_together() -> None:
    config = TINY["plain"]  # 4 query heads, 2 key/value heads, head_dim 8
    attn = random_params(config)["layers"]["0"]["attn"]
    fused = fuse_params(random_params(config), config)["layers"]["0"]["attn"]["qkv_proj"]["weight"]
    q, k, v = (np.asarray(attn[name]["weight"]) for name in ("q_proj", "k_proj", "v_proj"))
    rows = np.concatenate([q[:16], k[:8], v[:8], q[16:], k[8:], v[8:]])
    np.testing.assert_array_equal(np.reshape(fused, rows.shape), rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("fused", [False, True])
def test_repeated_key_value_heads_compute_the_same(name: str, fused: bool) -> None:
    """As many of them as query heads; adapters of the keys and values are repeated with them."""
    config = TINY[name]
    repeated = config.replace(num_kv_heads=config.num_heads)
    params, adapters = random_params(config), random_adapters(config)
    tokens = random_tokens(config, 2, 6)
    ids = jnp.array([[1], [0]])
    expected, _ = run(params, config, tokens, adapters=in_slots(adapters), adapter_ids=ids)
    params, adapters = (repeat_kv_heads(tree, config, repeated) for tree in (params, adapters))
    k = params["layers"]["0"]["attn"]["k_proj"]["weight"]
    assert k.shape == (repeated.kv_dim, config.hidden_size)
    logits, _ = run(
        fuse_params(params, repeated) if fused else params,
        repeated,
        tokens,
        adapters=in_slots(adapters),
        adapter_ids=ids,
    )
    assert error(logits, expected) < 1e-5


def test_traceable_and_differentiable() -> None:
    config = TINY["biased"]
    shapes = jax.eval_shape(lambda p: fuse_params(p, config), abstract_params(config))
    assert shapes["layers"]["0"]["attn"]["qkv_proj"]["bias"].shape == (4, 3, 8)
    params = random_params(config)
    grads = jax.grad(lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(fuse_params(p, config))) / 2)(params)
    chex.assert_trees_all_close(grads, params)
