"""Routed experts of real models: shapes to test, compile and measure with, and the least that each must cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclass(frozen=True)
class MoeShape:
    """The routed experts of one layer.

    Attributes:
      experts, top_k: all of them, and those of one token.
      hidden, intermediate: width of a token, and inside of an expert.
      scaled: "input" or "output" of the experts, which the router's weights multiply.
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    scaled: str

    @property
    def name(self) -> str:
        """Such as "e8k2h4096i14336": experts, those of a token, hidden and intermediate size."""
        return f"e{self.experts}k{self.top_k}h{self.hidden}i{self.intermediate}"

    def arguments(self, tokens: int, dtype: DTypeLike = jnp.bfloat16) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of a call of `routed_experts`."""
        struct = jax.ShapeDtypeStruct
        rows = (tokens, self.top_k)
        return {
            "x": struct((tokens, self.hidden), dtype),
            "expert_ids": struct(rows, jnp.int32),
            "gate": struct((self.experts, self.intermediate, self.hidden), dtype),
            "up": struct((self.experts, self.intermediate, self.hidden), dtype),
            "down": struct((self.experts, self.hidden, self.intermediate), dtype),
            f"{self.scaled}_scale": struct(rows, jnp.float32),
        }

    def example(self, key: jax.Array, tokens: int, dtype: DTypeLike = jnp.bfloat16) -> dict[str, jax.Array]:
        """Random arrays for a call; each token's experts differ, as a router chooses them."""

        def normal(name: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            # In the dtype itself: a float32 copy of the weights of 128 experts would not fit.
            width = shape[-1] ** -0.5 if name in ("gate", "up", "down") else 1.0
            return jax.random.normal(keys[name], shape, dtype) * jnp.asarray(width, dtype)

        shapes = self.arguments(tokens, dtype)
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        logits = jax.random.uniform(keys["expert_ids"], (tokens, self.experts))
        made = {name: normal(name, s.shape, s.dtype) for name, s in shapes.items() if name != "expert_ids"}
        return made | {"expert_ids": jax.lax.top_k(logits, self.top_k)[1].astype(jnp.int32)}

    def flops(self, tokens: int) -> int:
        """Floating point operations: a multiplication and an addition for each weight of each pair."""
        return 6 * tokens * self.top_k * self.hidden * self.intermediate

    def read_bytes(self, touched: int, itemsize: int = 2) -> int:
        """Bytes of the weights of `touched` experts, each read once; what tokens add to them is left out."""
        return 3 * touched * self.hidden * self.intermediate * itemsize

    def expected_experts(self, tokens: int) -> float:
        """Experts that some token goes to, on average, where all are equally likely."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)

    def floor_seconds(
        self, tokens: int, touched: float, bandwidth: float, flops_rate: float, itemsize: int = 2
    ) -> float:
        """The least time on a device: reading the experts, or computing, whichever is longer.

        Args:
          touched: experts that some token goes to.
          bandwidth: bytes a second. flops_rate: dense operations a second in the weights' dtype.
        """
        return max(self.read_bytes(1, itemsize) * touched / bandwidth, self.flops(tokens) / flops_rate)


SHAPES = (
    MoeShape(8, 2, 4096, 14336, "output"),  # Mixtral 8x7B (config.json of mistralai/Mixtral-8x7B-v0.1)
    MoeShape(8, 2, 6144, 16384, "output"),  # Mixtral 8x22B (mistralai/Mixtral-8x22B-v0.1)
    MoeShape(16, 1, 5120, 8192, "input"),  # Llama 4 Scout (meta-llama/Llama-4-Scout-17B-16E)
    MoeShape(128, 1, 5120, 8192, "input"),  # Llama 4 Maverick (meta-llama/Llama-4-Maverick-17B-128E)
)

DECODE_TOKENS = (1, 8, 64)
PREFILL_TOKENS = (512, 4096)
