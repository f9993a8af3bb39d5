"""Quantises with a calibration text, layer by layer: each layer gets the outputs of the quantised layers before it.

Memory holds one layer at a time, and the hidden states of the text between two layers, which stay on the host. Pure
functions of one layer; `quantize_params` and `convert.calibrating` apply them to each layer in turn.

Several devices share the rows of the text, each with a copy of the layer, and then the rows of its weights: methods
process each row of a weight by itself, given the Gram matrix of the inputs, which is all-reduced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError
from llama_jax.layout import param_sharding
from llama_jax.model.scaled_inputs import INPUTS, Leaves, with_scaled_inputs
from llama_jax.model.transformer import forward
from llama_jax.model.weights import lookup
from llama_jax.params import Params, by_leaf, flatten, param_specs, unflatten
from llama_jax.quantized import Layout, layout_named
from llama_jax.quantized.awq import output_error
from llama_jax.quantized.codes import decode
from llama_jax.quantized.methods import Method
from llama_jax.quantized.nearest import encode
from llama_jax.schemes import scheme_of
from llama_jax.sharding import ONE_DEVICE, DeviceMesh, RowSplit, on

Hidden = Sequence[np.ndarray]
"""Hidden states of the calibration text between two layers: float32 [rows, length, hidden_size], in several parts."""
ROWS = 4
"""Rows of the text that a device computes together."""


def check_calibration(config: LlamaConfig, tokens: np.ndarray) -> None:
    """Refuses requests that the model cannot be calibrated with.

    Args:
      config: with the schemes that leaves are to have.
      tokens: int32 [rows, length].

    Raises:
      RequestError: the text has tokens that the model does not have, or weights are to be quantised whose inputs are
        not those of the whole text, as those of routed experts.
    """
    if tokens.ndim != 2 or not tokens.size or tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise RequestError(
            f"calibration tokens {list(tokens.shape)} with ids up to {tokens.max(initial=0)}",
            param="calibration",
            hint=f"int32 [rows, length] of ids below {config.vocab_size}",
        )
    unknown = [leaf for leaf, _ in config.schemes if leaf.startswith("layers.") and _within(leaf) not in INPUTS]
    if unknown:
        raise RequestError(
            f"{unknown[0]} cannot be calibrated: a routed expert sees few tokens of a text",
            param="method",
            hint="choose the method hqq or rtn, or leave the experts as they are by --ignore '*.moe.*'",
        )


def calibrated_params(
    params: Params, config: LlamaConfig, method: Method, tokens: np.ndarray, mesh: DeviceMesh | None = None
) -> Params:
    """Parameters quantised by a calibrated method; embedding and head are rounded to nearest.

    Args:
      params: plain and canonical; they stay as they are.
      config: with the schemes that leaves are to have.
      tokens: int32 [rows, length].
      mesh: that the parameters are split over, as `layout.param_sharding` places them; those returned are likewise.

    Raises:
      RequestError: see `check_calibration`; or projections are fused, or the mesh has devices of other processes.
    """
    check_calibration(config, tokens)
    devices = RowSplit.over(mesh)
    if any("qkv_proj" in layer["attn"] for layer in params["layers"].values()):
        raise RequestError("calibration needs projections apart", param="params", hint="load the model with fuse=False")
    out, schemes = dict(params), dict(config.schemes)
    for leaf in ("embed", "lm_head"):
        if (layout := layout_named(schemes.get(leaf, ""))) is not None:
            out[leaf] = encode(layout, params[leaf]["weight"])
    hidden, out["layers"] = embedded(out["embed"], tokens, devices), {}
    for i in range(config.num_layers):
        layer, _ = quantised_layer(params["layers"][str(i)], config, i, hidden, method, devices)
        hidden = advanced(layer, config, i, hidden, devices)
        out["layers"][str(i)] = layer if mesh is None else _placed(layer, config, i, mesh)
    return out


def embedded(leaf: Params, tokens: np.ndarray, devices: RowSplit = ONE_DEVICE) -> list[np.ndarray]:
    """The input of the first layer.

    Args:
      leaf: the embedding, plain or stored.
      tokens: int32 [rows, length].
      devices: those that will compute the layers.
    """
    step = ROWS * devices.ways
    parts = (tokens[at : at + step] for at in range(0, len(tokens), step))
    return [np.asarray(lookup(leaf, jnp.asarray(part), jnp.float32)) for part in parts]


def advanced(
    layer: Params, config: LlamaConfig, index: int, hidden: Hidden, devices: RowSplit = ONE_DEVICE
) -> list[np.ndarray]:
    """The output of a layer, plain or stored."""
    name = "layers.0.out"
    return [np.asarray(seen[name]) for seen in _runs(layer, config, index, hidden, (name,), devices)]


def quantised_layer(
    layer: Params, config: LlamaConfig, index: int, hidden: Hidden, method: Method, devices: RowSplit = ONE_DEVICE
) -> tuple[Params, dict[str, float]]:
    """One layer with its weights quantised.

    Args:
      layer: canonical, its weights plain.
      config: with the schemes that leaves are to have.
      index: number of the layer.
      hidden: what it is given.
      devices: those that share the text and the weights' rows.

    Returns:
      The layer, in which a method that scales inputs has changed norms and biases too, and the error of each leaf by
      its whole name: the root of the mean square of what its outputs differ by, as a share of that of the outputs.
    """
    layouts = _layouts(config, index)
    leaves = by_leaf(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), devices.copy(layer)))
    grams = _grams(_tree(leaves), config, index, hidden, sorted({INPUTS[leaf] for leaf in layouts}), devices)
    if method.scales_inputs:
        leaves, grams = with_scaled_inputs(leaves, layouts, grams, config, devices)
    errors = {}
    for (activation, layout), names in _alike(layouts).items():
        weights, gram = [leaves[leaf].pop("weight") for leaf in names], grams[activation]
        stored = method.encode(layout, devices.split(jnp.concatenate(weights)), gram)
        at = 0
        for leaf, weight in zip(names, weights, strict=True):
            own = {member: rows[at : at + len(weight)] for member, rows in stored.items()}
            wrong = float(output_error(decode(layout, own, jnp.float32) - weight, gram))
            size = float(output_error(weight, gram))
            errors[f"layers.{index}.{leaf}"] = (wrong / size) ** 0.5 if size else 0.0
            leaves[leaf] |= own
            at += len(weight)
    return _tree(leaves), errors


def _within(leaf: str) -> str:
    return leaf.split(".", 2)[-1]


def _layouts(config: LlamaConfig, index: int) -> dict[str, Layout]:
    """The layout of each leaf of a layer that is to be quantised, by its name within the layer."""
    found = ((leaf, layout_named(name)) for leaf, name in config.schemes if leaf.startswith(f"layers.{index}."))
    return {_within(leaf): layout for leaf, layout in found if layout is not None}


def _alike(layouts: Mapping[str, Layout]) -> dict[tuple[str, Layout], list[str]]:
    """Leaves with the same input activation and layout, which a method handles together."""
    found: dict[tuple[str, Layout], list[str]] = {}
    for leaf, layout in layouts.items():
        found.setdefault((INPUTS[leaf], layout), []).append(leaf)
    return found


def _tree(leaves: Leaves) -> Params:
    return unflatten({f"{leaf}.{member}": x for leaf, members in leaves.items() for member, x in members.items()})


def _placed(layer: Params, config: LlamaConfig, index: int, mesh: DeviceMesh) -> Params:
    """The layer with each array where the model's layout on the mesh has it."""
    where, prefix, arrays = param_sharding(config, mesh), f"layers.{index}.", flatten(layer)
    specs = {s.name.removeprefix(prefix): s for s in param_specs(config) if s.name.startswith(prefix)}
    return unflatten({name: jax.device_put(array, where(specs[name])) for name, array in arrays.items()})


