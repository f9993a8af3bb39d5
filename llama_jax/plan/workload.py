"""The workload of a model, and the shapes of the programs that `generate` runs for it."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from llama_jax.cache import check_kv_dtype, stored_dtype
from llama_jax.config import LlamaConfig
from llama_jax.decode.buckets import batch_bucket, capacities, prompt_bucket
from llama_jax.decode.chunks import chunk_length
from llama_jax.errors import RequestError
from llama_jax.plan.costs import local_rows
from llama_jax.sharding import AnyMesh, on, ruled
from llama_jax.targets import Target

DEFAULT_CONTEXT = 4096
DEFAULT_PROMPT = 512


@dataclass(frozen=True)
class Workload:
    """A batch of texts of equal length.

    Attributes:
      batch: texts at a time, over all devices.
      context: tokens of each, prompt and answer together.
      prompt: tokens of each prompt.
      dtype: of weights, activations and, without `kv_dtype`, cache.
      kv_dtype: of the cache, one of `cache.KV_DTYPES`.
    """

    batch: int = 1
    context: int = 4096
    prompt: int = 512
    dtype: str = "bfloat16"
    kv_dtype: str | None = None

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return jnp.dtype(self.dtype).itemsize

    def check(self, config: LlamaConfig) -> None:
        """Raises RequestError for sizes that are not positive or contradict each other, or an unknown kind of cache."""
        check_kv_dtype(self.kv_dtype)
        for name in ("batch", "context", "prompt"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be positive, got {getattr(self, name)}", param=name, hint="1 or more")
        if self.context > config.context_length:
            raise RequestError(
                f"a context of {self.context} tokens is longer than the model's, {config.context_length}",
                param="context",
                hint=f"choose at most {config.context_length}",
            )
        if self.prompt > self.context:
            raise RequestError(
                f"a prompt of {self.prompt} tokens does not fit a context of {self.context}",
                param="prompt",
                hint="choose a shorter prompt or a longer context",
            )


def default_workload(
    config: LlamaConfig,
    dtype: str,
    *,
    batch: int = 1,
    context: int | None = None,
    prompt: int | None = None,
    kv_dtype: str | None = None,
) -> Workload:
    """The default workload of a plan: texts of 4096 tokens, 512 of them the prompt's, or as many as the model
    can take."""
    context = min(DEFAULT_CONTEXT, config.context_length) if context is None else context
    return Workload(batch, context, min(DEFAULT_PROMPT, context) if prompt is None else prompt, dtype, kv_dtype)


@dataclass(frozen=True)
class Calls:
    """The programs' shapes, on one device.

    Attributes:
      rows: of the batch, filled up.
      chunk: prompt tokens of one call of prefill; `padded`: of the prompt, a multiple of it.
      capacities: slots of a row's cache, from prefill to the last token: it grows when it is full.
    """

    rows: int
    chunk: int
    padded: int
    capacities: tuple[int, ...]


def calls(config: LlamaConfig, target: Target, mesh: AnyMesh, workload: Workload) -> Calls:
    """The programs that `generate` calls on a mesh of a target's devices.

    Args:
      config: as `layout.split_config` gives it for that mesh.
    """
    with on(ruled(mesh)):
        rows = batch_bucket(workload.batch)
        padded = prompt_bucket(workload.prompt)
        slots = capacities(padded, max(workload.context - workload.prompt, 1))
        chunk = chunk_length(
            config,
            target,
            workload.dtype,
            batch=rows,
            prompt=padded,
            capacity=slots[0],
            cache_dtype=stored_dtype(workload.kv_dtype, workload.dtype, target),
        )
    return Calls(local_rows(rows, mesh), chunk, padded, slots)
