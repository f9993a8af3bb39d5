"""Rotations and cache writes as real models make them: to compile for every target, and to measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class RopeShape:
    """One call of `llama_jax.kernels.rope.rope_and_store`, one token a row.

    Attributes:
      page_size: of a paged cache; None of a dense one with 256 slots a row.
    """

    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int | None = None
    dtype: str = "bfloat16"
    interleaved: bool = False
    codes: bool = False

    @property
    def name(self) -> str:
        """Such as "h32 kv8 d128, 8 rows, paged"."""
        notes = ["paged"] * bool(self.page_size) + ["interleaved"] * self.interleaved + ["int8 cache"] * self.codes
        notes += [self.dtype] * (self.dtype != "bfloat16")
        return ", ".join([f"h{self.heads} kv{self.kv_heads} d{self.head_dim}", f"{self.rows} rows", *notes])

    def example(self, key: jax.Array) -> dict[str, Any]:
        """Random arrays for a call."""
        keys = jax.random.split(key, 3)
        parts = self.heads // self.kv_heads + 2
        angles = jax.random.uniform(keys[1], (self.rows, 1, self.head_dim // 2), jnp.float32, 0, 6.3)
        entries, slots = (self.rows, 256) if self.page_size is None else (2 * self.rows, self.page_size)
        cache = jax.random.normal(keys[2], (entries, self.kv_heads, slots, self.head_dim), self.dtype)
        row = jnp.arange(self.rows, dtype=jnp.int32)[:, None]
        places = {"slot": jnp.int32(17)}
        if self.page_size is not None:
            places = {"slot": row % self.page_size, "page": 2 * row + 1}
        return {
            "qkv": jax.random.normal(keys[0], (self.rows, 1, self.kv_heads, parts, self.head_dim), self.dtype),
            "cos": jnp.cos(angles),
            "sin": jnp.sin(angles),
            "k": cache.astype(jnp.int8) if self.codes else cache,
            "v": -cache.astype(jnp.int8) if self.codes else -cache,
            **(dict.fromkeys(("k_scale", "v_scale"), cache[..., 0]) if self.codes else {}),
            **places,
        }

    def bytes(self) -> int:
        """Queries, keys and values, read and written."""
        return 2 * self.rows * (self.heads + 2 * self.kv_heads) * self.head_dim * jnp.dtype(self.dtype).itemsize


ROWS = (1, 8, 64)
"""Decode steps."""
MODELS = ((32, 8, 128), (32, 8, 64), (64, 8, 128))
"""Heads, key/value heads and head_dim of Llama 3.1 8B, 3.2 1B, 3.1 70B."""
SHAPES = (
    *(RopeShape(rows, *model, page_size=size) for model in MODELS for rows in (1, 64) for size in (None, 64)),
    *(RopeShape(rows, *MODELS[0], size, codes=True) for rows in (1, 64) for size in (None, 64)),
    RopeShape(1, *MODELS[1], codes=True),
    RopeShape(8, 40, 8, 128, 64, interleaved=True, codes=True),
    RopeShape(8, 16, 8, 256, 64, codes=True),
    RopeShape(8, 9, 3, 64),  # SmolLM2 135M
    RopeShape(8, 8, 1, 128),  # of eight devices
    RopeShape(8, 40, 8, 128, interleaved=True),  # Llama 4 Scout
    RopeShape(8, 32, 32, 96, 64),
    RopeShape(8, 16, 8, 256, 64),
    RopeShape(64, 32, 8, 128, 64, "float16"),
    RopeShape(8, 32, 8, 128, 64, "float32"),
)
"""The shapes that the kernel is compiled for."""