def _grams(
    layer: Params, config: LlamaConfig, index: int, hidden: Hidden, names: Sequence[str], devices: RowSplit
) -> dict[str, jax.Array]:
    """The sum of x x^T over the tokens of each activation x: float32 [in, in], on each device."""
    whole = tuple(f"layers.0.{name}" for name in names)
    total: dict[str, jax.Array] = {}
    for seen in _runs(layer, config, index, hidden, whole, devices):
        for name, full in zip(names, whole, strict=True):
            total[name] = _added(total[name] if name in total else jnp.float32(0), seen[full])
    return devices.copy(total)


@jax.jit
def _added(total: jax.Array, x: jax.Array) -> jax.Array:
    flat = x.reshape(-1, x.shape[-1])
    return total + jnp.matmul(flat.T, flat, precision=jax.lax.Precision.HIGHEST)


def _runs(
    layer: Params, config: LlamaConfig, index: int, hidden: Hidden, names: tuple[str, ...], devices: RowSplit
) -> Iterator[dict[str, jax.Array]]:
    """Activations of one layer, part by part."""
    leaves = by_leaf(devices.copy(layer))
    plain = {"layers": {"0": _tree({name: _plain(members) for name, members in leaves.items()})}}
    alone = config.replace(layers=(config.layers[index],), schemes=(), tie_word_embeddings=True)
    for part in hidden:
        with on(devices.mesh):
            seen = _run(plain, alone, devices.split(part), len(part), names)
        yield seen


def _plain(members: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """A leaf with its weight decoded, in float32."""
    scheme = scheme_of(members)
    weight = scheme.decode({name: members[name] for name in scheme.members}, jnp.float32)
    found = {"weight": weight} | {name: members[name] for name in members if name == "bias"}
    return {name: jnp.asarray(x, jnp.float32) for name, x in found.items()}


@partial(jax.jit, static_argnums=(1, 3, 4))
def _run(params: Params, config: LlamaConfig, x: jax.Array, rows: int, names: tuple[str, ...]) -> dict[str, jax.Array]:
    """Activations [rows, length, width] of the first `rows` rows of x, in a model of one layer between an arbitrary
    embedding and head: its logits are not used."""
    width = x.shape[-1]
    ends = {"embed": {"weight": jnp.zeros((1, width))}, "final_norm": {"weight": jnp.ones(width)}}
    _, _, seen = forward(params | ends, config, None, inputs_embeds=x, capture=names)
    return {name: part.reshape(*part.shape[:2], -1)[:rows] for name, part in seen.items()}
