"""Adapters on loaded models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from llama_jax.adapters.adapter import Adapter
from llama_jax.adapters.attaching import attach
from llama_jax.adapters.files import load_adapter
from llama_jax.model.loaded import Model
from llama_jax.sharding import on

AdapterLike = Adapter | str | Path
"""An adapter, the name of one of a model's, or a folder."""


def open_adapter(model: Model, adapter: AdapterLike) -> Adapter:
    """The adapter as given, the model's own of that name, or the one in a folder; errors as for `load_adapter`."""
    if isinstance(adapter, Adapter):
        return adapter
    known = model.adapters.get(str(adapter))
    return load_adapter(adapter, model.source_config or model.config) if known is None else known


def open_adapters(model: Model, adapters: Mapping[str, AdapterLike]) -> dict[str, Adapter]:
    """Several of them, by name."""
    return {name: open_adapter(model, adapter) for name, adapter in adapters.items()}


def with_adapter(model: Model, adapter: AdapterLike) -> Model:
    """The model with an adapter that all its tokens use (`attach`); `model` is not changed, and its weights are shared.

    Raises:
      LlamaJaxError: as for `load_adapter` and `attach`.
    """
    opened = open_adapter(model, adapter)
    with on(model.mesh):
        params, config = attach(model.params, model.config, opened)
    return replace(model, params=params, config=config, adapters={})
