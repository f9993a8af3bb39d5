"""Fused products as real models make them: to compile for every target, and to measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from llama_jax.kernels.quantized_matmul.operands import SQUARED
from llama_jax.kernels.quantized_matmul.shapes import ProductShape, layout_of
from llama_jax.quantized import Layout

Place = Literal["norm", "gate", "add"]
"""Behind a norm; behind a norm and before an activation; before a residual sum."""


@dataclass(frozen=True)
class FusedShape:
    """One call of `llama_jax.kernels.quantized_matmul.fused.fused_matmul`.

    Attributes:
      layout: a name, or "plain".
      out: rows of the weight, gates and others together.
    """

    place: Place
    layout: str
    rows: int
    out: int
    inner: int

    @property
    def name(self) -> str:
        """Such as "gate int4_g128 28672x4096, 1 rows"."""
        return f"{self.place} {self.layout} {self.out}x{self.inner}, {self.rows} rows"

    def members(self, key: jax.Array) -> dict[str, jax.Array]:
        """A random weight with numbers of about 1/sqrt(inner)."""
        if self.layout == "plain":
            made = {"weight": jax.random.normal(key, (self.out, self.inner), jnp.bfloat16) * self.inner**-0.5}
        else:
            made = ProductShape(self.layout, self.rows, self.out, self.inner).members(key)
        half = (2, self.out // 2) if self.place == "gate" else (self.out,)
        return {name: x.reshape(*half, *x.shape[1:]) for name, x in made.items()}

    def around(self, key: jax.Array) -> dict[str, jax.Array]:
        """Random arrays of what is beside the product."""
        keys = jax.random.split(key)
        if self.place == "add":
            gain = jax.random.uniform(keys[1], (self.out,), jnp.float32, 0.5, 1.5).astype(jnp.bfloat16)
            return {"residual": jax.random.normal(keys[0], (self.rows, self.out), jnp.bfloat16), "gain": gain}
        n = self.inner // SQUARED
        return {"squares": jax.random.uniform(keys[0], (self.rows, n), jnp.float32, 0, 2 * SQUARED)}

    def example(self, key: jax.Array) -> dict[str, jax.Array]:
        """Random arrays for a call."""
        keys = jax.random.split(key, 3)
        x = jax.random.normal(keys[0], (self.rows, self.inner), jnp.bfloat16)
        return {"x": x, **self.members(keys[1]), **self.around(keys[2])}

    @property
    def static(self) -> dict[str, Any]:
        """The other arguments."""
        layout: Layout | None = None if self.layout == "plain" else layout_of(self.layout)
        more: dict[str, Any] = {} if self.place == "add" else {"eps": 1e-5}
        return {"layout": layout, **more, **({"activation": jax.nn.silu} if self.place == "gate" else {})}

    @property
    def flops(self) -> int:
        """A multiplication and an addition for each weight of each row."""
        return 2 * self.rows * self.out * self.inner

    @property
    def bytes(self) -> int:
        """All that is read once, and the results."""
        made = jax.eval_shape(self.example, jax.random.key(0))
        return sum(array.size * array.dtype.itemsize for array in made.values()) + 2 * self.rows * self.out


LLAMA_8B: tuple[tuple[Place, int, int], ...] = (
    ("gate", 28672, 4096),
    ("add", 4096, 14336),
    ("norm", 6144, 4096),
    ("add", 4096, 4096),
)
LLAMA_1B: tuple[tuple[Place, int, int], ...] = (
    ("gate", 16384, 2048),
    ("add", 2048, 8192),
    ("norm", 3072, 2048),
    ("add", 2048, 2048),
)
"""The four products of a layer, of Llama 3.1 8B and Llama 3.2 1B."""

SHAPES = (
    *(FusedShape(place, layout, 1, *size) for layout in ("int4_g128", "int8", "plain") for place, *size in LLAMA_8B),
    *(FusedShape(place, layout, 8, *size) for layout in ("int4_g128", "plain") for place, *size in LLAMA_8B[:2]),
    *(FusedShape(place, "plain", 1, *size) for place, *size in LLAMA_1B),
    FusedShape("gate", "int4_g64_min", 1, 28672, 4096),
    FusedShape("add", "int4_g64_min", 1, 4096, 14336),
    FusedShape("norm", "int4_g32_min", 1, 960, 576),  # SmolLM2 135M
    FusedShape("gate", "int8", 16, 28672, 4096),
)
"""Calls that the kernel is compiled for."""
