"""New adapters, ready to be trained."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.adapters.adapter import About, Adapter, low_rank_shapes
from llama_jax.adapters.attaching import base_members
from llama_jax.adapters.lora_config import LoraConfig
from llama_jax.adapters.targets import check_named, is_saved, modules, targeted
from llama_jax.config import LlamaConfig
from llama_jax.errors import UnsupportedModel
from llama_jax.params import Params, unflatten


def new_adapter(
    params: Params, config: LlamaConfig, lora: LoraConfig, key: jax.Array, *, dtype: Any = jnp.float32
) -> Adapter:
    """A new adapter that leaves the model as it is, initialised as peft does.

    `a` is uniform within sqrt(1 / in) of zero and `b` zero; of embeddings `a` is zero and `b` normal. DoRA's magnitudes
    are the norms of the base's rows; whole weights and biases are copies of the base's.

    Args:
      params: of the base, canonical or fused.
      dtype: of its arrays.

    Raises:
      UnsupportedModel: `lora` names a module that the model does not have, or that cannot be trained so.
    """
    check_named(config, lora)
    flat: dict[str, Any] = {}
    shapes, scales = low_rank_shapes(config), []
    for leaf, module in targeted(config, lora).items():
        *stack, out, into = shapes[leaf]
        if (lora.dora or lora.lora_bias) and (stack or leaf == "embed"):
            raise UnsupportedModel(
                f"{module} can have neither DoRA nor lora_bias", hint="leave it out of the adapter's targets"
            )
        rank, (key, own) = lora.rank_of(module), jax.random.split(key)
        a, b = (*stack, rank, into), (*stack, out, rank)
        if leaf == "embed":
            flat[f"{leaf}.a"], flat[f"{leaf}.b"] = jnp.zeros(a, dtype), jax.random.normal(own, b, dtype)
        else:
            flat[f"{leaf}.a"] = jax.random.uniform(own, a, dtype, -(into**-0.5), into**-0.5)
            flat[f"{leaf}.b"] = jnp.zeros(b, dtype)
        if lora.dora:
            flat[f"{leaf}.magnitude"] = jnp.linalg.norm(base_members(params, leaf)["weight"], axis=1).astype(dtype)
        if lora.lora_bias:
            flat[f"{leaf}.b_bias"] = jnp.zeros(out, dtype)
        scales.append((leaf, lora.scale_of(module)))
    about = About(tuple(scales), lora.json())
    return Adapter(unflatten(flat), unflatten(_whole(params, config, lora, dict(scales), dtype)), about)


def _whole(params: Params, config: LlamaConfig, lora: LoraConfig, low_rank: dict[str, float], dtype: Any) -> Params:
    """Copies of the base's weights and biases that are trained whole, by dotted name."""
    found: Params = {}
    for module, leaf in modules(config).whole.items():
        saved = is_saved(module, lora.modules_to_save)
        biased = saved or lora.bias == "all" or (lora.bias == "lora_only" and leaf in low_rank)
        if biased:
            members = base_members(params, leaf)
            found |= {f"{leaf}.weight": members["weight"].astype(dtype)} if saved else {}
            found |= {f"{leaf}.bias": members["bias"].astype(dtype)} if "bias" in members else {}
    return found
