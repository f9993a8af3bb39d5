"""Folders and files that hold an adapter (LoRA and similar), which is not a model without its base.

Formats: https://huggingface.co/docs/peft/developer_guides/checkpoint and mlx-lm's LORA.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import UnsupportedModel

_CONFIG = "adapter_config.json"
_MLX = "adapters.safetensors"
_FILE = re.compile(r"adapter_config\.json|adapter_model\.(?:safetensors|bin)|(?:\d+_)?adapters\.safetensors")
_TENSOR = re.compile(r"(?:.*\.)?(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|ia3_l)\b.*")
"""Names that tensors of adapters have, or those of a model that is still wrapped in one."""
# The weights of these change what a model reads, not what it multiplies with.
_NOT_MERGED = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
_MAX_BYTES = 1 << 20


def merge_hint(folder: Path | str) -> str:
    """The hint for an adapter of PEFT: a folder, or a name on the hub."""
    return (
        "merge it into its base with peft, and convert the result: "
        f"`AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained(OUT)`"
    )


def is_adapter(names: Iterable[str]) -> bool:
    """Returns whether files of these names, which hold no model, are an adapter."""
    return any(_FILE.fullmatch(name) for name in names)


def adapter_error(folder: Path) -> UnsupportedModel:
    """The error for a folder that holds an adapter and no model; names the base, where the adapter does."""
    about = _about(folder / _CONFIG)
    mlx = (folder / _MLX).is_file()
    kind = about.get("peft_type") or about.get("fine_tune_type") or "LoRA"
    kind = "LoRA" if str(kind).upper() == "LORA" else f"{kind!s:.40}"
    base = about.get("base_model_name_or_path") or about.get("model")
    of = f"of {base:.200}" if isinstance(base, str) else "whose base model it does not name"
    hint = merge_hint(folder)
    if kind == "LoRA":
        hint = (
            f"give it with its base (-m BASE --adapter {str(folder)!r}), or merge it "
            f"(llama-jax merge-lora BASE {str(folder)!r} DST; peft: merge_and_unload())"
        )
    if kind.upper() in _NOT_MERGED:
        hint = "an adapter of this kind cannot be merged into weights; use it with peft"
    elif mlx:
        hint = f"merge it into its base with `mlx_lm.fuse --model BASE --adapter-path {folder}`, and convert the result"
    return UnsupportedModel(f"{folder} holds a {kind} adapter {of}, not a model", hint=hint)


def refuse_adapted(folder: Path, unknown: Iterable[str]) -> None:
    """Raises UnsupportedModel if tensors that a model has no place for are those of an adapter; names one."""
    if found := sorted(name for name in unknown if _TENSOR.fullmatch(name)):
        raise UnsupportedModel(
            f"{folder} holds an adapter among the model's weights ({found[0]})", hint=merge_hint(folder)
        )


def _about(path: Path) -> Mapping[str, Any]:
    """Contents of adapter_config.json; nothing where they cannot be read: the folder is an adapter all the same."""
    try:
        value = json.loads(path.read_bytes()[:_MAX_BYTES])
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
