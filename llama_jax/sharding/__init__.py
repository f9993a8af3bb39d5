"""The placement of a model's arrays on several devices, as data: axes of a mesh, and rules.

A mesh has named axes (`MESH_AXES`). Every dimension of a parameter, a cache or an activation has a logical name
("mlp", "kv_heads", "batch", ...), and rules say over which axes of the mesh a name is split: `RULES`, or those that a
`RuledMesh` carries. Only `RuledMesh.over` and `share` read them. `llama_jax.layout` shows the result for a model.
XLA derives the communication; no other part of the code knows how many devices there are.

    mesh = make_mesh(tensor=8)
    model, tokenizer = load("org/name", mesh=mesh)

    with on(mesh):
        logits, _ = jax.jit(forward, static_argnames="config")(model.params, model.config, tokens)
"""

from __future__ import annotations

from llama_jax.sharding.axes import MESH_AXES, RULES, Axes, MeshAxes, Rules, parse_mesh, requested_axes
from llama_jax.sharding.context import constrain, in_use, local, on, share, split_over, ways
from llama_jax.sharding.mesh import AnyMesh, DeviceMesh, RuledMesh, automatic_mesh, make_mesh, ruled
from llama_jax.sharding.rows import ONE_DEVICE, RowSplit

__all__ = [
    "MESH_AXES",
    "ONE_DEVICE",
    "RULES",
    "AnyMesh",
    "Axes",
    "DeviceMesh",
    "MeshAxes",
    "RowSplit",
    "RuledMesh",
    "Rules",
    "automatic_mesh",
    "constrain",
    "in_use",
    "local",
    "make_mesh",
    "on",
    "parse_mesh",
    "requested_axes",
    "ruled",
    "share",
    "split_over",
    "ways",
]
