"""The configuration of a model by its name, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from llama_jax.checkpoint.format import CORRECT, is_checkpoint, open_checkpoint, read_json
from llama_jax.config import PRESETS, LlamaConfig, config_from_hf, preset
from llama_jax.errors import ModelNotFound, did_you_mean
from llama_jax.library import locate


def find_preset(name: str) -> LlamaConfig | None:
    """The preset of that name; None for another name, and where a file or folder is called so."""
    return preset(name) if name.lower() in PRESETS and not Path(name).exists() else None


def find_config(name: str) -> LlamaConfig:
    """The configuration of a preset, or of a model on this machine. Downloads and converts nothing.

    Args:
      name: a preset such as "llama-3.1-70b", a folder (one with nothing but a config.json will do), a GGUF file, or any
        other name that `locate` knows.

    Raises:
      ModelNotFound: there is no such model on this machine, and no such preset.
      CheckpointError, UnsupportedModel: it is damaged, or requires something unsupported.
    """
    if (found := find_preset(name)) is not None:
        return found
    try:
        path = locate(name)
    except ModelNotFound as error:
        hint = did_you_mean(name, PRESETS) or f"presets: {', '.join(PRESETS)}"
        raise ModelNotFound(error.message, hint=f"{error.hint}; {hint}") from error
    if is_checkpoint(path):
        return open_checkpoint(path).config
    if (path / "config.json").is_file():
        hf = read_json(path / "config.json", hint=CORRECT)
        if not (quantised(hf) and any(path.glob("*.safetensors"))):
            return config_from_hf(hf)
    from llama_jax.convert.opening import open_source

    with closing(open_source(path, dequantize=False)) as source:
        return source.config


def quantised(hf: Mapping[str, Any]) -> bool:
    """Returns whether a config.json says how its weights are quantised."""
    text = hf.get("text_config")
    places = (hf, text if isinstance(text, Mapping) else {})
    return any(place.get(key) for place in places for key in ("quantization_config", "compression_config"))
