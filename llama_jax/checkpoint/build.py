"""Loading a checkpoint's tensors onto devices."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.format import DTYPES, Digest, Progress, TensorInfo, open_checkpoint
from llama_jax.checkpoint.leaf_builder import LeafBuilder, Shardings, host_bytes
from llama_jax.checkpoint.read import TensorReader, for_each_tensor
from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError, RequestError
from llama_jax.params import Params, ParamSpec, param_specs, unflatten


def load_params(
    path: str | Path,
    *,
    dtype: Any = None,
    sharding: Shardings = None,
    only: str | Sequence[str] | None = None,
    without: str | Sequence[str] = (),
    verify: bool = True,
    progress: Progress | None = None,
    config: LlamaConfig | None = None,
) -> Params:
    """Loads tensors, each straight to its place: a device only ever holds its own part of a leaf.

    Rows are read, checked and sent in blocks; beside the parameters themselves the host holds at most 1 GiB. On the CPU
    the buffers are used in place, without a copy. A cast is done by the device that keeps the part.

    A digest covers a whole tensor, so with `verify` every process reads every tensor that it loads to the end, once,
    however little of it its devices keep. Without, it reads only the rows that they keep, or whole rows where they keep
    some of the columns.

    Args:
      path: checkpoint folder.
      dtype: dtype of the leaves; that on disk when None.
      sharding: where the leaves go: one place for all, or a function of the leaf (see `llama_jax.sharding`); the
        default device when None.
      only, without: dotted names of the leaves to load or to leave out, with `*`, `?` and `[...]` as in file names,
        e.g. only="layers.0.*", without=["lm_head.*"]. The tree that is returned lacks the others.
      verify: whether to check the digest of every tensor (of its bytes on disk, before any cast).
      progress: called after each tensor, in the calling thread.
      config: what the tensors must fit; the checkpoint's own config when None.

    Returns:
      The parameter tree of `llama_jax.params`.

    Raises:
      CheckpointError: a tensor is missing, unknown, damaged, or of another shape than the config asks for.
      RequestError: weights cannot be of this dtype, or a pattern fits no tensor.
    """
    target = weights_dtype(dtype)
    checkpoint = open_checkpoint(path)
    specs = param_specs(config or checkpoint.config)
    _check_tensors(checkpoint.path, checkpoint.tensors, specs)
    reader = TensorReader(checkpoint)

    def read(spec: ParamSpec, leaf: LeafBuilder) -> None:
        digest = Digest()
        for block in leaf.blocks():
            if verify or block.wanted:
                reader.read_rows(spec.name, block.start, block.rows)
            if verify:
                digest.update(block.rows.reshape(-1).view(np.uint8))
        if verify:
            reader.check(spec.name, str(digest))

    return build_params(
        select(specs, only, without), checkpoint.tensors, read, dtype=target, sharding=sharding, progress=progress
    )


def build_params(
    specs: Sequence[ParamSpec],
    tensors: Mapping[str, TensorInfo],
    read: Callable[[ParamSpec, LeafBuilder], None],
    *,
    dtype: np.dtype | None,
    sharding: Shardings,
    progress: Progress | None,
    held: Callable[[int], int] = host_bytes,
) -> Params:
    """Builds the tree of some leaves on a few threads.

    Args:
      specs: the leaves.
      tensors: shape and dtype in which each is read, by name.
      read: fills every block of a leaf.
      dtype, sharding, progress: see `load_params`.
      held: host memory that a tensor of so many bytes takes while it is read.
    """
    by_name = {spec.name: spec for spec in specs}
    # Contexts such as `with jax.default_device(...)` belong to the calling thread.
    default_device = jax.config.jax_default_device

    def load(name: str) -> jax.Array:
        spec = by_name[name]
        with jax.default_device(default_device):
            leaf = LeafBuilder(tensors[name], dtype, sharding(spec) if callable(sharding) else sharding)
            read(spec, leaf)
            return leaf.result()

    leaves = for_each_tensor(tensors, list(by_name), load, progress, held)
    return unflatten(dict(zip(by_name, leaves, strict=True)))


def weights_dtype(dtype: Any) -> np.dtype | None:
    """A dtype that weights can have, or None.

    Raises:
      RequestError: they cannot.
    """
    if dtype is None:
        return None
    target = jnp.dtype(dtype)
    if target.name not in DTYPES:
        raise RequestError(
            f"weights cannot be loaded as {target.name}", param="dtype", hint=f"one of {', '.join(DTYPES)}"
        )
    return target


def select(
    specs: Sequence[ParamSpec], only: str | Sequence[str] | None, without: str | Sequence[str]
) -> list[ParamSpec]:
    """The leaves that the patterns of `load_params` choose.

    Raises:
      RequestError: a pattern fits no leaf, or no leaf is left.
    """

    def matched(patterns: Sequence[str], param: str) -> set[str]:
        found: set[str] = set()
        for pattern in patterns:
            fits = [s.name for s in specs if fnmatch.fnmatchcase(s.name, pattern)]
            if not fits:
                some = ", ".join(s.name for s in specs[:3])
                raise RequestError(
                    f"no tensor is called {pattern!r}", param=param, hint=f"the model has {some}, ...; * fits any text"
                )
            found.update(fits)
        return found

    kept = {s.name for s in specs} if only is None else matched([only] if isinstance(only, str) else only, "only")
    kept -= matched([without] if isinstance(without, str) else without, "without")
    if not kept:
        raise RequestError("no tensor is left to load", param="only", hint="only and without exclude all of them")
    return [s for s in specs if s.name in kept]


def _check_tensors(path: Path, tensors: Mapping[str, TensorInfo], specs: Sequence[ParamSpec]) -> None:
    """Raises CheckpointError unless the tensors are those that the config asks for, in its shapes."""
    wanted = {spec.name for spec in specs}
    hint = "config.json and the weights do not belong together, or the checkpoint is damaged"
    for what, names in (
        ("lacks", [s.name for s in specs if s.name not in tensors]),
        ("holds unknown", [n for n in tensors if n not in wanted]),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise CheckpointError(f"{path} {what} tensor {', '.join(names[:5])}{more}", hint=hint)
    for spec in specs:
        if tensors[spec.name].shape != spec.shape:
            raise CheckpointError(
                f"{path}: tensor {spec.name} has shape {tensors[spec.name].shape}, config.json asks for {spec.shape}",
                hint=hint,
            )
