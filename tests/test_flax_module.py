"""The Linen facade: the same tree and the same numbers as the functions."""

from __future__ import annotations

import subprocess
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, arange_positions, load_golden, random_params, random_tokens, run

from llama_jax.cache import DenseCache
from llama_jax.config import preset
from llama_jax.model import forward
from llama_jax.model.flax_module import Llama
from llama_jax.model.fuse import fuse_params
from llama_jax.params import abstract_params, flatten, param_specs


@pytest.mark.parametrize("name", TINY)
def test_init_gives_the_tree_of_the_specs(name: str) -> None:
    config = TINY[name]
    variables = jax.eval_shape(Llama(config).init, jax.random.key(0), random_tokens(config, 1, 3))
    assert set(variables) == {"params"}
    chex.assert_trees_all_equal_shapes_and_dtypes(variables["params"], abstract_params(config))
    assert {n: x.shape for n, x in flatten(variables["params"]).items()} == {
        s.name: s.shape for s in param_specs(config)
    }


def test_init() -> None:
    config = TINY["plain"]
    variables = Llama(config).init(jax.random.key(0), random_tokens(config, 1, 3))
    chex.assert_trees_all_equal_shapes_and_dtypes(variables["params"], abstract_params(config))
    leaves = flatten(variables["params"])
    assert np.std(leaves["layers.0.attn.q_proj.weight"]) == pytest.approx(config.hidden_size**-0.5, rel=0.2)
    np.testing.assert_array_equal(leaves["final_norm.weight"], 1)


def test_param_dtype() -> None:
    config = TINY["plain"]
    init = Llama(config, param_dtype="bfloat16").init
    params = jax.eval_shape(init, jax.random.key(0), random_tokens(config, 1, 3))["params"]
    chex.assert_trees_all_equal_shapes_and_dtypes(params, abstract_params(config, "bfloat16"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "sigmoid-moe"])
def test_apply_equals_forward(name: str) -> None:
    """Bit for bit, with and without jit, whichever of the two the parameters come from."""
    config = TINY[name]
    tokens, model = random_tokens(config, 2, 5), Llama(config)
    init, apply = jax.jit(model.init), jax.jit(model.apply)
    for params in (
        random_params(config),
        init(jax.random.key(1), tokens)["params"],
        fuse_params(random_params(config), config),
    ):
        logits, cache = apply({"params": params}, tokens)
        chex.assert_trees_all_equal(logits, run(params, config, tokens)[0])
        assert cache is None
    chex.assert_trees_all_equal(model.apply({"params": params}, tokens), forward(params, config, tokens))


def test_apply_takes_the_arguments_of_forward() -> None:
    config = TINY["plain"]
    params, tokens, model = random_params(config), random_tokens(config, 2, 4), Llama(config)
    args = (tokens, arange_positions(2, 4), DenseCache.create(config, 2, 5, jnp.float32))
    logits, cache = model.apply({"params": params}, *args)
    expected, expected_cache = forward(params, config, *args)
    chex.assert_trees_all_equal((logits, cache), (expected, expected_cache))
    token = jnp.array([[3], [4]], jnp.int32)
    after, _ = model.apply({"params": params}, token, jnp.full((2, 1), 4), cache)
    chex.assert_trees_all_equal(after, forward(params, config, token, jnp.full((2, 1), 4), cache)[0])

    embeds = params["embed"]["weight"][tokens]
    kwargs = {"inputs_embeds": embeds, "capture": ("final_norm",), "logits_at": jnp.array([[3], [0]])}
    chex.assert_trees_all_equal(
        model.apply({"params": params}, None, **kwargs), forward(params, config, None, **kwargs)
    )


def test_golden() -> None:
    g = load_golden("llama2-mha")
    logits, _ = jax.jit(Llama(g.config).apply)({"params": g.params}, g.tokens, g.positions)
    assert np.abs(np.asarray(logits) - g.logits)[g.mask].max() < 5e-5 * np.abs(g.logits).max()


def test_gradient() -> None:
    config = TINY["biased"]
    params, tokens, model = random_params(config), random_tokens(config, 2, 4), Llama(config)

    def loss(logits: jax.Array) -> jax.Array:
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 7])

    grads = jax.jit(jax.grad(lambda p: loss(model.apply({"params": p}, tokens)[0])))(params)
    expected = jax.jit(jax.grad(lambda p: loss(forward(p, config, tokens)[0])))(params)
    chex.assert_tree_all_finite(grads)
    chex.assert_trees_all_close(grads, expected, atol=1e-6)


@pytest.mark.slow
def test_eval_shape() -> None:
    """Shapes of a model of 800 GB, without its memory."""
    config = preset("llama-3.1-405b")
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    variables = jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)
    chex.assert_trees_all_equal_shapes_and_dtypes(variables["params"], abstract_params(config))
    logits, _ = jax.eval_shape(Llama(config).apply, variables, tokens)
    assert logits.shape == (1, 4, config.vocab_size)


def test_inside_another_module() -> None:
    config = TINY["plain"]

    class Scorer(nn.Module):
        @nn.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            logits, _ = Llama(config, name="llama")(tokens)
            return nn.Dense(1, name="head")(logits)[..., 0]

    tokens = random_tokens(config, 2, 4)
    variables = Scorer().init(jax.random.key(0), tokens)
    assert set(variables["params"]) == {"llama", "head"}
    chex.assert_trees_all_equal_shapes_and_dtypes(variables["params"]["llama"], abstract_params(config))
    chex.assert_shape(Scorer().apply(variables, tokens), (2, 4))


def test_init_depends_on_the_key_alone() -> None:
    config = TINY["plain"]
    a = Llama(config).init(jax.random.key(0), random_tokens(config, 1, 3))["params"]
    b = Llama(config).init(jax.random.key(0), random_tokens(config, 2, 5))["params"]
    chex.assert_trees_all_equal(a, b)
    c = Llama(config).init(jax.random.key(1), random_tokens(config, 1, 3))["params"]
    assert not np.array_equal(a["embed"]["weight"], c["embed"]["weight"])
    assert not np.array_equal(a["embed"]["weight"], a["lm_head"]["weight"])


def test_flax_is_imported_lazily() -> None:
    code = (
        "import sys, llama_jax; assert 'flax' not in sys.modules and 'jax' not in sys.modules;"
        "llama_jax.forward; assert 'flax' not in sys.modules;"
        "llama_jax.Llama; assert 'flax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
