"""A checkpoint as a Hugging Face folder: safetensors, config.json, tokenizer files."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.format import CONFIG, GENERATION_CONFIG, Progress
from llama_jax.checkpoint.small_files import COPIED, json_bytes
from llama_jax.config import config_to_hf
from llama_jax.config.families import find_family, renamed
from llama_jax.convert.casting import cast, row_blocks, storage_dtype
from llama_jax.convert.export.source import Exported, PlainSource, checked_files
from llama_jax.convert.export.staging import staged, start_folder, write_file
from llama_jax.convert.folders import INDEX, SINGLE
from llama_jax.convert.hf_names import Recipe, recipe
from llama_jax.convert.safetensors_file import SafetensorsFile
from llama_jax.convert.safetensors_writer import SafetensorsWriter, TensorPlan
from llama_jax.errors import CheckpointError, RequestError, UnsupportedModel
from llama_jax.params import ParamSpec

SHARD_BYTES = 5_000_000_000
"""Size that a safetensors file does not exceed unless one tensor does."""
_MADE_BY = "exported_by"
METADATA = {"format": "pt", _MADE_BY: "llama_jax"}
FILES = re.compile(rf"{re.escape(CONFIG)}|{re.escape(GENERATION_CONFIG)}|{COPIED.pattern}")


def export_hf(
    checkpoint: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Writes a checkpoint as a folder that Hugging Face transformers loads.

    Tensors have the names and layouts that `save_pretrained` of transformers 5 gives them, and without `dtype` the very
    bytes of the checkpoint, which are those of the model it was converted from. They pass one by one, so that memory is
    needed for the largest tensor only. `dst` appears only once it is complete.

    Args:
      checkpoint: its folder.
      dst: the folder to make.
      dtype: stores all tensors as float32, bfloat16 or float16; their own dtype when None.
      shard_bytes: begins another safetensors file where one would exceed this size.
      overwrite: whether an earlier export at `dst` may be replaced; it stays until the new one is complete.
      progress: called after each tensor, with bytes of its values.

    Raises:
      ModelNotFound, CheckpointError: no checkpoint, or it is damaged; names file and tensor.
      RequestError: an unknown dtype, or a shard size below 1.
      StorageError, DoesNotFit: `dst` exists or cannot be written, or the disk is too small.
    """
    if shard_bytes < 1:
        raise RequestError(f"a shard of {shard_bytes} bytes holds nothing", param="shard_bytes", hint="at least 1")
    wanted = None if dtype is None else storage_dtype(dtype)
    source, dst = PlainSource(checkpoint, None if wanted is None else wanted.name), Path(dst).absolute()
    steps = _steps(source, None if wanted is None else wanted.name)
    files = checked_files(source.checkpoint, FILES)
    stored = source.checkpoint.dtype
    if wanted is not None and wanted.name != stored:
        stored = wanted.name
        files[CONFIG] = json_bytes(config_to_hf(source.config.replace(dtype=stored)))
    shards = _shards(steps, shard_bytes)
    total = sum(plan.nbytes for shard in shards.values() for plan in shard.values())
    if len(shards) > 1:
        files[INDEX] = json_bytes(
            {
                "metadata": {"total_parameters": sum(s.size for s in source.specs), "total_size": total},
                "weight_map": {name: file for file, shard in shards.items() for name in sorted(shard)},
            }
        )
    with staged(dst, needed=total, overwrite=overwrite, replaceable=is_export) as partial:
        start_folder(partial)
        _write_tensors(source, steps, shards, partial, wanted, progress)
        for name, data in files.items():
            write_file(partial / name, data)
    return Exported(dst, tuple(sorted([*shards, *files])), sum(map(len, shards.values())), total, stored)


@dataclass
class _Step:
    """Leaves that are read together, and the tensors made from them."""

    made: Recipe
    specs: list[ParamSpec] = field(default_factory=list)
    tensors: dict[str, TensorPlan] = field(default_factory=dict)

    def pieces(self, leaves: Sequence[np.ndarray]) -> Iterator[tuple[str, int, np.ndarray]]:
        """Name, expert and array of every piece; the inverse of reading by the same recipe."""
        if len(self.made.sources) > 1:
            for expert, name in enumerate(self.made.sources):
                yield name, 0, leaves[0][expert]
        elif self.made.part is None and not self.made.transposed:
            yield self.made.sources[0], 0, leaves[0]
        else:
            # Expert by expert, so that no second copy of the whole is ever in memory.
            for expert in range(len(leaves[0])):
                piece = np.concatenate([leaf[expert] for leaf in leaves])
                yield self.made.sources[0], expert, np.ascontiguousarray(piece.T if self.made.transposed else piece)


def _steps(source: PlainSource, dtype: str | None) -> list[_Step]:
    steps: dict[tuple[str, ...], _Step] = {}
    names = find_family(source.config.family).tensor_names
    for spec in source.specs:
        made = recipe(spec, frozenset())
        made = replace(made, sources=tuple(renamed(name, names) for name in made.sources))
        step = steps.setdefault(made.sources, _Step(made))
        step.specs.append(spec)
        plan = TensorPlan(dtype or source.dtype(spec).name, made.shape)
        for name in made.sources:
            if step.tensors.setdefault(name, plan) != plan:
                raise UnsupportedModel(
                    f"{source.checkpoint.path}: {' and '.join(s.name for s in step.specs)} differ in dtype, "
                    f"but become one tensor, {name}",
                    hint="pass --dtype, which stores all tensors alike",
                )
    return list(steps.values())


def _shards(steps: Sequence[_Step], shard_bytes: int) -> dict[str, dict[str, TensorPlan]]:
    """File name to its tensors, filled in the order in which they are written."""
    shards: list[dict[str, TensorPlan]] = [{}]
    size = 0
    for step in steps:
        for name, plan in step.tensors.items():
            if shards[-1] and size + plan.nbytes > shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = plan
            size += plan.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    stem = SINGLE.removesuffix(".safetensors")
    return {f"{stem}-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _write_tensors(
    source: PlainSource,
    steps: Sequence[_Step],
    shards: Mapping[str, Mapping[str, TensorPlan]],
    folder: Path,
    dtype: np.dtype | None,
    progress: Progress | None,
) -> None:
    where = {name: file for file, shard in shards.items() for name in shard}
    done, total = 0, source.nbytes
    with contextlib.ExitStack() as stack:
        writers: dict[str, SafetensorsWriter] = {}
        for step in steps:
            leaves = [source.read(spec) for spec in step.specs]
            for name, expert, piece in step.pieces(leaves):
                file = where[name]
                if file not in writers:
                    writers[file] = SafetensorsWriter(folder / file, shards[file], METADATA)
                    stack.callback(writers[file].close)
                first_row = expert * (piece.size // piece.shape[-1])
                for row, block in row_blocks(piece):
                    if dtype is not None:
                        block = cast(name, block, dtype, source.checkpoint.path)
                    writers[file].write(name, block, (first_row + row) * (block.nbytes // len(block)))
            done += sum(leaf.nbytes for leaf in leaves)
            if progress:
                progress(done, total, step.specs[-1].name)


def is_export(path: Path) -> bool:
    """Returns whether a folder is an export of this program, or empty, so that --overwrite may replace it."""
    if not path.is_dir() or path.is_symlink():
        return False
    found = sorted(path.glob("*.safetensors"))
    if not found:
        return not any(path.iterdir())
    try:
        with contextlib.closing(SafetensorsFile(found[0])) as file:
            return _MADE_BY in file.metadata
    except CheckpointError:
        return False
