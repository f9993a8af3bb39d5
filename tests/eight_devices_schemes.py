"""A scheme from outside on eight devices; `test_schemes.py` runs these tests in a process of its own."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers import TINY, error, random_tokens, run
from toy_scheme import TOY, WHOLE, encoded, with_scheme

from llama_jax.aot.programs import decode_program, fused_parameters
from llama_jax.checkpoint import load_params, save
from llama_jax.layout import param_sharding
from llama_jax.model.fuse import arrange
from llama_jax.params import flatten, param_specs, unflatten
from llama_jax.plan import costs
from llama_jax.schemes import Scheme
from llama_jax.sharding import make_mesh, on


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("plain", WHOLE), ("plain", TOY), ("tied-mqa", TOY), ("sigmoid-moe", TOY)],
    ids=lambda x: getattr(x, "name", x),
)
def test_load_arrange_and_forward(name: str, scheme: Scheme, tmp_path: Path) -> None:
    """Saved, loaded to its places, fused, and multiplied; every device holds what the plan counts."""
    config, mesh = with_scheme(TINY[name], scheme), make_mesh("data=2,tensor=4")
    params, plain = encoded(config)
    tokens = random_tokens(config, 2, 6)
    expected, _ = run(plain, TINY[name], tokens)
    path = save(tmp_path / "m", params, config) if name == "plain" else None
    where = param_sharding(config, mesh)
    if path is None:
        flat = flatten(params)
        placed = unflatten({s.name: jax.device_put(flat[s.name], where(s)) for s in param_specs(config)})
    else:
        placed = load_params(path, sharding=where, config=config)
    arranged, split = arrange(placed, config, mesh, donate=True)
    with on(mesh):
        logits, _ = run(arranged, split, tokens)
    assert error(logits, expected) < 1e-5
    if scheme is TOY:
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(arranged))
        assert held == costs.held_bytes(split, 4, mesh.shape)
    with on(mesh):
        shapes = fused_parameters(split, mesh, "float32")
    for leaf, shape in zip(jax.tree.leaves(arranged), jax.tree.leaves(shapes), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
        assert leaf.sharding.shard_shape(leaf.shape) == shape.sharding.shard_shape(shape.shape)


def test_compiled_program_takes_the_members() -> None:
    config, mesh = with_scheme(TINY["plain"]), make_mesh("tensor=2")
    program = decode_program(config, mesh, batch=2, capacity=64, dtype=jnp.float32)
    with on(mesh):
        memory = program.lower().compile().memory_analysis()
    assert memory.argument_size_in_bytes >= costs.held_bytes(config, 4, mesh.shape)
