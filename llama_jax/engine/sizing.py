"""Default sizes of an engine, from the model, its context and the free memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.cache import DEFAULT_PAGE_SIZE
from llama_jax.config import LlamaConfig
from llama_jax.decode.graphs import loops_in_graphs
from llama_jax.engine.settings import BIASES, STOP_IDS, EngineSettings
from llama_jax.errors import DoesNotFit, RequestError
from llama_jax.layout import local_heads
from llama_jax.model.loaded import Model
from llama_jax.plan.device_memory import free_bytes, memory_fraction, more_memory_hint
from llama_jax.plan.memory import cache_bytes
from llama_jax.sharding import AnyMesh, ruled
from llama_jax.targets import of_device

GPU_ROWS, CPU_ROWS = 256, 8
GPU_TOKENS, CPU_TOKENS = (256, 512, 1024, 2048), (32, 128)
GPU_FEW_TOKENS, GPU_FEW_ROWS = (128, 256, 512, 2048), 32
"""Sizes of steps with prompts for few rows. A prompt of 512 tokens of Llama-3.1-8B takes 11.6 ms on an H200 in a
step for 256 rows, and 11.1 in one for 32."""
GPU_DECODE_ROWS = (1, 8, 16, 32, 64, 96, 128, 192)
"""Sizes of decode steps besides all rows. Up to 8 rows, reading the weights bounds a step; beyond 64, arithmetic makes
larger steps longer, and finer sizes worth compiling."""
GPU_ONE_SIZE, CPU_ONE_SIZE, ONE_SIZE_ROWS = 512, 64, 8
"""Tokens, and prompts, of a step with prompts if there is one size. Every new prompt costs a whole step, so these are
as few tokens as keep the device busy."""
CPU_CONTEXT = 4096
CPU_START, GPU_START = 1024, 8192
CPU_EACH = 512
"""Tokens per row, on average, that a CPU has pages for; rows that need more use those of rows that need less."""
CHUNK_ROWS = 16
STEPS = 8
"""Decode steps per dispatch on a device that loops by itself, if nobody reads token by token. This way a step of 64
rows of Llama-3.1-8B takes 6.45 ms on an H200; with one dispatch per step, 7.0."""
DRAFT_ROWS = 8
DRAFT_SHARE = 8
"""A draft model's cache takes at most 1/N of the memory for both caches; this is N."""


@dataclass(frozen=True)
class Sizes:
    """Settings of an engine by the length of its longest sequence, prompt and answer.

    The context is a power of two, at least 1024 tokens on a CPU and 8192 on a GPU, and at most the model's: a page
    table as wide as the model's context would slow every step, and many devices have no room for one such sequence.

    Attributes:
      options: of `default_settings`; with a context in them the engine does not grow.
      fixed: settings for any length.
    """

    model: Model
    options: Mapping[str, Any] = field(default_factory=dict)
    fixed: EngineSettings | None = None

    @property
    def longest(self) -> int:
        """The longest sequence that there are settings for, memory permitting."""
        if self.fixed is not None:
            return self.fixed.context
        if context := self.options.get("context"):
            return int(context)
        on_cpu = self.model.device.platform == "cpu"
        return _default_context(self.model.config, on_cpu=on_cpu and not self._grows)

    @property
    def _grows(self) -> bool:
        """Whether there are settings for several lengths. Programs for another length might round differently."""
        return not (self.fixed or self.options.get("context") or self.options.get("batch_invariant"))

    def __call__(self, length: int) -> EngineSettings:
        """Settings for sequences of that length, or of `longest` if that is less.

        Raises:
          DoesNotFit: there is no memory for one of them.
        """
        if not self._grows:
            return self.fixed or default_settings(self.model, **self.options)
        least = CPU_START if self.model.device.platform == "cpu" else GPU_START
        context = min(1 << (max(length, least) - 1).bit_length(), self.longest)
        options = {**self.options, "context": context, "least": min(length, context)}
        return default_settings(self.model, **options)


