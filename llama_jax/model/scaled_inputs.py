"""Scaled inputs: the same layer with inputs of projections divided by scales that multiply their weights (AWQ)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig
from llama_jax.quantized import Layout
from llama_jax.quantized.awq import input_scales
from llama_jax.sharding import RowSplit

INPUTS: Mapping[str, str] = MappingProxyType(
    {
        "attn.q_proj": "attn_in",
        "attn.k_proj": "attn_in",
        "attn.v_proj": "attn_in",
        "attn.o_proj": "attn_heads",
        "mlp.gate_proj": "mlp_in",
        "mlp.up_proj": "mlp_in",
        "mlp.down_proj": "mlp_hidden",
    }
)
"""The projections that can be calibrated, each with its input activation (`forward(capture=)`)."""
_BEFORE = MappingProxyType({"attn_in": "attn_norm", "mlp_in": "mlp_norm"})
"""The norm that makes an activation."""
_ROWS_BEFORE = MappingProxyType({"attn_heads": "attn.v_proj", "mlp_hidden": "mlp.up_proj"})
"""The projection whose outputs' scales are an activation's, since only sums and products with others follow."""

Leaves = dict[str, dict[str, jax.Array]]
"""The leaves of one layer by their dotted names within it, e.g. "attn.q_proj"."""


def with_scaled_inputs(
    leaves: Leaves,
    layouts: Mapping[str, Layout],
    grams: Mapping[str, jax.Array],
    config: LlamaConfig,
    devices: RowSplit,
) -> tuple[Leaves, dict[str, jax.Array]]:
    """The equivalent layer with inputs of projections divided by scales that multiply their weights instead.

    Projections' rows first, since norms are followed by what these become.
    """
    leaves, grams = {name: dict(members) for name, members in leaves.items()}, dict(grams)
    for activation in (*_ROWS_BEFORE, *_BEFORE):
        users = [leaf for leaf, given in INPUTS.items() if given == activation]
        quantised = [leaf for leaf in users if leaf in layouts]
        if not quantised:
            continue
        gram = grams[activation]
        sizes = jnp.sqrt(jnp.diagonal(gram))
        # Query heads of one key/value head take the same values, which have one scale each.
        group = config.num_heads // config.num_kv_heads if activation == "attn_heads" else 1
        sizes = _repeated(_mean(sizes, group, config.head_dim), group, config.head_dim)
        weights = tuple(devices.split(leaves[leaf]["weight"]) for leaf in quantised)
        scales = devices.copy(input_scales(tuple(layouts[leaf] for leaf in quantised), weights, gram, sizes))
        if activation in _BEFORE:
            norm = leaves[_BEFORE[activation]]
            norm["weight"], scales = _divided(norm["weight"], scales)
        else:
            before = leaves[_ROWS_BEFORE[activation]]
            own = _mean(scales, group, config.head_dim)
            before["weight"] = before["weight"] / own[:, None]
            if "bias" in before:
                before["bias"] = before["bias"] / own
        for leaf in users:
            leaves[leaf]["weight"] = leaves[leaf]["weight"] * scales
        grams[activation] = gram / (scales[:, None] * scales)
    return leaves, grams


def _divided(weight: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A norm's weight divided by scales, as bfloat16 holds it, and the scales by which it then is divided exactly."""
    divided = (weight / scales).astype(jnp.bfloat16).astype(jnp.float32)
    kept = divided == 0
    return jnp.where(kept, weight, divided), jnp.where(kept, 1, weight / jnp.where(kept, 1, divided))


def _mean(of_heads: jax.Array, group: int, head_dim: int) -> jax.Array:
    """Root mean squares over the query heads of each key/value head: [num_heads * head_dim] -> [kv * head_dim]."""
    if group == 1:
        return of_heads
    return jnp.sqrt(jnp.mean(jnp.square(of_heads.reshape(-1, group, head_dim)), axis=1)).reshape(-1)


def _repeated(of_kv_heads: jax.Array, group: int, head_dim: int) -> jax.Array:
    """The inverse of `_mean`, where the heads of a group are alike."""
    if group == 1:
        return of_kv_heads
    return jnp.repeat(of_kv_heads.reshape(-1, 1, head_dim), group, axis=1).reshape(-1)
