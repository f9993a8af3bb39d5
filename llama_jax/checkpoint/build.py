"""Builds a tree of parameters on devices from a model in any format, leaf by leaf."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.checkpoint_source import CheckpointSource
from llama_jax.checkpoint.format import DTYPES, Digest, Progress, TensorInfo
from llama_jax.checkpoint.leaf_builder import LeafBuilder, Shardings, fill, host_bytes
from llama_jax.checkpoint.read import for_each_tensor
from llama_jax.checkpoint.source import HasDigests, ModelSource, RowSource
from llama_jax.checkpoint.values import count_nonfinite, is_matrix, is_zero, refuse_nonfinite, zeros_warning
from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError
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
    """Loads tensors, each straight to its devices: a device only ever holds its own part of a leaf.

    Rows are read, checked and sent in blocks, so the host holds at most 1 GiB beside the parameters. A CPU uses the
    buffers in place. Casts are done by the device that keeps the part.

    A digest covers a whole tensor, so with `verify` every process reads each tensor once, in full. Without, it reads
    the rows that its devices keep (whole rows, even if they keep some columns only).

    Args:
      path: checkpoint folder.
      dtype: of the leaves; that on disk when None. A scheme's members with a fixed dtype keep it.
      sharding: one for all leaves, or a function of the leaf (see `llama_jax.sharding`); the default device when None.
      only, without: dotted names of leaves to load or to leave out, with `*`, `?` and `[...]` as in file names, e.g.
        only="layers.0.*", without=["lm_head.*"].
      verify: whether to check the digest of every tensor (of its bytes on disk, before any cast).
      progress: called after each tensor, in the calling thread.
      config: what the tensors must fit; the checkpoint's own config when None.

    Returns:
      The parameter tree of `llama_jax.params`.

    Raises:
      CheckpointError: a tensor is missing, unknown, damaged, or of another shape than the config requires.
      RequestError: weights cannot be of this dtype, or a pattern fits no tensor.
    """
    source = CheckpointSource(path, config=config)
    return load_source(
        source, dtype=dtype, sharding=sharding, only=only, without=without, verify=verify, progress=progress
    )


def load_source(
    source: ModelSource,
    *,
    dtype: Any = None,
    sharding: Shardings = None,
    only: str | Sequence[str] | None = None,
    without: str | Sequence[str] = (),
    verify: bool = True,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
) -> Params:
    """Loads a model from any format: a checkpoint, or a source that has not been converted. Writes nothing.

    Leaf by leaf the source is read, checked and spread over the devices, on a few threads. Leaves that the source holds
    as they are pass row by row, others whole; the host holds at most 1 GiB in flight, or the largest leaf.

    Args:
      source: an opened source, which has checked names, shapes and dtypes.
      dtype, sharding, only, without, progress: see `load_params`.
      verify: whether to compare each tensor with its digest, or, where the source has none, to refuse NaN and infinity,
        and a model most of whose matrices are zeros.
      notify: told of the matrices that hold nothing but zeros, in a source without digests.

    Raises:
      CheckpointError: a tensor cannot be read, is damaged, or holds NaN or infinity; names file and tensor.
      RequestError: weights cannot be of this dtype, or a pattern fits no tensor.
    """
    target = weights_dtype(dtype)
    specs = {spec.name: spec for spec in select(param_specs(source.config), only, without)}
    tensors = {name: TensorInfo(spec.shape, source.dtype(spec).name, "") for name, spec in specs.items()}
    rows = {name for name, spec in specs.items() if isinstance(source, RowSource) and source.has_rows(spec)}
    digests = source if isinstance(source, HasDigests) else None

    zeros: list[str] = []

    def read(spec: ParamSpec, leaf: LeafBuilder) -> None:
        whole, bad, zero, digest = None, 0, is_matrix(spec), Digest()
        for block in leaf.blocks():
            if not (verify or block.wanted):
                continue
            if spec.name in rows:
                assert isinstance(source, RowSource)
                source.read_rows(spec, block.start, block.rows)
            else:
                whole = source.read(spec) if whole is None else whole
                fill(block, whole)
            if verify and digests:
                digest.update(block.rows.reshape(-1).view(np.uint8))
            elif verify:
                bad += count_nonfinite(block.rows)
                zero = zero and is_zero(block.rows)
        if verify and digests:
            digests.check(spec, str(digest))
        elif verify:
            refuse_nonfinite(spec.name, bad, spec.size, source.path)
            if zero:
                zeros.append(spec.name)

    # Contexts such as `with jax.default_device(...)` belong to the calling thread.
    default_device = jax.config.jax_default_device

    def load(name: str) -> jax.Array:
        spec = specs[name]
        with jax.default_device(default_device):
            cast = target if spec.dtype is None else None
            leaf = LeafBuilder(tensors[name], cast, sharding(spec) if callable(sharding) else sharding)
            read(spec, leaf)
            return leaf.result()

    def held(name: str) -> int:
        nbytes = tensors[name].nbytes
        return host_bytes(nbytes) if name in rows else nbytes + host_bytes(nbytes)

    leaves = for_each_tensor(tensors, list(specs), load, progress, held)
    warning = zeros_warning(zeros, sum(map(is_matrix, specs.values())), source.path)
    if warning and notify is not None:
        notify(warning)
    return unflatten(dict(zip(specs, leaves, strict=True)))


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
    """The leaves selected by the patterns of `load_params`.

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
