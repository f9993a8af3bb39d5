"""Which dimension of a parameter is split over which axis of a mesh.

`ParamSpec.axes` names the dimensions ("q_heads", "mlp", ...); a table of rules maps these names to axes of the mesh. A
dimension that does not divide evenly stays whole, so every rule is safe for every model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.config import LlamaConfig
from llama_jax.params import ParamSpec

Rules = Mapping[str, str]
"""Logical axis to mesh axis; logical axes that are not listed are never split."""

TENSOR_PARALLEL: Rules = MappingProxyType(
    {
        "expert": "tensor",
        "q_heads": "tensor",
        "kv_heads": "tensor",
        "mlp": "tensor",
        "vocab": "tensor",
    }
)
"""Heads, hidden units, experts and the vocabulary over the mesh axis "tensor"."""


def partition_spec(spec: ParamSpec, config: LlamaConfig, mesh: Mesh, rules: Rules = TENSOR_PARALLEL) -> PartitionSpec:
    """How one parameter is split.

    Heads are split whole: what has to divide is their number, not their number times head_dim. Each axis of the mesh is
    used once, for the first dimension that it divides (experts before the width of each).
    """
    heads = {"q_heads": config.num_heads, "kv_heads": config.num_kv_heads}
    used: set[str | None] = set()
    split: list[str | None] = []
    for axis, size in zip(spec.axes, spec.shape, strict=True):
        over = rules.get(axis or "")
        if over in mesh.shape and over not in used and heads.get(axis or "", size) % mesh.shape[over] == 0:
            used.add(over)
            split.append(over)
        else:
            split.append(None)
    return PartitionSpec(*split)


def param_sharding(
    config: LlamaConfig, mesh: Mesh, rules: Rules = TENSOR_PARALLEL
) -> Callable[[ParamSpec], NamedSharding]:
    """The sharding of every parameter of a model, for the argument `sharding` of `load_params`.

    A mesh that lacks the axes of the rules holds a whole copy on every device.
    """
    automatic = automatic_mesh(mesh)
    return lambda spec: NamedSharding(automatic, partition_spec(spec, config, automatic, rules))


def automatic_mesh(mesh: Mesh) -> Mesh:
    """The same devices and axes, with axes that the compiler shards over by itself.

    `jax.make_mesh` gives axes of the explicit kind, under which every operation of a model would have to name the
    sharding of its result (https://docs.jax.dev/en/latest/notebooks/explicit-sharding.html).
    """
    return Mesh(mesh.devices, mesh.axis_names)
