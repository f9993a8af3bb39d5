"""The description of a model: `LlamaConfig`, conversion from and to Hugging Face's config.json, named presets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_jax.config.hf import config_from_hf
from llama_jax.config.spec import LayerSpec, LlamaConfig, MoeSpec, QueryScale, RopeSpec
from llama_jax.config.to_hf import config_to_hf

if TYPE_CHECKING:
    from llama_jax.config.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "LayerSpec",
    "LlamaConfig",
    "MoeSpec",
    "QueryScale",
    "RopeSpec",
    "config_from_hf",
    "config_to_hf",
    "preset",
]


def __getattr__(name: str) -> Any:
    # The table of presets is read by few programs, so it is loaded when first asked for.
    if name in ("PRESETS", "preset"):
        from llama_jax.config import presets

        return getattr(presets, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