def default_settings(
    model: Model,
    *,
    rows: int | None = None,
    context: int | None = None,
    least: int | None = None,
    pages: int | None = None,
    page_size: int = DEFAULT_PAGE_SIZE,
    decode_rows: tuple[int, ...] | None = None,
    step_tokens: int | None = None,
    steps: int | None = None,
    prefix_cache: bool = True,
    waiting: int | None = None,
    stop_ids: int = STOP_IDS,
    biases: int = BIASES,
    greedy: bool | None = None,
    drafts: int = 0,
    draft: Model | None = None,
    batch_invariant: bool = False,
    strict: bool = False,
    reserve: int = 0,
) -> EngineSettings:
    """Settings for a model on its devices.

    Args:
      rows: sequences that run at once.
      context: tokens of one, prompt and answer together; by default what the model can take, on a CPU up to 4096.
      least: acceptable context if memory is short; by default the full context.
      pages: by default, on a GPU, all that fit into free memory besides a step's activations; on a CPU enough for rows
        of 512 tokens, and for one of the context's length.
      decode_rows: by default few on a CPU, more on a GPU.
      step_tokens: the most tokens of a step with prompts, by default 2048 on a GPU, 128 on a CPU.
      draft: the draft model, whose cache takes some of the memory; only with `drafts`.
      batch_invariant: see `EngineSettings`; one size of each program. An `LLM` then does not grow.
      steps: by default 8 where the device loops by itself (a CPU; an NVIDIA GPU that holds the whole model), else 1.
      reserve: bytes of each device's free memory to leave unused.

    Raises:
      DoesNotFit: a sequence of that length does not fit into memory.
      RequestError: the context is longer than the model's.
    """
    on_cpu = model.device.platform == "cpu"
    free = None if on_cpu else free_memory(model)
    if steps is None:
        several = model.mesh is not None and model.mesh.size > 1
        steps = STEPS if on_cpu or loops_in_graphs(several=several) else 1
    return settings_for(
        model.config,
        model.dtype,
        model.mesh,
        kv_dtype=model.kv_dtype,
        on_cpu=on_cpu,
        free=None if free is None else max(free - reserve, 0),
        rows=rows,
        context=context,
        least=least,
        pages=pages,
        page_size=page_size,
        decode_rows=decode_rows,
        step_tokens=step_tokens,
        steps=steps,
        prefix_cache=prefix_cache,
        waiting=waiting,
        stop_ids=stop_ids,
        biases=biases,
        greedy=greedy,
        drafts=drafts,
        draft=None if draft is None else (draft.config, draft.dtype, draft.kv_dtype),
        batch_invariant=batch_invariant,
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
    kv_dtype: str | None = None,
    rows: int | None = None,
    context: int | None = None,
    least: int | None = None,
    pages: int | None = None,
    page_size: int = DEFAULT_PAGE_SIZE,
    decode_rows: tuple[int, ...] | None = None,
    step_tokens: int | None = None,
    draft: tuple[LlamaConfig, DTypeLike, str | None] | None = None,
    batch_invariant: bool = False,
    more_memory: str = "",
    **options: Any,
) -> EngineSettings:
    """`default_settings` for a model that need not be loaded.

    Args:
      config: on a mesh, with key/value heads repeated as `load` does.
      free: bytes of each device besides the weights; None if unknown.
      kv_dtype: of the cache; None for `dtype`.
      draft: a draft model's config on the same mesh, its dtype and the `kv_dtype` of its cache.
      more_memory: how to get more memory, for the error's hint.
      options: other fields of `EngineSettings`.
    """
    longest = config.context_length
    if context is not None and not 0 < context <= longest:
        raise RequestError(
            f"a context of {context} tokens; the model's is {longest}", param="context", hint=f"at most {longest}"
        )
    context = _default_context(config, on_cpu=on_cpu) if context is None else context
    rows = (CPU_ROWS if on_cpu else GPU_ROWS) if rows is None else rows
    each = -(-context // page_size)
    room = None if free is None else max(free - _beside_pages(config, dtype, mesh, rows, step_tokens), 0)
    draft_rows, draft_context = min(DRAFT_ROWS, rows), 0
    if draft is not None:
        draft_context = min(context, draft[0].context_length)
        if room is not None:
            column = draft_rows * cache_bytes(draft[0], mesh, jnp.dtype(draft[1]).itemsize, page_size, draft[2])
            columns = max(1, min(-(-draft_context // page_size), room // DRAFT_SHARE // column))
            draft_context = min(draft_context, columns * page_size)
            room = max(room - columns * column, 0)
    if pages is None:
        pages = max(each, rows * -(-min(context, CPU_EACH) // page_size)) if on_cpu else rows * each
        if room is not None:
            from llama_jax.kernels.pallas import MAX_ELEMENTS  # Pallas is slow to import, and a CPU does not need it

            pages = min(pages, MAX_ELEMENTS // (local_heads(config, mesh)[1] * config.head_dim * page_size))
            pages = min(pages, room // cache_bytes(config, mesh, jnp.dtype(dtype).itemsize, page_size, kv_dtype))
    if pages < each and least is not None:
        context = max(least, min(context, pages * page_size))
        each = -(-context // page_size)
    if pages < each:
        smaller = "a smaller dtype" if kv_dtype else "kv_dtype='int8' (--kv-dtype int8)"
        fitting = f"context={pages * page_size} fits, or use {smaller}, or more devices"
        raise DoesNotFit(
            f"a sequence of {context} tokens takes {each} pages of {page_size}; there is memory for {pages}",
            hint="; ".join(filter(None, (fitting, more_memory))),
        )
    chunk_rows, buckets = CHUNK_ROWS, decode_rows or _decode_rows(rows, on_cpu=on_cpu)
    tokens, few = [*(CPU_TOKENS if on_cpu else GPU_TOKENS)], [*(() if on_cpu or batch_invariant else GPU_FEW_TOKENS)]
    if step_tokens is not None:
        if step_tokens <= rows:
            raise RequestError(
                f"steps of {step_tokens} tokens for {rows} rows", param="step_tokens", hint=f"at least {rows + 1}"
            )
        tokens = [*(n for n in tokens if n < step_tokens), step_tokens]
        few = few and [*(n for n in few if n < step_tokens), step_tokens]
    if few and rows <= GPU_FEW_ROWS:  # a step for few rows is one for all
        tokens, few = sorted({*tokens, *few}), []
    if tokens[-1] <= rows:
        tokens.append(2 * rows)
    if batch_invariant:  # one size of each program
        chunk_rows, buckets = ONE_SIZE_ROWS, (rows,)
        one = step_tokens or max(CPU_ONE_SIZE if on_cpu else GPU_ONE_SIZE, 1 << rows.bit_length())
        tokens = [max(one, page_size)]
    return EngineSettings(
        rows=rows,
        few_tokens=tuple(few),
        few_rows=GPU_FEW_ROWS if few else 0,
        context=context,
        pages=pages,
        decode_rows=buckets,
        mixed_tokens=tuple(tokens),
        draft_rows=draft_rows,
        draft_context=min(draft_context, context),
        chunk_rows=min(chunk_rows, rows),
        page_size=page_size,
        batch_invariant=batch_invariant,
        **options,
    )


def least_settings(
    config: LlamaConfig,
    dtype: DTypeLike,
    mesh: AnyMesh,
    *,
    on_cpu: bool,
    context: int | None = None,
    pages: int | None = None,
    page_size: int = DEFAULT_PAGE_SIZE,
    rows: int | None = None,
) -> tuple[EngineSettings, int]:
    """Settings of the smallest engine that `default_settings` makes if memory is short, and its bytes on each device
    besides weights and pages. Arguments and errors as for `settings_for`."""
    if pages is None and not on_cpu:
        pages = -(-(context or config.context_length) // page_size)
    settings = settings_for(
        config, dtype, mesh, on_cpu=on_cpu, free=None, rows=rows, context=context, pages=pages, page_size=page_size
    )
    return settings, 0 if on_cpu else _beside_pages(config, dtype, mesh, settings.rows)


def _default_context(config: LlamaConfig, *, on_cpu: bool) -> int:
    return min(config.context_length, CPU_CONTEXT) if on_cpu else config.context_length


def default_rows(model: Model) -> int:
    """Default number of sequences that run at once."""
    return CPU_ROWS if model.device.platform == "cpu" else GPU_ROWS


def rows_for(model: Model, sequences: int) -> int:
    """Number of rows for at most `sequences` sequences: one of a few sizes, at most `default_rows`."""
    sizes = _decode_rows(default_rows(model), on_cpu=model.device.platform == "cpu")
    return next((rows for rows in sizes if rows >= sequences), sizes[-1])


def free_memory(model: Model) -> int | None:
    """Free bytes on each of a model's devices; None if unknown (`plan.device_memory`)."""
    return free_bytes(model.devices, of_device(model.device))


def _decode_rows(rows: int, *, on_cpu: bool) -> tuple[int, ...]:
    """Sizes of decode steps. On a CPU each takes seconds to compile, and many gain little."""
    if on_cpu:
        return tuple(sorted({1, rows}))
    return tuple(sorted({*(n for n in GPU_DECODE_ROWS if n < rows), rows}))


def _beside_pages(
    config: LlamaConfig, dtype: DTypeLike, mesh: AnyMesh, rows: int, step_tokens: int | None = None
) -> int:
    """Bytes of each device that the largest step, or its compilation, needs besides weights and pages: XLA autotunes
    kernels on copies of their operands, the largest of which is the head's matrix."""
    width = max((layer.mlp if isinstance(layer.mlp, int) else 0) for layer in config.layers) // ruled(mesh).ways("mlp")
    tokens = step_tokens or GPU_TOKENS[-1]
    logits = 5 * 4 * max(rows, GPU_ROWS) * config.vocab_size
    activations = tokens * (4 * config.hidden_size * 4 + 3 * max(width, config.hidden_size) * jnp.dtype(dtype).itemsize)
    head = config.vocab_size * config.hidden_size * jnp.dtype(dtype).itemsize // ruled(mesh).ways("vocab")
    return logits + 2 * activations + head + (1 << 30)
