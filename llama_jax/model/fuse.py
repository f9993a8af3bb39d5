"""Parameter layouts made on load; `forward` accepts each of them.

`fuse_params` joins projections that share their input, for fewer and larger matrix products. `repeat_kv_heads` repeats
key/value heads where there are fewer of them than devices. `arrange` does both, as `load` needs them. None of
them modifies its input tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError
from llama_jax.layout import split_config
from llama_jax.model.adapters import MEMBERS, adapter_axes
from llama_jax.params import JOINT, PROJECTION_AXES, Params
from llama_jax.schemes import leaf_axes
from llama_jax.sharding import Axes, DeviceMesh, constrain, on

JOINED = tuple(part for parts in JOINT.values() for part in parts)
"""Projections that become part of a joint one; routed experts stay as they are."""


def fuse_params(params: Params, config: LlamaConfig) -> Params:
    """q, k and v projections in one `qkv_proj`, gate and up in one `gate_up_proj`; everything else as it is.

    qkv_proj has weights [kv_heads, group + 2, head_dim, hidden], of each key/value head its queries, its key and its
    value; gate_up_proj has [2, mlp, hidden]; biases lack the last dimension, and the members that a scheme stores in
    place of a weight have what their axes say. So a split by heads or by hidden units takes whole rows of each of them.

    Projections of unlike schemes stay apart, as do those of a scheme that does not store them row by row (a member
    without the axis of the outputs, or with one entry for several of them): `forward` then multiplies with each.
    """
    layers = {name: fuse_layer(layer, config) for name, layer in params["layers"].items()}
    return {**params, "layers": layers}


def fuse_layer(layer: Params, config: LlamaConfig) -> Params:
    """One layer of `fuse_params`."""
    sizes = (config.q_dim, config.kv_dim, config.kv_dim)
    qkv = partial(_fuse_qkv, kv_heads=config.num_kv_heads, head_dim=config.head_dim)
    fused = {**layer, "attn": _fused(layer["attn"], "qkv_proj", sizes, qkv)}
    if "mlp" in layer:
        fused["mlp"] = _fuse_mlp(layer["mlp"])
    elif "shared" in layer["moe"]:
        fused["moe"] = {**layer["moe"], "shared": _fuse_mlp(layer["moe"]["shared"])}
    return fused


def split_joint(name: str, x: jax.Array) -> tuple[jax.Array, ...]:
    """The parts `JOINT[name]` of a member of a joint projection, each [out, ...]."""
    if name == "gate_up_proj":
        return x[0], x[1]
    parts = (x[:, :-2], x[:, -2], x[:, -1])
    sizes = (part.shape[0] * (part.shape[1] if i == 0 else 1) * x.shape[2] for i, part in enumerate(parts))
    return tuple(part.reshape(size, *x.shape[3:]) for part, size in zip(parts, sizes, strict=True))


def split_layer(layer: Params) -> Params:
    """One layer with every joint projection taken apart again: the inverse of `fuse_layer`."""
    apart: Params = {}
    for name, value in layer.items():
        if name in JOINT:
            members = {member: split_joint(name, x) for member, x in value.items()}
            apart |= {part: {m: x[i] for m, x in members.items()} for i, part in enumerate(JOINT[name])}
        else:
            apart[name] = split_layer(value) if isinstance(value, dict) else value
    return apart


def _fuse_mlp(mlp: Params) -> Params:
    width = max(x.shape[0] for x in mlp["gate_proj"].values())
    return _fused(mlp, "gate_up_proj", (width, width), _stack)


def _fused(block: Params, name: str, sizes: Sequence[int], join: Any) -> Params:
    """`block` with the joint projection `name` in place of its parts, if they can be joined."""
    parts = [block[part] for part in JOINT[name]]
    rows = [
        axes[:1] == PROJECTION_AXES[part][:1] and leaf[member].shape[0] == size
        for part, leaf, size in zip(JOINT[name], parts, sizes, strict=True)
        for member, axes in leaf_axes(leaf, PROJECTION_AXES[part]).items()
    ]
    if len({frozenset(leaf) for leaf in parts}) > 1 or not all(rows):
        return block
    axes = leaf_axes(parts[0], PROJECTION_AXES[name])
    leaf = {member: join(*(leaf[member] for leaf in parts), axes=axes[member]) for member in parts[0]}
    return {name: leaf} | {part: value for part, value in block.items() if part not in JOINT[name]}


@partial(jax.jit, static_argnames=("axes", "kv_heads", "head_dim"))
def _fuse_qkv(q: jax.Array, k: jax.Array, v: jax.Array, *, axes: Axes, kv_heads: int, head_dim: int) -> jax.Array:
    heads = [x.reshape(kv_heads, -1, head_dim, *x.shape[1:]) for x in (q, k, v)]
    return constrain(jnp.concatenate(heads, axis=1), axes)


@partial(jax.jit, static_argnames="axes")
def _stack(gate: jax.Array, up: jax.Array, *, axes: Axes) -> jax.Array:
    return constrain(jnp.stack([gate, up]), axes)


def arrange(
    params: Params, config: LlamaConfig, mesh: DeviceMesh | None, *, fuse: bool = True, donate: bool = False
) -> tuple[Params, LlamaConfig]:
    """Canonical parameters in the layout that a mesh computes with.

    Args:
      params: on the devices of `mesh`, as `layout.param_sharding` places them; anywhere if it is None.
      donate: frees the arrays that others are made of, layer by layer, so that no more than one layer exists twice.
        For a caller that owns them, and will not use `params` again.

    Returns:
      The tree, and the config of what it is now (`layout.split_config`).
    """
    split, layers = split_config(config, mesh), {}
    with on(mesh):
        for name, layer in params["layers"].items():
            repeated = _repeat_layer(layer, config, split)
            layers[name] = fuse_layer(repeated, split) if fuse else repeated
            if donate:
                kept = {id(leaf) for leaf in jax.tree.leaves(layers[name])}
                for leaf in jax.tree.leaves(layer):
                    if id(leaf) not in kept:
                        leaf.delete()
    return {**params, "layers": layers}, split


def repeat_kv_heads(params: Params, config: LlamaConfig, repeated: LlamaConfig) -> Params:
    """Canonical parameters with the rows of key and value projections repeated, for a model with more of these heads.

    Args:
      params: of the model `config`, or an adapter of it (`adapters.put_adapter`).
      repeated: as `layout.split_config` gives it.

    Raises:
      RequestError: a scheme stores rows of several heads together.
    """
    layers = {name: _repeat_layer(layer, config, repeated) for name, layer in params.get("layers", {}).items()}
    return {**params, "layers": layers}


def _repeat_layer(layer: Params, config: LlamaConfig, repeated: LlamaConfig) -> Params:
    heads, times = config.num_kv_heads, repeated.num_kv_heads // config.num_kv_heads
    if times == 1 or "attn" not in layer:
        return layer

    def repeat(name: str, leaf: Params) -> Params:
        weight = PROJECTION_AXES[name]
        adapted = leaf.keys() >= set(MEMBERS)
        axes = adapter_axes(name, leaf, slots=False) if adapted else leaf_axes(leaf, weight)
        by_head = [member for member, names in axes.items() if names[:1] == weight[:1]]
        if any(leaf[member].shape[0] % heads for member in by_head):
            raise RequestError(
                f"{name} is stored by rows of more than one of its {heads} heads, which cannot be repeated",
                param="mesh",
                hint="choose a mesh with a tensor axis that divides the key/value heads",
            )
        return {**leaf, **{member: _repeat(leaf[member], heads=heads, times=times) for member in by_head}}

    keys_and_values = [name for name in ("k_proj", "v_proj") if name in layer["attn"]]
    return {**layer, "attn": {**layer["attn"], **{name: repeat(name, layer["attn"][name]) for name in keys_and_values}}}


@partial(jax.jit, static_argnames=("heads", "times"))
def _repeat(x: jax.Array, *, heads: int, times: int) -> jax.Array:
    rows = jnp.repeat(x.reshape(heads, -1, *x.shape[1:]), times, axis=0)
    return constrain(rows, ("kv_heads",)).reshape(-1, *x.shape[1:])
