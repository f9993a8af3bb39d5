"""Checkpoints on disk: an Orbax v1 checkpoint of canonical leaves, a digest per tensor, the config and the tokenizer.

    <folder>/params/            Orbax v1 (OCDBT, zarr3, uncompressed), the tree of `llama_jax.params`; its custom
                                metadata holds format_version and the digest, dtype and shape of every tensor
    <folder>/config.json        Hugging Face style; generation_config.json and the tokenizer's files beside it
    <folder>/model.lock.json    what it was made from: files, tensors and their digests (`llama_jax.checkpoint.lock`)
    <folder>/llama_jax.json     format version, source, dtype, digests of the small files; written last

Opening and verifying a checkpoint imports neither jax nor orbax; loading imports jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llama_jax.checkpoint.format import (
    FORMAT_VERSION,
    Checkpoint,
    Progress,
    Source,
    TensorInfo,
    is_checkpoint,
    open_checkpoint,
)

if TYPE_CHECKING:
    from llama_jax.checkpoint.build import load_params
    from llama_jax.checkpoint.read import VerifyReport, verify
    from llama_jax.checkpoint.write import CheckpointWriter, save

__all__ = [
    "FORMAT_VERSION",
    "Checkpoint",
    "CheckpointWriter",
    "Progress",
    "Source",
    "TensorInfo",
    "VerifyReport",
    "is_checkpoint",
    "load_params",
    "open_checkpoint",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    # These need numpy, tensorstore, jax or orbax, so they are loaded when first asked for.
    homes = {
        "CheckpointWriter": "write",
        "save": "write",
        "VerifyReport": "read",
        "verify": "read",
        "load_params": "build",
    }
    if name in homes:
        return getattr(importlib.import_module(f"{__name__}.{homes[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
