"""Calls of decode attention as real models make them: to test, to compile for every target, and to measure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.attention.records import Visibility

FULL = Visibility()


@dataclass(frozen=True)
class Case:
    """One call of `llama_jax.kernels.attention.decode_attention`.

    Attributes:
      q_len: queries of a row, its last tokens; kv_len: slots of a row, all filled.
      page_size: slots of a page; 0: rows, not pages.
      sinks: whether the call has them.
    """

    name: str
    batch: int
    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    visibility: Visibility = FULL
    dtype: str = "bfloat16"
    page_size: int = 0
    soft_cap: float | None = None
    sinks: bool = False

    def arguments(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The array arguments of the call, by name."""

        def struct(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        slots = (self.batch, self.kv_heads, self.kv_len)
        if self.page_size:
            slots = (self.batch * self.kv_len // self.page_size, self.kv_heads, self.page_size)
        made = {
            "q": struct(self.batch, self.q_len, self.q_heads, self.head_dim, dtype=self.dtype),
            "k": struct(*slots, self.head_dim, dtype=self.dtype),
            "v": struct(*slots, self.head_dim, dtype=self.dtype),
            "q_positions": struct(self.batch, self.q_len),
            "kv_positions": struct(self.batch, self.kv_len),
        }
        if self.sinks:
            made["sinks"] = struct(self.q_heads, dtype=jnp.float32)
        if self.page_size:
            made["page_table"] = struct(self.batch, self.kv_len // self.page_size)
        return made

    def options(self) -> dict[str, Any]:
        """The other arguments, by name."""
        return {"visibility": self.visibility, "scale": self.head_dim**-0.5, "soft_cap": self.soft_cap}

    def example(self, key: jax.Array) -> dict[str, jax.Array]:
        """Arrays for a call: random numbers, consecutive positions, pages in any order."""
        made = {}
        for name, struct in self.arguments().items():
            key, own = jax.random.split(key)
            if jnp.issubdtype(struct.dtype, jnp.floating):
                made[name] = jax.random.normal(own, struct.shape, struct.dtype)
            elif name == "page_table":
                pages = jax.random.permutation(own, math.prod(struct.shape))
                made[name] = pages.reshape(struct.shape).astype(jnp.int32)
            else:
                slots = jnp.arange(self.kv_len, dtype=jnp.int32)[-struct.shape[1] :]
                made[name] = jnp.broadcast_to(slots, struct.shape)
        return made

    def bytes(self) -> int:
        """Bytes of the keys and values that the queries see, each once: what bounds the call's time from below."""
        first, window = self.kv_len - self.q_len, self.visibility.window
        unseen = {"full": 0, "sliding": first - window + 1, "chunked": first // max(window, 1) * window}
        seen = self.kv_len - max(unseen[self.visibility.kind], 0)
        return 2 * self.batch * seen * self.kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize


def _measured(model: str, q_heads: int, kv_heads: int, head_dim: int) -> tuple[Case, ...]:
    return tuple(
        Case(
            f"{model}-b{batch}-s{kv_len}{f'-paged-{page}' if page else ''}",
            *(batch, 1, kv_len, q_heads, kv_heads, head_dim),
            page_size=page,
        )
        for batch, kv_len in ((8, 4096), (64, 4096), (1, 32768), (1, 131072))
        for page in (0, 16, 128)
    )


MEASURED = (*_measured("llama-3.1-8b", 32, 8, 128), *_measured("llama-3.2-1b", 32, 8, 64))
"""One token a row over long caches, dense and paged: to measure."""

CASES = (
    *(case for case in MEASURED if case.batch == 8 or case.kv_len == 131072),
    Case("llama-3.1-8b-drafts-4", 8, 4, 4096, 32, 8, 128, page_size=16),
    Case("llama-3.1-8b-drafts-8", 8, 8, 4096, 32, 8, 128, page_size=128),
    Case("llama-3.1-8b-f16", 8, 1, 4096, 32, 8, 128, dtype="float16", page_size=64),
    Case("llama-3.1-8b-f32", 2, 1, 1024, 32, 8, 128, dtype="float32"),
    Case("llama-3.1-70b-one-of-8", 8, 1, 4096, 8, 1, 128, page_size=256),
    Case("heads-40-8-chunked-8192", 1, 1, 16384, 40, 8, 128, visibility=Visibility("chunked", 8192), page_size=32),
    Case("llama-3.1-8b-window-4096", 8, 1, 8192, 32, 8, 128, visibility=Visibility("sliding", 4096)),
    Case("heads-9-3", 8, 1, 2048, 9, 3, 64),
    Case("phi-2-heads", 8, 1, 2048, 32, 32, 80),
    Case("phi-3-mini-heads", 8, 1, 4096, 32, 32, 96, page_size=64),
    Case("gemma-2-9b-heads", 8, 1, 8192, 16, 8, 256, visibility=Visibility("sliding", 4096), soft_cap=50.0),
    Case("gemma-2-9b-heads-drafts-8", 8, 8, 8192, 16, 8, 256, page_size=64, soft_cap=50.0),
    Case("gpt-oss-20b-heads", 8, 1, 4096, 64, 8, 64, visibility=Visibility("sliding", 128), sinks=True, page_size=16),
    Case("one-kv-head-drafts-8", 8, 8, 2048, 16, 1, 128, page_size=64),
)
"""What the kernels are compiled for. Names with "heads" are the head shapes of models of other families."""
