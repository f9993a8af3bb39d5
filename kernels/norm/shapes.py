"""Sums and norms as real models make them: to compile for every target, and to measure."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class NormShape:
    """One call of `llama_jax.kernels.norm.add_rms_norm`: `rows` tokens of `hidden` numbers."""

    rows: int
    hidden: int
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """Such as "h4096, 64 rows"."""
        other = "" if self.dtype == "bfloat16" else f", {self.dtype}"
        return f"h{self.hidden}, {self.rows} rows{other}"

    def example(self, key: jax.Array) -> dict[str, jax.Array]:
        """Random arrays for a call."""
        keys = jax.random.split(key, 3)
        wide = (self.rows, self.hidden)
        return {
            "x": jax.random.normal(keys[0], wide, self.dtype),
            "delta": jax.random.normal(keys[1], wide, self.dtype),
            "weight": jax.random.uniform(keys[2], (self.hidden,), jnp.float32, 0.5, 1.5).astype(self.dtype),
        }

    def bytes(self) -> int:
        """Two arrays read and two written, and the weight: what bounds the call's time from below."""
        return (4 * self.rows + 1) * self.hidden * jnp.dtype(self.dtype).itemsize


ROWS = (1, 8, 64, 4096)
"""Decode steps and a prefill."""
MEASURED = tuple(NormShape(rows, hidden) for hidden in (2048, 4096, 8192) for rows in ROWS)
"""Llama 3.2 1B, 3.1 8B, 3.1 70B."""

SHAPES = (
    *(shape for shape in MEASURED if shape.rows != 8),
    NormShape(64, 576),  # SmolLM2 135M
    NormShape(4096, 576),
    NormShape(64, 5120),  # Llama 4 Scout, Llama 2 13B
    NormShape(1, 16384),  # Llama 3.1 405B
    NormShape(4096, 16384),
    NormShape(64, 4096, "float16"),
    NormShape(64, 4096, "float32"),
    NormShape(4096, 4096, "float32"),
)
"""The shapes that the kernel is compiled for."""
