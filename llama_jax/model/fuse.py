"""Layouts of the parameters that are made while loading; `forward` takes each of them.

`fuse_params` joins projections that share their input, for fewer and larger matrix products. `repeat_kv_heads` gives a
model more key/value heads, where there are fewer of them than devices. `arrange` is both, as `load` needs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig
from llama_jax.layout import split_config
from llama_jax.params import PROJECTION_AXES, Params
from llama_jax.sharding import DeviceMesh, constrain, on

_QKV = ("q_proj", "k_proj", "v_proj")
JOINED = (*_QKV, "gate_proj", "up_proj")
"""Projections that become part of a joint one; routed experts stay as they are."""


def fuse_params(params: Params, config: LlamaConfig) -> Params:
    """q, k and v projections in one `qkv_proj`, gate and up in one `gate_up_proj`; everything else as it is.

    qkv_proj has weights [kv_heads, group + 2, head_dim, hidden], of each key/value head its queries, its key and its
    value; gate_up_proj has [2, mlp, hidden]; biases lack the last dimension. So a split by heads or by hidden units
    takes whole rows of each of them.
    """
    layers = {name: fuse_layer(layer, config) for name, layer in params["layers"].items()}
    return {**params, "layers": layers}


def fuse_in_place(params: Params, config: LlamaConfig) -> None:
    """As `fuse_params`, but changes the tree, layer by layer, so that no more than one layer exists twice."""
    for name, layer in params["layers"].items():
        params["layers"][name] = fuse_layer(layer, config)


def fuse_layer(layer: Params, config: LlamaConfig) -> Params:
    """One layer of `fuse_params`."""
    attn = {name: value for name, value in layer["attn"].items() if name not in _QKV}
    attn["qkv_proj"] = {
        leaf: _fuse_qkv(*(layer["attn"][name][leaf] for name in _QKV), config.num_kv_heads, config.head_dim)
        for leaf in layer["attn"]["q_proj"]
    }
    fused = {**layer, "attn": attn}
    if "mlp" in layer:
        fused["mlp"] = _fuse_mlp(layer["mlp"])
    elif "shared" in layer["moe"]:
        fused["moe"] = {**layer["moe"], "shared": _fuse_mlp(layer["moe"]["shared"])}
    return fused


@partial(jax.jit, static_argnums=(3, 4))
def _fuse_qkv(q: jax.Array, k: jax.Array, v: jax.Array, kv_heads: int, head_dim: int) -> jax.Array:
    heads = [x.reshape(kv_heads, -1, head_dim, *x.shape[1:]) for x in (q, k, v)]
    return constrain(jnp.concatenate(heads, axis=1), PROJECTION_AXES["qkv_proj"])


def _fuse_mlp(mlp: Params) -> Params:
    fused = {leaf: _stack(mlp["gate_proj"][leaf], mlp["up_proj"][leaf]) for leaf in mlp["gate_proj"]}
    return {"gate_up_proj": fused, "down_proj": mlp["down_proj"]}


@jax.jit
def _stack(gate: jax.Array, up: jax.Array) -> jax.Array:
    return constrain(jnp.stack([gate, up]), PROJECTION_AXES["gate_up_proj"])


def arrange(params: Params, config: LlamaConfig, mesh: DeviceMesh | None, *, fuse: bool = True) -> LlamaConfig:
    """Puts canonical parameters, in place, into the layout in which a mesh computes with them.

    Args:
      params: on the devices of `mesh`, as `layout.param_sharding` places them; anywhere if it is None.

    Returns:
      The config of what they are now (`layout.split_config`).
    """
    split = split_config(config, mesh)
    with on(mesh):
        repeat_kv_heads(params, config, split)
        if fuse:
            fuse_in_place(params, split)
    return split


def repeat_kv_heads(params: Params, config: LlamaConfig, repeated: LlamaConfig) -> None:
    """Repeats the rows of canonical key and value projections, in place, for a model with more key/value heads.

    Args:
      params: of the model `config`, or adapters of it.
      repeated: as `layout.split_config` gives it.
    """
    times = repeated.num_kv_heads // config.num_kv_heads
    for leaves in _keys_and_values(params) if times > 1 else ():
        for name in {"weight", "bias", "b"} & leaves.keys():
            leaves[name] = _repeat(leaves[name], heads=config.num_kv_heads, times=times)


def _keys_and_values(params: Params) -> Iterator[Params]:
    for layer in params.get("layers", {}).values():
        attn = layer.get("attn", {})
        yield from (attn[name] for name in ("k_proj", "v_proj") if name in attn)


@partial(jax.jit, static_argnames=("heads", "times"))
def _repeat(x: jax.Array, *, heads: int, times: int) -> jax.Array:
    rows = jnp.repeat(x.reshape(heads, -1, *x.shape[1:]), times, axis=0)
    return constrain(rows, ("kv_heads",)).reshape(-1, *x.shape[1:])
