"""Quantised weights on eight devices; `test_quantization.py` runs these tests in a process of its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from helpers import TINY, error, random_params, random_tokens, run, tiny_config
from test_quantization import WANTED

from llama_jax.aot.programs import fused_parameters
from llama_jax.config import LayerSpec
from llama_jax.kernels import report
from llama_jax.kernels.dispatch import using
from llama_jax.layout import check, param_sharding
from llama_jax.model.fuse import arrange
from llama_jax.model.loaded import Model
from llama_jax.model.quantization import dequantize_params, quantize, quantize_params
from llama_jax.params import canonical_specs, flatten, param_specs, unflatten
from llama_jax.plan import costs
from llama_jax.recipe import Recipe, recipe
from llama_jax.schemes import scheme_named
from llama_jax.sharding import make_mesh, on

RECIPES = WANTED | {
    # Groups that two devices can share: of 24 hidden units, and of 12 of each expert.
    "biased": recipe("int4", group=4, lm_head="int4_g8_zero", embed="int8_g4"),
    "tied-mqa": recipe("int4", group=4, symmetric=True, lm_head="int8_g4"),
    "softmax-moe": recipe("fp8", group=2, embed="int4_g8_min"),
    "sigmoid-moe": recipe("int4_g2_zero", lm_head="bfloat16"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_split_and_multiplied(name: str) -> None:
    """Logits as on one device, whole groups on each, and every device holds what the plan counts."""
    config, mesh = TINY[name], make_mesh("data=4,tensor=2")
    params, stored = quantize_params(random_params(config), config, RECIPES[name])
    check(stored, mesh)
    tokens = random_tokens(config, 4, 6)
    decoded, _ = dequantize_params(params, stored, "float32")
    expected, _ = run(decoded, config, tokens)
    where, flat = param_sharding(stored, mesh), flatten(params)
    placed = unflatten({s.name: jax.device_put(flat[s.name], where(s)) for s in param_specs(stored)})
    arranged, split = arrange(placed, stored, mesh)
    with on(mesh):
        assert error(run(arranged, split, tokens)[0], expected) < 2e-5
        shapes = fused_parameters(split, mesh, "float32")
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(arranged))
    assert held == costs.held_bytes(split, 4, mesh.shape)
    for leaf, shape in zip(jax.tree.leaves(arranged), jax.tree.leaves(shapes), strict=True):
        assert leaf.sharding.shard_shape(leaf.shape) == shape.sharding.shard_shape(shape.shape)


def test_columns_in_another_order() -> None:
    """Of a projection whose inputs are split: each device takes what its columns need, wherever that lies."""
    config, mesh = TINY["plain"], make_mesh("data=4,tensor=2")
    flat, schemes = flatten(random_params(config)), []
    for i, spec in enumerate(canonical_specs(config)):
        if len(spec.shape) == 2 and spec.name.startswith("layers."):
            order = jax.random.permutation(jax.random.key(i), spec.shape[1])
            weight = flat.pop(spec.name)[:, order]
            schemes.append((spec.leaf, "int4_g4_zero_ordered"))
            members = scheme_named("int4_g4_zero").encode(weight) | {"order": order.astype("int32")}
            flat |= {f"{spec.leaf}.{name}": member for name, member in members.items()}
    stored = config.replace(schemes=tuple(schemes))
    check(stored, mesh)
    tokens = random_tokens(config, 4, 6)
    decoded, _ = dequantize_params(unflatten(flat), stored, "float32")
    expected, _ = run(decoded, config, tokens)
    where = param_sharding(stored, mesh)
    placed = unflatten({s.name: jax.device_put(flat[s.name], where(s)) for s in param_specs(stored)})
    arranged, split = arrange(placed, stored, mesh)
    with on(mesh):
        assert error(run(arranged, split, tokens)[0], expected) < 2e-5
        again, _ = dequantize_params(arranged, split, "float32")
        assert error(run(again, config, tokens)[0], expected) < 2e-5
    rounded, _ = run(unflatten(flat), stored.replace(activations="int8"), tokens)
    assert 1e-4 < error(rounded, expected) < 0.1
    with on(mesh):
        assert error(run(arranged, split.replace(activations="int8"), tokens)[0], rounded) < 2e-5


def test_quantised_where_it_lies() -> None:
    """A model on a mesh, quantised there: each device keeps its part, and the numbers are those of one device."""
    config, mesh = TINY["plain"], make_mesh("tensor=2")
    wanted = recipe("int4", group=4)
    where, flat = param_sharding(config, mesh), flatten(random_params(config))
    placed = unflatten({s.name: jax.device_put(flat[s.name], where(s)) for s in param_specs(config)})
    arranged, split = arrange(placed, config, mesh)
    model = quantize(Model(arranged, split, mesh), "int4", group=4)
    params, stored = quantize_params(unflatten(flat), config, wanted)
    tokens = random_tokens(config, 2, 6)
    with on(mesh):
        found, _ = run(model.params, model.config, tokens)
    assert error(found, run(params, stored, tokens)[0]) < 2e-5
    down = model.params["layers"]["0"]["mlp"]["down_proj"]["int4_g4_min"]
    assert down.sharding.shard_shape(down.shape) == (16, 6)


@pytest.mark.parametrize("wanted", [recipe("int4", group=32), recipe("int8"), recipe("int4_g32_zero")], ids=str)
def test_kernels_multiply_what_a_device_holds(wanted: Recipe) -> None:
    """Rows of some weights, whole groups of columns of others, with the results of one device."""
    heads = {"hidden_size": 256, "num_heads": 8, "num_kv_heads": 8, "head_dim": 32}
    config, mesh = tiny_config(LayerSpec(mlp=512), dtype="bfloat16", **heads), make_mesh("tensor=8")
    plain = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(config))
    params, stored = quantize_params(plain, config, wanted)
    tokens = random_tokens(config, 2, 3)
    where, flat = param_sharding(stored, mesh), flatten(params)
    placed = unflatten({s.name: jax.device_put(flat[s.name], where(s)) for s in param_specs(stored)})
    arranged, split = arrange(placed, stored, mesh)
    with using(quantized_matmul="pallas_interpret"):
        expected, _ = run(params, stored, tokens)
        with on(mesh):
            found, _ = run(arranged, split, tokens)
    assert error(found, expected) < 2e-2
    shapes = {c.shape.split(maxsplit=2)[2] for c in report() if c.backend == "pallas_interpret"}
    # q, k and v together, the output, gate and up together, down: of an eighth of the heads and hidden units.
    assert {"n96 k256", "n256 k32", "n128 k256", "n256 k64"} <= shapes


@pytest.mark.parametrize("wanted", [recipe("int8"), recipe("int4", group=4)], ids=str)
def test_activations_are_rounded_as_on_one_device(wanted: Recipe) -> None:
    """Also where a row of them lies on several devices: their scale is that of the whole row, or of the group."""
    config, mesh = TINY["biased"], make_mesh("data=4,tensor=2")
    params, stored = quantize_params(random_params(config), config, wanted)
    stored = stored.replace(activations="int8")
    tokens = random_tokens(config, 4, 6)
    expected, _ = run(params, stored, tokens)
    assert error(run(params, stored.replace(activations=None), tokens)[0], expected) > 1e-3
    where, flat = param_sharding(stored, mesh), flatten(params)
    placed = unflatten({s.name: jax.device_put(flat[s.name], where(s)) for s in param_specs(stored)})
    arranged, split = arrange(placed, stored, mesh)
    with on(mesh):
        assert error(run(arranged, split, tokens)[0], expected) < 2e-5
