"""A model's dimensions for the kernels' cases; `llama_jax.kernels` does not know models."""

from __future__ import annotations

from typing import Any

from llama_jax.config import LlamaConfig, MoeSpec
from llama_jax.params import JOINT, canonical_specs
from llama_jax.quantized import stored_layout

_JOINT = {part: joint for joint, parts in JOINT.items() for part in parts}


def numbers_of(config: LlamaConfig) -> dict[str, Any]:
    """A model's dimensions, as the cases of operations take them."""
    moe = next((layer.mlp for layer in config.layers if isinstance(layer.mlp, MoeSpec)), None)
    numbers: dict[str, Any] = {
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden": config.hidden_size,
        "products": _products(config),
        "layouts": tuple(sorted({name for _, name in config.schemes if stored_layout(name)})),
    }
    if moe is not None:
        scaled = "output" if moe.router == "softmax" else "input"
        numbers |= {"experts": moe.num_experts, "top_k": moe.top_k, "intermediate": moe.intermediate_size}
        numbers |= {"scaled": scaled}
    return numbers


def _products(config: LlamaConfig) -> tuple[tuple[int, int], ...]:
    """[out, in] of the first layer's projections, fused ones as one."""
    sizes: dict[str, tuple[int, int]] = {}
    for spec in canonical_specs(config):
        projection = spec.path[:2] == ("layers", "0") and spec.path[-1] == "weight" and len(spec.shape) == 2
        if projection and spec.path[-2] != "router":
            name = _JOINT.get(spec.path[-2], spec.path[-2])
            sizes[name] = (sizes.get(name, (0, 0))[0] + spec.shape[0], spec.shape[1])
    return tuple(dict.fromkeys(sizes.values()))
