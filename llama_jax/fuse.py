"""A load-time layout of the parameters with fewer, larger matrix products; `forward` takes either layout."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig
from llama_jax.params import Params


def fuse_params(params: Params, config: LlamaConfig) -> Params:
    """q, k and v projections in one `qkv_proj`, gate and up in one `gate_up_proj`; everything else as it is.

    The rows of `qkv_proj` stand in one group per key/value head (its queries, its key, its value), so that a split by
    heads never cuts through a group.
    """
    layers = {name: fuse_layer(layer, config) for name, layer in params["layers"].items()}
    return {**params, "layers": layers}


def fuse_in_place(params: Params, config: LlamaConfig) -> None:
    """As `fuse_params`, but changes the tree, layer by layer, so that no more than one layer exists twice."""
    for name, layer in params["layers"].items():
        params["layers"][name] = fuse_layer(layer, config)


def fuse_layer(layer: Params, config: LlamaConfig) -> Params:
    """One layer of `fuse_params`."""
    names = ("q_proj", "k_proj", "v_proj")
    attn = {name: value for name, value in layer["attn"].items() if name not in names}
    attn["qkv_proj"] = {
        leaf: _fuse_qkv(*(layer["attn"][name][leaf] for name in names), config=config)
        for leaf in layer["attn"]["q_proj"]
    }
    fused = {**layer, "attn": attn}
    if "mlp" in layer:
        fused["mlp"] = _fuse_mlp(layer["mlp"])
    elif "shared" in layer["moe"]:
        fused["moe"] = {**layer["moe"], "shared": _fuse_mlp(layer["moe"]["shared"])}
    return fused


def _fuse_qkv(q: jax.Array, k: jax.Array, v: jax.Array, *, config: LlamaConfig) -> jax.Array:
    def grouped(x: jax.Array) -> jax.Array:
        return x.reshape(config.num_kv_heads, -1, *x.shape[1:])

    fused = jnp.concatenate([grouped(q), grouped(k), grouped(v)], axis=1)
    return fused.reshape(-1, *q.shape[1:])


def _fuse_mlp(mlp: Params) -> Params:
    fused = {leaf: jnp.concatenate([mlp["gate_proj"][leaf], mlp["up_proj"][leaf]]) for leaf in mlp["gate_proj"]}
    return {"gate_up_proj": fused, "down_proj": mlp["down_proj"]}
