"""The announcement of a conversion: sizes, free space, and what helps where the result is far larger."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.format import MARKER, open_checkpoint
from llama_jax.checkpoint.source import ModelSource
from llama_jax.disk import existing_parent, size_text
from llama_jax.params import ParamSpec
from llama_jax.schemes import PLAIN

LARGER = 2
"""Ratio of a checkpoint's size to its source's above which a warning says what helps."""


def announce(
    model: ModelSource,
    dst: Path,
    dtypes: Mapping[ParamSpec, np.dtype],
    weights: Sequence[Path],
    notify: Callable[[str], None],
    *,
    warn_larger: bool,
) -> None:
    """Tells `notify` the result and destination of a conversion, after a warning if it is much larger than the source.

    Args:
      dtypes: of each leaf in the checkpoint.
      weights: the source's files.
      warn_larger: whether to warn.
    """
    by_dtype: Counter[str] = Counter()
    for spec, dtype in dtypes.items():
        by_dtype[dtype.name if spec.scheme == PLAIN.name else spec.scheme] += spec.size * dtype.itemsize
    before, after = sum(map(_size, weights)), by_dtype.total()
    dtype_name = by_dtype.most_common(1)[0][0]
    if warn_larger and after > LARGER * before:
        smaller, half = "", sum(s.size * (2 if s.scheme == PLAIN.name else d.itemsize) for s, d in dtypes.items())
        if half < after:
            smaller = (
                '`llama-jax convert SRC DST --dtype bfloat16` (in Python dtype="bfloat16") makes '
                f"{size_text(half)} of it; "
            )
        notify(
            f"Warning: the checkpoint will be {after / max(before, 1):.1f} times as large as its source "
            f"({model.source.quantization or 'the weights'} in {dtype_name}); {smaller}`--no-convert` with commands "
            "that load a model (in Python load(convert=False)) reads the source as it is"
        )
    free = shutil.disk_usage(existing_parent(dst)).free
    notify(
        f"Converting {model.path} ({size_text(before)}) to {dst} ({size_text(after)}, {dtype_name}; "
        f"{size_text(free)} are free)"
    )


def _size(file: Path) -> int:
    """Bytes of a source's file; of a checkpoint, which `weight_files` gives as one small file, those of its tensors."""
    return open_checkpoint(file.parent).nbytes if file.name == MARKER else file.stat().st_size
