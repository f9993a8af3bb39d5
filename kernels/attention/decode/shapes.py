"""Shapes of decode attention in real models, for tests, the compilation sweep and the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.attention.reference import Visibility


@dataclass(frozen=True)
class Case:
    """One call of decode attention.

    Attributes:
      slots: of each row's cache, all of them visible unless the window is smaller.
      queries: tokens a row: 1, or more where drafts are verified.
      page_size: 0 for a dense cache.
      window: of sliding attention, 0 for full attention.
      bench: whether the benchmark runs it.
    """

    name: str
    batch: int
    slots: int
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    queries: int = 1
    page_size: int = 0
    window: int = 0
    dtype: str = "bfloat16"
    bench: bool = False

    @property
    def visibility(self) -> Visibility:
        return Visibility("sliding", self.window) if self.window else Visibility()

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def bytes_read(self) -> int:
        """Keys and values that a call must read."""
        seen = min(self.slots, self.window + self.queries - 1) if self.window else self.slots
        return 2 * self.batch * seen * self.kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The shapes of the operation's arrays: q, k, v, q_positions, kv_positions, and page_table by name."""
        dtype, int32 = jnp.dtype(self.dtype), jnp.int32
        cache = (self.batch, self.kv_heads, self.slots, self.head_dim)
        named = {}
        if self.page_size:
            pages = self.slots // self.page_size
            cache = (self.batch * pages, self.kv_heads, self.page_size, self.head_dim)
            named["page_table"] = jax.ShapeDtypeStruct((self.batch, pages), int32)
        q = jax.ShapeDtypeStruct((self.batch, self.queries, self.q_heads, self.head_dim), dtype)
        k = jax.ShapeDtypeStruct(cache, dtype)
        q_positions = jax.ShapeDtypeStruct((self.batch, self.queries), int32)
        kv_positions = jax.ShapeDtypeStruct((self.batch, self.slots), int32)
        return (q, k, k, q_positions, kv_positions), named


_LONG = ((8, 4096), (64, 4096), (1, 32768), (1, 131072))


def _bench(name: str, head_dim: int) -> tuple[Case, ...]:
    return tuple(
        Case(
            f"{name}-b{batch}-{slots // 1024}k{f'-paged{page}' if page else ''}",
            batch,
            slots,
            head_dim=head_dim,
            page_size=page,
            bench=True,
        )
        for batch, slots in _LONG
        for page in (0, 16, 128)
    )


CASES: tuple[Case, ...] = (
    *_bench("llama3-8b", 128),
    *_bench("llama3-1b", 64),
    Case("llama3-70b-tp8", 8, 4096, q_heads=8, kv_heads=1),
    Case("llama3-8b-drafts4", 8, 4096, queries=4, page_size=16),
    Case("llama3-8b-drafts8", 8, 4096, queries=8, page_size=128),
    Case("llama3-8b-float16", 8, 4096, dtype="float16", page_size=64),
    Case("mistral-7b", 8, 32768, window=4096),
    Case("smollm2-135m", 8, 2048, q_heads=9, kv_heads=3, head_dim=64),
    Case("phi-head80", 8, 2048, q_heads=32, kv_heads=32, head_dim=80),
    Case("head96-paged32", 8, 2048, q_heads=32, kv_heads=32, head_dim=96, page_size=32),
    Case("gemma-head256", 8, 8192, q_heads=16, kv_heads=8, head_dim=256, page_size=256),
    Case("gemma-head256-drafts8", 8, 8192, q_heads=16, kv_heads=8, head_dim=256, queries=8),
    Case("mqa-drafts8", 8, 2048, q_heads=16, kv_heads=1, queries=8, page_size=64),
)
