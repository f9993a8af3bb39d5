"""The small files of a checkpoint, beside its tensors."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llama_jax.checkpoint import format as fmt
from llama_jax.checkpoint import lock
from llama_jax.checkpoint.wrong_file import refuse, wrong_small_file
from llama_jax.config import LlamaConfig, config_to_hf
from llama_jax.errors import CheckpointError

COPIED = re.compile(
    r"tokenizer\.(json|model)|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.json|"
    rf"merges\.txt|chat_template\.(jinja|json)|{fmt.TEMPLATES}/[^/]+\.jinja|"
    r"(LICENSE|LICENCE|NOTICE|USE_POLICY)(\.(md|txt))?"
)
"""Files that are copied unchanged from a model's folder into a checkpoint."""
MAX_COPIED_BYTES = 512 << 20
"""More than any tokenizer file has."""


def copied_files(folder: Path, inside: Callable[[Path, str], Path] = Path.joinpath) -> dict[str, bytes]:
    """The files of a folder whose names match COPIED, name to contents.

    Args:
      inside: gives the path of a file in the folder, or refuses it.

    Raises:
      CheckpointError: a file is far too large, or cannot be read.
    """
    found = {}
    for file in sorted([*folder.iterdir(), *(folder / fmt.TEMPLATES).glob("*.jinja")]):
        name = file.relative_to(folder).as_posix()
        if COPIED.fullmatch(name) and file.is_file():
            if file.stat().st_size > MAX_COPIED_BYTES:
                raise CheckpointError(f"{file} has {file.stat().st_size:,} bytes", hint="this is not a tokenizer file")
            try:
                data = inside(folder, name).read_bytes()
            except OSError as e:
                raise CheckpointError(f"{file} cannot be read: {e.strerror}", hint="check its permissions") from e
            refuse(file, wrong_small_file(name, data))
            found[name] = data
    return found


def main_dtype(tensors: Iterable[fmt.TensorInfo]) -> str:
    """The dtype that takes up most of the bytes of plain tensors."""
    weight: Counter[str] = Counter()
    for info in tensors:
        weight[info.dtype] += info.nbytes if info.scheme == "plain" else 0
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
        if not fmt.is_file_name(name) or name in (fmt.MARKER, lock.LOCK_FILE, fmt.PARAMS):
            raise CheckpointError(f"{name!r} is not a name for a model's file", hint="this is a fault of the program")
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
