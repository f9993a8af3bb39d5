"""Writing adapters as folders that peft reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.adapters.adapter import Adapter
from llama_jax.adapters.files import PREFIX
from llama_jax.adapters.lora_config import CONFIG, WEIGHTS
from llama_jax.adapters.targets import modules
from llama_jax.config import LlamaConfig
from llama_jax.convert.safetensors_writer import SafetensorsWriter, TensorPlan
from llama_jax.disk import storage_errors, write_file
from llama_jax.params import flatten

_MEMBERS = {
    "a": "lora_A.weight",
    "b": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
    "b_bias": "lora_B.bias",
}
_EMBEDDING = {"a": "lora_embedding_A", "b": "lora_embedding_B"}


def save_adapter(folder: str | Path, adapter: Adapter, config: LlamaConfig) -> Path:
    """Writes an adapter as peft's `save_pretrained` does; `load_adapter` and peft read it back bit for bit.

    Args:
      folder: made if it is missing; its files of an adapter are replaced.
      config: of the base model, as its files have it.

    Returns:
      The folder.

    Raises:
      StorageError, DoesNotFit: it cannot be written.
    """
    folder = Path(folder).expanduser()
    tensors = peft_tensors(adapter, config)
    about = json.loads(adapter.about.peft) | {"inference_mode": True}
    with storage_errors(folder, sum(x.nbytes for x in tensors.values())):
        folder.mkdir(parents=True, exist_ok=True)
        _write_tensors(folder / WEIGHTS, tensors)
        write_file(folder / CONFIG, json.dumps(about, indent=2, sort_keys=True).encode())
    return folder


def peft_tensors(adapter: Adapter, config: LlamaConfig) -> dict[str, np.ndarray]:
    """The tensors of an adapter under the names that peft gives them."""
    known = modules(config)
    names = {leaf: module for module, leaf in known.linear.items()}
    whole = {leaf: module for module, leaf in known.whole.items()}
    experts = {leaf: parameter for parameter, leaf in known.experts.items()}
    tensors: dict[str, Any] = {}
    leaves = adapter.leaves
    for leaf, members in leaves.items():
        if leaf in experts:
            # peft wraps the parameters of one module in one another: the later one is outside.
            module = experts[leaf].rpartition(".")[0]
            both = leaf.replace("gate_up_proj", "down_proj") in leaves
            inner = ".base_layer" if both and leaf.endswith("gate_up_proj") else ""
            a, b = np.asarray(members["a"]), np.asarray(members["b"])
            tensors[f"{module}{inner}.lora_A.weight"] = a.reshape(-1, a.shape[-1])
            tensors[f"{module}{inner}.lora_B.weight"] = b.transpose(1, 2, 0).reshape(b.shape[1], -1)
            continue
        for member, x in members.items():
            name = (_EMBEDDING if leaf == "embed" else _MEMBERS)[member]
            tensors[f"{names[leaf]}.{name}"] = np.asarray(x)
    for path, x in flatten(adapter.whole).items():
        leaf, _, member = path.rpartition(".")
        inner = ".base_layer" if member == "bias" and leaf in leaves else ""
        tensors[f"{whole[leaf]}{inner}.{member}"] = np.asarray(x)
    return {f"{PREFIX}{name}": tensors[name] for name in sorted(tensors)}


def _write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file under another name first, so that there is a whole one or none."""
    aside = path.with_suffix(".partial")
    aside.unlink(missing_ok=True)
    plan = {name: TensorPlan(x.dtype.name, x.shape) for name, x in tensors.items()}
    writer = SafetensorsWriter(aside, plan, {"format": "pt"})
    try:
        for name, x in tensors.items():
            writer.write(name, np.ascontiguousarray(x))
    finally:
        writer.close()
    aside.replace(path)
