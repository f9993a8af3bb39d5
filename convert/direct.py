"""Loading a model from its source format onto devices, without a converted copy on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_jax.checkpoint.build import build_params, select, weights_dtype
from llama_jax.checkpoint.format import Progress, TensorInfo
from llama_jax.checkpoint.leaf_builder import LeafBuilder, Shardings, fill, host_bytes
from llama_jax.convert.model_source import ModelSource, RowSource, count_nonfinite, refuse_nonfinite
from llama_jax.convert.run import open_source
from llama_jax.errors import CheckpointError
from llama_jax.params import Params, ParamSpec, param_specs


def load_source(
    source: ModelSource,
    *,
    dtype: Any = None,
    sharding: Shardings = None,
    only: str | Sequence[str] | None = None,
    without: str | Sequence[str] = (),
    verify: bool = True,
    progress: Progress | None = None,
) -> Params:
    """The tree that `load_params` would give after a conversion; writes nothing.

    Leaf by leaf the source is read, checked and spread over the devices. Leaves that stand in the source as they are
    pass row by row, others whole; the host holds at most 1 GiB in flight, or the largest leaf.

    Args:
      source: an opened source, which has checked names, shapes and dtypes.
      dtype, sharding, only, without, progress: see `llama_jax.checkpoint.load_params`.
      verify: whether to refuse tensors that hold NaN or infinity (there are no digests to compare).

    Raises:
      CheckpointError: a tensor cannot be read, or holds NaN or infinity; names file and tensor.
      RequestError: weights cannot be of this dtype, or a pattern fits no tensor.
    """
    target = weights_dtype(dtype)
    specs = select(param_specs(source.config), only, without)
    tensors = {s.name: TensorInfo(s.shape, source.dtype(s).name, "") for s in specs}
    rows = source if isinstance(source, RowSource) else None

    def read(spec: ParamSpec, leaf: LeafBuilder) -> None:
        whole, bad = None, 0
        for block in leaf.blocks():
            if not (verify or block.wanted):
                continue
            if whole is None and not (rows is not None and rows.read_rows(spec, block.start, block.rows)):
                whole = source.read(spec)
            if whole is not None:
                fill(block, whole)
            if verify:
                bad += count_nonfinite(block.rows)
        if verify:
            refuse_nonfinite(spec.name, bad, spec.size, source.path)

    return build_params(
        specs,
        tensors,
        read,
        dtype=target,
        sharding=sharding,
        progress=progress,
        held=lambda n: n + host_bytes(n),
    )


@contextlib.contextmanager
def opened(path: Path, *, name: str | None = None, revision: str | None = None) -> Iterator[ModelSource]:
    """Opens a source for as long as it is loaded; a context manager.

    Sources carry no digests, so a file that is replaced or written to while it is read is noticed by its size and time.

    Raises:
      ModelNotFound, UnsupportedModel, CheckpointError: see `convert.run.open_source`.
      CheckpointError: on leaving, if a file has changed; names it.
    """
    before = _stamps(path)
    source = open_source(path, name=name, revision=revision)
    try:
        yield source
    finally:
        source.close()
    after = _stamps(path)
    if changed := sorted(str(file) for file in before.keys() | after.keys() if before.get(file) != after.get(file)):
        raise CheckpointError(
            f"{', '.join(changed[:5])} changed while the model was being loaded",
            hint="wait until whatever writes there has finished, and load again",
        )


def _stamps(path: Path) -> dict[Path, tuple[int, int, int]]:
    """Inode, size and time of the last change of a file, or of each file in a folder."""
    stamps = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for file in path.iterdir() if path.is_dir() else [path]:
            with contextlib.suppress(FileNotFoundError):
                stat = file.stat()
                stamps[file] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return stamps
