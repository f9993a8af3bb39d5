"""Chunk sizes of prefill, chosen to bound the memory that attention writes.

The reference writes the logits of every query against every slot of the cache. Kernels keep tiles of them on chip, so
their chunks are bounded by `buckets.MAX_CHUNK` alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.cache import stored
from llama_jax.config import LlamaConfig
from llama_jax.decode import buckets
from llama_jax.kernels.attention import (
    KeysValues,
    Places,
    Rule,
    Visibility,
    decode_attention,
    flash_attention,
)
from llama_jax.kernels.attention.decode import MAX_QUERIES
from llama_jax.kernels.dispatch import REFERENCE, choose
from llama_jax.layout import local_heads
from llama_jax.sharding import share
from llama_jax.sharding.context import current
from llama_jax.targets import Target

ATTENTION_BYTES = 4 << 30
"""The most bytes of attention logits and weights in one call; a chunk of `SHORTEST` tokens may take more."""
SHORTEST = 128


def attention_backends(
    config: LlamaConfig,
    target: Target,
    dtype: DTypeLike,
    *,
    rows: int,
    tokens: int,
    capacity: int,
    cache_dtype: DTypeLike | None = None,
) -> tuple[str, ...]:
    """Names of the backends that the model's layers use on one device of the mesh in use, each once.

    Args:
      rows: of one device, each with `tokens` queries and `capacity` slots.
      dtype: of queries, and of the cache too unless `cache_dtype` is given.

    Raises:
      KernelError: a backend named by the user cannot run this.
    """

    def array(*shape: int, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    heads, kv_heads = local_heads(config, current())
    operation = decode_attention if tokens <= MAX_QUERIES else flash_attention
    slots = stored.shapes((rows, kv_heads, capacity, config.head_dim), dtype if cache_dtype is None else cache_dtype)
    arrays = (
        array(rows, tokens, heads, config.head_dim, dtype=dtype),
        KeysValues(**slots),
        Places(array(rows, tokens, dtype=jnp.int32), array(rows, capacity, dtype=jnp.int32)),
    )
    seen = dict.fromkeys(Visibility(layer.attention, layer.window or 0) for layer in config.layers)
    rules = [Rule(visibility, config.head_dim**-0.5) for visibility in seen]
    return tuple(dict.fromkeys(choose(operation, target, "auto", *arrays, rule).backend for rule in rules))


def written_bytes(
    backends: Iterable[str], config: LlamaConfig, itemsize: int, rows: int, tokens: int, slots: int
) -> int:
    """Bytes of a layer's logits in float32 and weights in the compute dtype, if attention writes them to memory.

    Args:
      backends: those of `attention_backends`.
      rows: of one device, each with `tokens` queries over `slots` slots.
    """
    if REFERENCE not in backends:
        return 0
    return (4 + itemsize) * rows * local_heads(config, current())[0] * tokens * slots


def chunk_length(
    config: LlamaConfig,
    target: Target,
    dtype: DTypeLike,
    *,
    batch: int,
    prompt: int,
    capacity: int,
    cache_dtype: DTypeLike | None = None,
) -> int:
    """Prompt tokens per prefill call on the mesh in use; divides the padded prompt length.

    Args:
      dtype: that the model computes in; `cache_dtype`: of keys and values, the same by default.
      batch: rows of the program over all devices.
      prompt: padded length; capacity: slots of a row's cache.

    Raises:
      KernelError: a backend named by the user cannot run this.
    """
    rows, itemsize = share("batch", batch), jnp.dtype(dtype).itemsize
    chunk = min(prompt, buckets.MAX_CHUNK)

    def too_much() -> bool:
        # Finding out the backend takes a moment, so it is done only if the reference would write too much.
        if written_bytes((REFERENCE,), config, itemsize, rows, chunk, capacity) <= ATTENTION_BYTES:
            return False
        shape = {"rows": rows, "tokens": chunk, "capacity": capacity}
        return REFERENCE in attention_backends(config, target, dtype, **shape, cache_dtype=cache_dtype)

    while chunk % 2 == 0 and chunk > SHORTEST and too_much():
        chunk //= 2
    return chunk
