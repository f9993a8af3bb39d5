"""Adapters on parameters: attached, so that every program that takes the parameters applies them, or merged."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.adapters.adapter import Adapter
from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError
from llama_jax.model.adapters import ATTACHED, adapter_axes, check_finite
from llama_jax.model.fuse import fuse_layer, split_joint, split_layer
from llama_jax.model.weights import compute_dtype
from llama_jax.params import JOINT, PROJECTION_AXES, Params, by_leaf, flatten, unflatten
from llama_jax.schemes import PLAIN, scheme_of
from llama_jax.sharding import Axes, constrain

_EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def attach(params: Params, config: LlamaConfig, adapter: Adapter) -> tuple[Params, LlamaConfig]:
    """Parameters of the model with an adapter that all tokens use; pure, and differentiable in all arrays of both.

    Low-rank weights stay apart, so that quantised weights keep their codes and nothing is rounded. Those of routed
    experts are added to a copy of these, since a product with experts takes one stack of matrices.

    Args:
      params: canonical or fused, on a mesh or not, without an adapter.
      config: of the model; on a mesh as `load` gives it.

    Returns:
      The tree, and its config: that of a model with tied embeddings of which the adapter brings one is not tied.

    Raises:
      RequestError: the parameters have an adapter already, routed experts are quantised, or a number of the adapter is
        NaN or infinite.
    """
    if ATTACHED in params:
        raise RequestError(
            "the parameters have an adapter already", param="adapter", hint="load the model without it, or merge it"
        )
    tree = _finite_low_rank_of(params, config, adapter)
    params, config = _with_whole(params, config, adapter)
    params = _with_experts(params, adapter)
    return {**params, ATTACHED: tree}, config


def merge(params: Params, config: LlamaConfig, adapter: Adapter) -> tuple[Params, LlamaConfig]:
    """Parameters with an adapter added to their weights, which the model then computes with as fast as before.

    Args and returns as for `attach`.

    Raises:
      RequestError: a weight that the adapter changes is quantised, a bias would be added that the model has no place
        for, or a number of the adapter is NaN or infinite.
    """
    tree = _finite_low_rank_of(params, config, adapter)
    params, config = _with_whole(params, config, adapter)
    return _merged(_with_experts(params, adapter), config, tree, 1.0), config


def unmerge(params: Params, config: LlamaConfig, adapter: Adapter) -> Params:
    """The parameters that `merge` was given, within rounding.

    Raises:
      RequestError: the adapter has whole weights or magnitudes, in which the base's are lost.
    """
    lost = [
        *flatten(adapter.whole),
        *(leaf for leaf, members in adapter.leaves.items() if members.keys() != {"a", "b"}),
    ]
    if lost:
        raise RequestError(
            f"what the base had in place of {lost[0]} is not in the merged weights",
            param="adapter",
            hint="keep the base's parameters, which merge does not change, or load them again",
        )
    tree = low_rank_of(params, config, adapter)
    return _merged(_with_experts(params, adapter, sign=-1.0), config, tree, -1.0)


def _finite_low_rank_of(params: Params, config: LlamaConfig, adapter: Adapter) -> Params:
    """`low_rank_of`, after a check of these terms and of what is not among them."""
    tree = low_rank_of(params, config, adapter)
    experts = {path: x for path, x in flatten(adapter.low_rank).items() if ".moe.experts." in path}
    check_finite(flatten(tree) | experts | flatten(adapter.whole))
    return tree


def low_rank_of(params: Params, config: LlamaConfig, adapter: Adapter) -> Params:
    """The terms that an adapter adds to every projection: {"a", "b", "scale"}, with "gain" and "shift"
    where there are any (`model.adapters`), shaped like the canonical parameters. Without routed experts."""
    flat: dict[str, Any] = {}
    scales, dtype = dict(adapter.about.scales), compute_dtype(params)
    for leaf, members in adapter.leaves.items():
        if ".moe.experts." in leaf:
            continue
        if leaf == "embed":
            made = {m: jnp.asarray(members[m], dtype) for m in ("a", "b")} | {"scale": jnp.float32(scales[leaf])}
        else:
            base = tuple(base_members(params, leaf).values()) if "magnitude" in members else ()
            repeated = {m: _rows(leaf, x, config) if m != "a" else x for m, x in members.items()}
            made = _made(repeated, base, np.float32(scales[leaf]), dtype=dtype, name=leaf.rpartition(".")[2])
        flat |= {f"{leaf}.{member}": x for member, x in made.items()}
    for path, new in flatten(adapter.whole).items():
        leaf, _, member = path.rpartition(".")
        if member == "bias":
            old = base_members(params, leaf)["bias"]
            extra = _rows(leaf, jnp.asarray(new), config).astype(jnp.float32) - old.astype(jnp.float32)
            flat[f"{leaf}.shift"] = flat.get(f"{leaf}.shift", 0.0) + extra
            if f"{leaf}.a" not in flat:
                weight = base_members(params, leaf)["weight"]
                flat[f"{leaf}.a"] = jnp.zeros((1, weight.shape[-1]), dtype)
                flat[f"{leaf}.b"], flat[f"{leaf}.scale"] = jnp.zeros((len(extra), 1), dtype), jnp.float32(0)
    return unflatten(flat)


@partial(jax.jit, static_argnames=("dtype", "name"))
def _made(
    members: Mapping[str, jax.Array], base: tuple[jax.Array, ...], scale: jax.Array, *, dtype: Any, name: str
) -> dict[str, jax.Array]:
    """The members of a projection as `forward` takes them.

    Args:
      base: its weight [out, in], and its bias if it has one, for magnitudes; else nothing.
    """
    a, b = (jnp.asarray(members[m]) for m in ("a", "b"))
    made = {"a": a.astype(dtype), "b": b.astype(dtype), "scale": scale}
    gain: jax.Array | float = 1.0
    if "magnitude" in members:
        weight, *bias = (x.astype(jnp.float32) for x in base)
        moved = weight + scale * jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST).astype(jnp.float32)
        # The norm is a constant to the gradient (arXiv:2402.09353, 4.3).
        norm = jax.lax.stop_gradient(jnp.linalg.norm(moved, axis=1))
        made["gain"] = gain = jnp.asarray(members["magnitude"], jnp.float32) / norm
        if bias:  # the gain is the weight's alone
            made["shift"] = (1.0 - gain) * bias[0]
    if "b_bias" in members:
        made["shift"] = made.get("shift", 0.0) + gain * scale * jnp.asarray(members["b_bias"], jnp.float32)
    axes = adapter_axes(name, made, slots=False)
    return {member: constrain(x, axes[member]) for member, x in made.items()}


def _rows(leaf: str, x: Any, config: LlamaConfig) -> Any:
    """Rows of keys and values repeated, where the model of a mesh has more of these heads than the adapter's base."""
    if not leaf.endswith((".k_proj", ".v_proj")) or x.shape[0] == config.kv_dim:
        return x
    heads = jnp.asarray(x).reshape(-1, config.head_dim, *x.shape[1:])
    return jnp.repeat(heads, config.num_kv_heads // len(heads), axis=0).reshape(config.kv_dim, *x.shape[1:])


def base_members(params: Params, leaf: str) -> dict[str, jax.Array]:
    """A leaf's weight, decoded, under "weight", and its bias; whether the leaf is a part of a joint one or not."""
    if leaf == "lm_head" and leaf not in params:
        leaf = "embed"
    node: Any = params
    *parents, name = leaf.split(".")
    for key in parents:
        node = node[key]
    joint = next((whole for whole, parts in JOINT.items() if name in parts and whole in node), None)
    members = node[joint or name]
    scheme = scheme_of(members)
    found = {"weight": scheme.decode({m: members[m] for m in members if m != "bias"}, jnp.float32)}
    found |= {"bias": members["bias"]} if "bias" in members else {}
    if joint is None:
        return found
    return {member: split_joint(joint, x)[JOINT[joint].index(name)] for member, x in found.items()}


def _with_whole(params: Params, config: LlamaConfig, adapter: Adapter) -> tuple[Params, LlamaConfig]:
    """The parameters with the adapter's whole weights in place of theirs; biases are left to `low_rank_of`."""
    whole = {leaf: m["weight"] for leaf, m in by_leaf(adapter.whole).items() if "weight" in m}
    dtype = compute_dtype(params)
    if config.tie_word_embeddings and whole.keys() & {"embed", "lm_head"}:
        params, config = {**params, "lm_head": params["embed"]}, config.replace(tie_word_embeddings=False)
    for leaf, weight in whole.items():
        *block, name = leaf.split(".")
        new = _placed(_rows(leaf, weight, config), _axes(leaf), dtype)
        if not block:
            params = {**params, name: {"weight": new}}
            continue
        _, layer, *inner = block
        apart = split_layer(params["layers"][layer])
        node = apart
        for key in inner:
            node[key] = dict(node[key])
            node = node[key]
        bias = {"bias": node[name]["bias"]} if "bias" in node[name] else {}
        node[name] = {"weight": new, **bias}
        fused = _is_fused(params["layers"][layer])
        params = _with_layer(params, layer, fuse_layer(apart, config) if fused else apart)
    return params, config


def _is_fused(layer: Params) -> bool:
    blocks = (layer["attn"], layer.get("mlp", {}), layer.get("moe", {}).get("shared", {}))
    return any(name in block for block in blocks for name in JOINT)


def _with_layer(params: Params, index: str, layer: Params) -> Params:
    return {**params, "layers": {**params["layers"], index: layer}}


def _axes(leaf: str) -> Axes:
    *block, name = leaf.split(".")
    if name in ("embed", "lm_head"):
        return ("vocab", "embed")
    if block and block[-1] == "moe":
        return ("expert", "embed")
    return PROJECTION_AXES.get(name, ("head_dim",) if name in ("q_norm", "k_norm") else ("embed",))


@partial(jax.jit, static_argnums=(1, 2))
def _placed(x: jax.Array, axes: Axes, dtype: Any) -> jax.Array:
    return constrain(x.astype(dtype), axes)


def _with_experts(params: Params, adapter: Adapter, sign: float = 1.0) -> Params:
    """The parameters with the adapter's low-rank weights of routed experts added to these."""
    scales = dict(adapter.about.scales)
    for leaf, members in adapter.leaves.items():
        if ".moe.experts." not in leaf:
            continue
        _, layer, _, _, name = leaf.split(".")
        moe = params["layers"][layer]["moe"]
        stack, parts = dict(moe["experts"]), _EXPERT_PARTS[name]
        for part, b in zip(parts, jnp.split(jnp.asarray(members["b"]), len(parts), axis=1), strict=True):
            _refuse_quantised(stack[part], leaf)
            axes = ("expert", *PROJECTION_AXES[part])
            moved = _moved(stack[part]["weight"], jnp.asarray(members["a"]), b, sign * scales[leaf], 1.0, axes)
            stack[part] = {"weight": moved}
        params = _with_layer(params, layer, {**params["layers"][layer], "moe": {**moe, "experts": stack}})
    return params


def _merged(params: Params, config: LlamaConfig, tree: Params, sign: float) -> Params:
    leaves = by_leaf(tree)
    if "embed" in leaves:
        ours = leaves.pop("embed")
        _refuse_quantised(params["embed"], "embed")
        if config.tie_word_embeddings:
            raise RequestError(
                "the adapter changes the embeddings but not the output, which the model ties to them",
                param="adapter",
                hint="attach it, or untie the model first",
            )
        moved = _moved(
            params["embed"]["weight"], ours["b"].T, ours["a"].T, sign * ours["scale"], 1.0, ("vocab", "embed")
        )
        params = {**params, "embed": {"weight": moved}}
    if "lm_head" in leaves:
        ours = leaves.pop("lm_head")
        if config.tie_word_embeddings:
            raise RequestError(
                "the adapter changes the output but not the embeddings, which the model ties to it",
                param="adapter",
                hint="attach it, or untie the model first",
            )
        params = {**params, "lm_head": _merged_leaf(params["lm_head"], ours, "lm_head", sign)}
    for layer in dict.fromkeys(leaf.split(".")[1] for leaf in leaves):
        whole = params["layers"][layer]
        apart = split_layer(whole)
        for leaf, ours in leaves.items():
            _, index, *inner, name = leaf.split(".")
            if index != layer:
                continue
            node = apart
            for key in inner:
                node[key] = dict(node[key])
                node = node[key]
            node[name] = _merged_leaf(node[name], ours, leaf, sign)
        params = _with_layer(params, layer, fuse_layer(apart, config) if _is_fused(whole) else apart)
    return params


def _merged_leaf(members: Params, ours: dict[str, Any], leaf: str, sign: float) -> Params:
    _refuse_quantised(members, leaf)
    gain = ours.get("gain", 1.0)
    scale = sign * ours["scale"]
    new = {"weight": _moved(members["weight"], ours["a"], ours["b"], scale, gain, _axes(leaf))}
    shift = ours.get("shift")
    if shift is not None and "bias" not in members:
        raise RequestError(
            f"the adapter adds a bias to {leaf}, which has none",
            param="adapter",
            hint="attach the adapter; a merged model has no place for it",
        )
    if "bias" in members:
        bias = members["bias"].astype(jnp.float32) * gain + (0.0 if shift is None else sign * shift)
        new["bias"] = bias.astype(members["bias"].dtype)
    return new


@partial(jax.jit, static_argnums=5)
def _moved(weight: jax.Array, a: jax.Array, b: jax.Array, scale: Any, gain: Any, axes: Axes) -> jax.Array:
    """gain * (weight + scale * b a), computed in float32, in the weight's dtype: [out, in] or [experts, out, in]."""
    product = jnp.matmul(b.astype(jnp.float32), a.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    gain = jnp.asarray(gain, jnp.float32)
    moved = (weight.astype(jnp.float32) + scale * product) * (gain[:, None] if gain.ndim else gain)
    return constrain(moved.astype(weight.dtype), axes)


def _refuse_quantised(members: Params, leaf: str) -> None:
    if scheme_of(members) is not PLAIN:
        raise RequestError(
            f"{leaf} is quantised, and what the adapter adds cannot be added to its codes",
            param="adapter",
            hint="load the model with weights='float' (--weights float), which decodes it first",
        )
