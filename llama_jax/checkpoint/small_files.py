"""The small files of a checkpoint beside its tensors, and which tensors there must be."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llama_jax.checkpoint import format as fmt
from llama_jax.checkpoint import lock
from llama_jax.config import LlamaConfig, config_to_hf
from llama_jax.errors import CheckpointError
from llama_jax.params import param_specs


def check_names(names: Mapping[str, Any], config: LlamaConfig, path: Path) -> None:
    """Raises CheckpointError unless `names` are exactly the tensors that the config asks for."""
    wanted = {spec.name for spec in param_specs(config)}
    for what, wrong in (("lacks", wanted - names.keys()), ("holds unknown", names.keys() - wanted)):
        if wrong:
            some = sorted(wrong)[:5]
            more = f" and {len(wrong) - len(some)} more" if len(wrong) > len(some) else ""
            raise CheckpointError(
                f"{path} {what} tensor {', '.join(some)}{more}",
                hint="config and weights do not belong together, or the checkpoint is damaged",
            )


def main_dtype(tensors: Iterable[fmt.TensorInfo]) -> str:
    """The dtype that takes up most of the bytes."""
    weight: Counter[str] = Counter()
    for info in tensors:
        weight[info.dtype] += info.nbytes
    return weight.most_common(1)[0][0]


def small_files(
    config: LlamaConfig,
    dtype: str,
    generation_config: Mapping[str, Any] | None,
    files: Mapping[str, bytes | str] | None,
) -> dict[str, bytes]:
    """The files beside the tensors, name to contents, in order of their names.

    Args:
      dtype: of most of the weights, for config.json.
      files: as the source gives them. Their names come from models, so they must not lead out of the folder.
    """
    contents = {n: data.encode("utf-8") if isinstance(data, str) else data for n, data in (files or {}).items()}
    contents[fmt.CONFIG] = json_bytes(config_to_hf(config.replace(dtype=dtype)))
    if generation_config:
        contents[fmt.GENERATION_CONFIG] = json_bytes(generation_config)
    for name in contents:
        if name != Path(name).name or name in ("", ".", "..", fmt.MARKER, lock.LOCK_FILE, fmt.PARAMS):
            raise CheckpointError(f"{name!r} is no name for a model's file", hint="this is a fault of the program")
    return dict(sorted(contents.items()))


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """A JSON file for people to read, the same for equal values."""
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode("utf-8")


def tool_version() -> str:
    """Version of the installed package, or "unknown" when it runs from a source tree that is not installed."""
    try:
        return version("llama-jax")
    except PackageNotFoundError:
        return "unknown"
