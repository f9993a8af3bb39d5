"""Adapters: low-rank changes of a model's weights, as peft trains and saves them.

    adapter = load_adapter("./my-lora", model.config)
    params, config = attach(model.params, model.config, adapter)
    logits, _ = forward(params, config, tokens)

`adapter` has the tree, `lora_config` and `targets` read peft's configuration, `files` its folders, `attaching` puts
adapters on parameters. Adapters in slots, several in a batch, are `model.adapters`.
"""

from __future__ import annotations

from llama_jax.adapters.adapter import About, Adapter
from llama_jax.adapters.attaching import attach, merge, unmerge
from llama_jax.adapters.files import load_adapter
from llama_jax.adapters.initial import new_adapter
from llama_jax.adapters.lora_config import LoraConfig
from llama_jax.adapters.models import with_adapter
from llama_jax.adapters.saving import save_adapter

__all__ = [
    "About",
    "Adapter",
    "LoraConfig",
    "attach",
    "load_adapter",
    "merge",
    "new_adapter",
    "save_adapter",
    "unmerge",
    "with_adapter",
]
