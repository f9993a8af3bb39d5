"""How large an engine is made when nobody says: by the model, its context and the memory that is free."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.cache import DEFAULT_PAGE_SIZE
from llama_jax.config import LlamaConfig
from llama_jax.engine.settings import EngineSettings
from llama_jax.errors import DoesNotFit, RequestError
from llama_jax.model.loaded import Model
from llama_jax.plan.device_memory import free_bytes, memory_fraction, more_memory_hint
from llama_jax.plan.memory import cache_bytes
from llama_jax.sharding import AnyMesh, ruled
from llama_jax.targets import of_device

GPU_ROWS, CPU_ROWS = 256, 8
GPU_TOKENS, CPU_TOKENS = (256, 512, 1024, 2048), (32, 128)
CPU_CONTEXT = 4096
CHUNK_ROWS = 16


def default_settings(
    model: Model,
    *,
    rows: int | None = None,
    context: int | None = None,
    pages: int | None = None,
    page_size: int = DEFAULT_PAGE_SIZE,
    steps: int = 1,
    prefix_cache: bool = True,
    waiting: int | None = None,
    strict: bool = False,
) -> EngineSettings:
    """Settings for a model on the devices that it is on.

    Args:
      rows: sequences that run at once.
      context: tokens of one, prompt and answer together; by default what the model can take, on a CPU up to 4096.
      pages: by default, on a GPU, all that its free memory has room for beside a step's activations; on a CPU as many
        as all rows need together.

    Raises:
      DoesNotFit: a sequence of that length has no room in memory.
      RequestError: the context is longer than the model's.
    """
    on_cpu = model.device.platform == "cpu"
    return settings_for(
        model.config,
        model.dtype,
        model.mesh,
        on_cpu=on_cpu,
        free=None if on_cpu else free_memory(model),
        rows=rows,
        context=context,
        pages=pages,
        page_size=page_size,
        steps=steps,
        prefix_cache=prefix_cache,
        waiting=waiting,
        strict=strict,
        more_memory="" if on_cpu else more_memory_hint(memory_fraction()),
    )


def settings_for(
    config: LlamaConfig,
    dtype: DTypeLike,
    mesh: AnyMesh,
    *,
    on_cpu: bool,
    free: int | None,
    rows: int | None = None,
    context: int | None = None,
    pages: int | None = None,
    page_size: int = DEFAULT_PAGE_SIZE,
    more_memory: str = "",
    **options: Any,
) -> EngineSettings:
    """`default_settings`, of a model that need not be there.

    Args:
      config: on a mesh, with key/value heads repeated as `load` does it.
      free: bytes of each device beside the weights; None where that is not known.
      more_memory: what would make them more, for the error's hint.
      options: other fields of `EngineSettings`.
    """
    longest = config.context_length
    if context is not None and not 0 < context <= longest:
        raise RequestError(
            f"a context of {context} tokens; the model's is {longest}", param="context", hint=f"at most {longest}"
        )
    context = min(longest, CPU_CONTEXT if on_cpu else longest) if context is None else context
    rows = (CPU_ROWS if on_cpu else GPU_ROWS) if rows is None else rows
    each = -(-context // page_size)
    if pages is None:
        pages = rows * each
        if free is not None:
            room = max(free - _beside_pages(config, dtype, mesh), 0)
            pages = min(pages, room // cache_bytes(config, mesh, jnp.dtype(dtype).itemsize, page_size))
    if pages < each:
        fitting = f"context={pages * page_size} fits, or use a smaller dtype, or more devices"
        raise DoesNotFit(
            f"a sequence of {context} tokens takes {each} pages of {page_size}; there is memory for {pages}",
            hint="; ".join(filter(None, (fitting, more_memory))),
        )
    tokens = [n for n in (CPU_TOKENS if on_cpu else GPU_TOKENS) if n > rows] or [2 * rows]
    return EngineSettings(
        rows=rows,
        context=context,
        pages=pages,
        decode_rows=_decode_rows(rows, on_cpu=on_cpu),
        mixed_tokens=tuple(tokens),
        chunk_rows=min(CHUNK_ROWS, rows),
        page_size=page_size,
        **options,
    )


def free_memory(model: Model) -> int | None:
    """Bytes that are free on each of a model's devices; None where that is not known (`plan.device_memory`)."""
    devices = [model.device] if model.mesh is None else list(model.mesh.devices.flat)
    return free_bytes(devices, of_device(model.device))


def _decode_rows(rows: int, *, on_cpu: bool) -> tuple[int, ...]:
    """Sizes of decode steps. A CPU takes seconds to compile one, and gains little by many."""
    if on_cpu:
        return tuple(sorted({1, rows}))
    sizes = [1]
    while 2 * sizes[-1] < rows:
        sizes.append(2 * sizes[-1])
    return tuple(sorted({*sizes, rows}))


def _beside_pages(config: LlamaConfig, dtype: DTypeLike, mesh: AnyMesh) -> int:
    """Bytes of each device that the largest step needs besides weights and pages."""
    width = max((layer.mlp if isinstance(layer.mlp, int) else 0) for layer in config.layers) // ruled(mesh).ways("mlp")
    tokens = GPU_TOKENS[-1]
    logits = 5 * 4 * GPU_ROWS * config.vocab_size
    activations = tokens * (4 * config.hidden_size * 4 + 3 * max(width, config.hidden_size) * jnp.dtype(dtype).itemsize)
    return logits + 2 * activations + (1 << 30)
