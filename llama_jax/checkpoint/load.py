"""Loading a checkpoint's tensors onto devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.checkpoint.format import DTYPES, Progress, open_checkpoint
from llama_jax.checkpoint.tensors import TensorReader, for_each_tensor
from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError, RequestError
from llama_jax.params import Params, ParamSpec, param_specs, unflatten

type Placement = jax.sharding.Sharding | jax.Device
"""Where a leaf goes."""


def load_params(
    path: str | Path,
    *,
    dtype: Any = None,
    sharding: Placement | Callable[[ParamSpec], Placement] | None = None,
    verify: bool = True,
    progress: Progress | None = None,
    config: LlamaConfig | None = None,
) -> Params:
    """Loads all tensors, each straight to its place.

    A tensor is read into host memory, checked, sent to its devices and cast there; the host holds at most 1 GiB of
    tensors in flight, or the largest one. On the CPU the buffers are used in place, without a copy.

    Args:
      path: checkpoint folder.
      dtype: dtype of the leaves; that on disk when None.
      sharding: where the leaves go: one place for all, or a function of the leaf; the default device when None.
      verify: whether to check the digest of every tensor (of its bytes on disk, before any cast).
      progress: called after each tensor, in the calling thread.
      config: what the tensors must fit; the checkpoint's own config when None.

    Returns:
      The parameter tree of `llama_jax.params`.

    Raises:
      CheckpointError: a tensor is missing, unknown, damaged, or of another shape than the config asks for.
      RequestError: weights cannot be of this dtype.
    """
    target = None if dtype is None else jnp.dtype(dtype)
    if target is not None and target.name not in DTYPES:
        raise RequestError(
            f"weights cannot be loaded as {target.name}", param="dtype", hint=f"one of {', '.join(DTYPES)}"
        )
    checkpoint = open_checkpoint(path)
    specs = {spec.name: spec for spec in param_specs(config or checkpoint.config)}
    for what, names in (
        ("lacks", [n for n in specs if n not in checkpoint.tensors]),
        ("holds unknown", [n for n in checkpoint.tensors if n not in specs]),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise CheckpointError(
                f"{checkpoint.path} {what} tensor {', '.join(names[:5])}{more}",
                hint="config.json and the weights do not belong together, or the checkpoint is damaged",
            )
    for name, spec in specs.items():
        if checkpoint.tensors[name].shape != spec.shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} has shape {checkpoint.tensors[name].shape}, "
                f"config.json asks for {spec.shape}",
                hint="config.json and the weights do not belong together, or the checkpoint is damaged",
            )
    reader = TensorReader(checkpoint)

    def load(name: str) -> jax.Array:
        where = sharding(specs[name]) if callable(sharding) else sharding
        leaf = jax.device_put(reader.read(name, check=verify), where)
        if target is not None and leaf.dtype != target:
            leaf = leaf.astype(target)
        # The transfer has to end before the host's buffer counts as free.
        return leaf.block_until_ready()

    leaves = for_each_tensor(checkpoint.tensors, list(specs), load, progress)
    return unflatten(dict(zip(specs, leaves, strict=True)))
