"""Routed experts in few bits: kept so on the device, decoded as far as they are used."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, error, random_params, random_tokens, run
from jax.extend.core import jaxprs_in_params

from llama_jax.config import LayerSpec, LlamaConfig, MoeSpec
from llama_jax.model.quantization import dequantize_params, quantize_params
from llama_jax.model.weights import experts
from llama_jax.params import init_params
from llama_jax.recipe import recipe
from llama_jax.schemes import scheme_named

EXPERTS, WIDTH, HIDDEN = 8, 64, 32
LAYOUTS = ("int8_g16", "int4_g16_min", "int4_g8", "int4_g16_zero_ordered", "fp8")


def stacks(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The members of gate, up and down, and the weights that they stand for."""
    scheme, stored, plain = scheme_named(name), {}, {}
    for i, (leaf, shape) in enumerate(
        {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}.items()
    ):
        members = dict(scheme.encode(0.2 * jax.random.normal(jax.random.key(i), (EXPERTS, *shape))))
        if "order" in members:
            orders = [np.random.default_rng(e).permutation(shape[1]) for e in range(EXPERTS)]
            members["order"] = jnp.asarray(np.stack(orders), jnp.int32)
        stored[leaf], plain[leaf] = members, {"weight": scheme.decode(members, jnp.float32)}
    return stored, plain


def call(leaves: dict[str, Any], x: jax.Array, ids: jax.Array) -> jax.Array:
    return experts(x, ids, leaves, activation=jax.nn.silu, input_scale=None, output_scale=jnp.ones(ids.shape))


def largest_float(jaxpr: Any) -> int:
    """Numbers of the largest floating-point array that a computation makes, in whatever depth."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [v.aval.size for v in equation.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating)]
        sizes += [largest_float(inner) for inner in jaxprs_in_params(equation.params)]
    return max(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_used_experts_alone_are_decoded(name: str) -> None:
    """Of one token two of eight; of many all; each time as with decoded weights, also where tokens share an expert."""
    stored, plain = stacks(name)
    for tokens in (1, 3, 4, 9):
        x = jax.random.normal(jax.random.key(7), (tokens, HIDDEN))
        ids = jnp.asarray(np.random.default_rng(tokens).integers(0, EXPERTS, (tokens, 2)), jnp.int32).at[0].set([5, 2])
        assert error(call(stored, x, ids), call(plain, x, ids)) < 1e-5
        decoded = largest_float(jax.make_jaxpr(call)(stored, x, ids).jaxpr)
        assert decoded == min(2 * tokens, EXPERTS) * WIDTH * HIDDEN


MIXTURES = {"mixtral": TINY["softmax-moe"], "scout": TINY["sigmoid-moe"]}


@pytest.mark.parametrize("weights", ["int8_g4", "int4_g4_min"])
@pytest.mark.parametrize("name", MIXTURES)
def test_models(name: str, weights: str) -> None:
    """One token, and many: logits of the decoded model."""
    config: LlamaConfig = MIXTURES[name]
    params, stored = quantize_params(random_params(config), config, recipe(weights, lm_head="int8"))
    assert all(weights in leaf for leaf in params["layers"]["0"]["moe"]["experts"].values())
    decoded, plain = dequantize_params(params, stored, jnp.float32)
    for length in (1, 7):
        tokens = random_tokens(config, 1, length)
        assert error(run(params, stored, tokens)[0], run(decoded, plain, tokens)[0]) < 2e-5


@pytest.mark.parametrize(
    ("hidden", "width", "count", "top_k", "gigabytes"), [(4096, 14336, 8, 2, 0.75), (5120, 8192, 16, 1, 1.07)]
)
def test_published_shapes(hidden: int, width: int, count: int, top_k: int, gigabytes: float) -> None:
    """Of Mixtral 8x7B and Llama 4 Scout: a layer's experts in int4 take 4.25 bits of each weight."""
    config = TINY["softmax-moe"].replace(hidden_size=hidden, layers=(LayerSpec(mlp=MoeSpec(count, top_k, width)),))
    stored = config.replace(
        schemes=tuple((f"layers.0.moe.experts.{p}_proj", "int4_g64") for p in ("gate", "up", "down"))
    )
    shapes = jax.eval_shape(lambda: init_params(stored, jax.random.key(0), jnp.bfloat16))
    leaves = shapes["layers"]["0"]["moe"]["experts"]
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(leaves))
    assert held == 3 * count * hidden * width * 4.25 / 8
    assert held == pytest.approx(gigabytes * 1e9, rel=0.01)
