"""The model that a run starts from, placed for training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from llama_jax import runtime
from llama_jax.checkpoint import Progress
from llama_jax.checkpoint.build import load_source
from llama_jax.checkpoint.format import open_checkpoint
from llama_jax.checkpoint.source import ModelSource, tell_notes
from llama_jax.config import LlamaConfig
from llama_jax.convert.opening import opened
from llama_jax.convert.quantizing import QuantizedSource
from llama_jax.layout import check, check_groups, param_sharding
from llama_jax.library import resolve
from llama_jax.loading import check_kernels_once, held_config
from llama_jax.model.fuse import arrange
from llama_jax.model.quantization import dequantize_params
from llama_jax.params import Params
from llama_jax.recipe import requested, schemes
from llama_jax.sharding import RuledMesh, on
from llama_jax.text.tokenizer import Tokenizer, tokenizer_from_files
from llama_jax.training.placement import check_mesh, kept
from llama_jax.training.settings import Settings

type Notify = Callable[[str], None]


@dataclass(frozen=True)
class Base:
    """A model whose weights are still in its files.

    Attributes:
      dtype: that is computed in.
      digest: of the weights (`Checkpoint.weights_digest`).
    """

    source: ModelSource
    tokenizer: Tokenizer
    settings: Settings
    mesh: RuledMesh | None
    dtype: jnp.dtype
    digest: str

    @property
    def config(self) -> LlamaConfig:
        return self.source.config

    @property
    def files(self) -> Mapping[str, bytes | str]:
        return self.source.files

    def load(self, progress: Progress | None, notify: Notify | None) -> tuple[Params, LlamaConfig]:
        """Parameters: canonical in float32 if all are trained; else frozen, fused and in the form that is wanted."""
        learned = self.settings.method == "full"
        config, mesh = self.config, None if self.mesh is None else kept(self.mesh)
        if mesh is not None:
            check_groups(config, mesh)
        target = jnp.dtype("float32") if learned else self.dtype
        sharding = None if mesh is None else param_sharding(config, mesh)
        params = load_source(self.source, dtype=target, sharding=sharding, progress=progress, notify=notify)
        held = (
            config.replace(schemes=())
            if learned
            else held_config(config, self.settings.compute.weights, split=mesh is not None)
        )
        if config.schemes and not held.schemes:
            with on(mesh):
                params, config = dequantize_params(params, config, target, donate=True)
        return arrange(params, config, mesh, fuse=not learned, donate=True)


@contextlib.contextmanager
def opened_base(
    settings: Settings, mesh: RuledMesh | None, progress: Progress | None, notify: Notify | None
) -> Iterator[Base]:
    """Opens the model of a run, converting it into the cache first if need be; errors as for `llama_jax.load`."""
    runtime.enable_compilation_cache()
    check_kernels_once(notify)
    dtype = runtime.default_dtype() if settings.compute.dtype is None else jnp.dtype(settings.compute.dtype)
    form = None if settings.method == "full" else settings.compute.weights
    wanted = None if form is None else requested(form)
    path = resolve(settings.model, progress=progress, notify=notify)
    with opened(path, dequantize=wanted is not None) as found:
        source: Any = found if wanted is None else QuantizedSource(found, schemes(found.config, wanted))
        if mesh is not None:
            check(source.config, mesh)
            check_mesh(source.config, mesh, settings.rows.rows // settings.rows.parts)
        tokenizer = tokenizer_from_files(source.files, source.path).for_model(source.config.vocab_size)
        tell_notes(source, notify)
        yield Base(source, tokenizer, settings, mesh, dtype, open_checkpoint(path).weights_digest)
