"""A model's numbers as the kernels' cases take them; `llama_jax.kernels` knows no model."""

from __future__ import annotations

from typing import Any

from llama_jax.config import LlamaConfig, MoeSpec


def numbers_of(config: LlamaConfig) -> dict[str, Any]:
    """A model's numbers, as the cases of operations take them."""
    moe = next((layer.mlp for layer in config.layers if isinstance(layer.mlp, MoeSpec)), None)
    numbers: dict[str, Any] = {
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden": config.hidden_size,
    }
    if moe is not None:
        scaled = "output" if moe.router == "softmax" else "input"
        numbers |= {"experts": moe.num_experts, "top_k": moe.top_k, "intermediate": moe.intermediate_size}
        numbers |= {"scaled": scaled}
    return numbers
