"""The table of parameters and what follows from it."""

from __future__ import annotations

import math

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY

from llama_jax.config import PRESETS, preset
from llama_jax.params import (
    abstract_params,
    count_params,
    flatten,
    init_params,
    param_specs,
    projection_names,
    unflatten,
)

AXES = {"vocab", "embed", "q_heads", "kv_heads", "head_dim", "mlp", "expert", None}


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-4-scout", "llama-4-maverick", "mixtral-8x7b", "qwen3-8b"])
def test_table(name: str) -> None:
    config = preset(name)
    specs = param_specs(config)
    for names in ([s.name for s in specs], [s.hf for s in specs], [s.gguf for s in specs]):
        assert len(set(names)) == len(specs)
    sizes: dict[str, set[int]] = {}
    for spec in specs:
        assert len(spec.shape) == len(spec.axes), spec.name
        assert set(spec.axes) <= AXES
        assert spec.size == math.prod(spec.shape) > 0
        assert spec.path == tuple(spec.name.split("."))
        for axis, size in zip(spec.axes, spec.shape, strict=True):
            sizes.setdefault(axis, set()).add(size)
        # Norms start as ones, biases as zeros, everything else random.
        kind = "ones" if "norm" in spec.name else "zeros" if spec.name.endswith(".bias") else "normal"
        assert spec.init == kind, spec.name
    # A logical axis means the same size everywhere; only MLPs come in several widths.
    assert sizes["embed"] == {config.hidden_size}
    assert sizes["vocab"] == {config.vocab_size}
    assert sizes["q_heads"] == {config.q_dim}
    assert sizes["kv_heads"] == {config.kv_dim}


@pytest.mark.parametrize("name", PRESETS)
def test_count_equals_the_abstract_tree(name: str) -> None:
    config = preset(name)
    leaves = jax.tree.leaves(abstract_params(config))
    assert sum(math.prod(x.shape) for x in leaves) == count_params(config)
    assert {x.dtype for x in leaves} == {jnp.dtype(config.dtype)}


def test_optional_leaves() -> None:
    plain, biased, tied = (set(flatten(abstract_params(TINY[n]))) for n in ("plain", "biased", "tied-mqa"))
    assert {n.removeprefix("layers.0.") for n in biased - plain} == {
        *(f"attn.{p}_proj.bias" for p in "qkvo"),
        *(f"mlp.{p}_proj.bias" for p in ("gate", "up", "down")),
        "attn.q_norm.weight",
        "attn.k_norm.weight",
    }
    assert plain - tied == {"lm_head.weight"}


def test_projection_names() -> None:
    assert projection_names(TINY["plain"]) == tuple(
        f"layers.0.{n}_proj" for n in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
    )
    assert {n for n in projection_names(TINY["sigmoid-moe"]) if "moe" in n} == {
        f"layers.0.moe.shared.{n}_proj" for n in ("gate", "up", "down")
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_init(name: str) -> None:
    config = TINY[name]
    params = init_params(config, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, abstract_params(config))
    chex.assert_trees_all_equal(params, init_params(config, jax.random.key(0)))
    other = flatten(init_params(config, jax.random.key(1)))
    flat = flatten(params)
    random = {s.name for s in param_specs(config) if s.init == "normal"}
    assert {n for n in flat if not np.array_equal(flat[n], other[n])} == random
    for spec in param_specs(config):
        if spec.init == "normal":
            assert np.std(flat[spec.name]) == pytest.approx(spec.shape[-1] ** -0.5, rel=0.25), spec.name
            assert abs(np.mean(flat[spec.name])) < 0.1
        else:
            np.testing.assert_array_equal(flat[spec.name], float(spec.init == "ones"))
    # Leaves of equal shape hold different numbers.
    assert len({np.asarray(flat[n]).tobytes() for n in random}) == len(random)


def test_adding_a_leaf_changes_no_other() -> None:
    config = TINY["plain"]
    before = flatten(init_params(config, jax.random.key(0)))
    after = flatten(init_params(config.replace(qkv_bias=True, mlp_bias=True), jax.random.key(0)))
    assert after.keys() > before.keys()
    chex.assert_trees_all_equal(before, {n: after[n] for n in before})
    deeper = flatten(init_params(config.replace(layers=config.layers * 3), jax.random.key(0)))
    chex.assert_trees_all_equal(before, {n: deeper[n] for n in before})


@pytest.mark.parametrize("dtype", [None, "bfloat16", jnp.float16, np.float32])
def test_dtype(dtype: object) -> None:
    config = TINY["plain"].replace(dtype="float16")
    expected = jnp.dtype("float16" if dtype is None else dtype)
    for tree in (abstract_params(config, dtype), init_params(config, jax.random.key(0), dtype)):
        assert {x.dtype for x in jax.tree.leaves(tree)} == {expected}


KEYS = st.text("abc0", min_size=1, max_size=3)
TREES = st.recursive(
    st.dictionaries(KEYS, st.integers(), min_size=1, max_size=3),
    lambda inner: st.dictionaries(KEYS, st.one_of(st.integers(), inner), min_size=1, max_size=3),
    max_leaves=12,
)


@hypothesis.given(TREES)
def test_flatten_and_unflatten_are_inverse(tree: dict) -> None:
    flat = flatten(tree)
    assert unflatten(flat) == tree
    assert flatten(unflatten(flat)) == flat
    assert sorted(flat.values()) == sorted(jax.tree.leaves(tree))
