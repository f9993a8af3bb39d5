"""Where every array of a model lives on several devices, as data: axes of a mesh, rules, and what they come to.

A mesh has named axes (`MESH_AXES`). Every dimension of a parameter, a cache or an activation has a logical name
("mlp", "kv_heads", "batch", ...), and one table (`RULES`) says over which axis of the mesh a name is split. Where a
size does not divide, `explain` says what happens instead. XLA makes the communication from that; no other part of the
code knows how many devices there are.

    mesh = make_mesh(tensor=8)
    model, tokenizer = load("org/name", mesh=mesh)

    with on(mesh):
        logits, _ = jax.jit(forward, static_argnames="config")(model.params, model.config, tokens)
"""

from __future__ import annotations

from llama_jax.sharding.activations import constrain, in_use, local, local_size, parts, split_over
from llama_jax.sharding.axes import MESH_AXES, RULES, Rules, parse_mesh, requested_axes
from llama_jax.sharding.layout import Split, check, explain, param_sharding, partition_spec, split_config
from llama_jax.sharding.mesh import automatic_mesh, make_mesh, on

__all__ = [
    "MESH_AXES",
    "RULES",
    "Rules",
    "Split",
    "automatic_mesh",
    "check",
    "constrain",
    "explain",
    "in_use",
    "local",
    "local_size",
    "make_mesh",
    "on",
    "param_sharding",
    "parse_mesh",
    "partition_spec",
    "parts",
    "requested_axes",
    "split_config",
    "split_over",
]
