"""Products with quantised weights as real models make them: to compile for every target, and to measure."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llama_jax.quantized import Layout, layout_named


def layout_of(name: str) -> Layout:
    """The layout of that name, which exists."""
    layout = layout_named(name)
    assert layout is not None, name
    return layout


@dataclass(frozen=True)
class ProductShape:
    """One call of `llama_jax.kernels.quantized_matmul.quantized_matmul`: `rows` times a weight [out, inner]."""

    layout: str
    rows: int
    out: int
    inner: int
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """Such as "int4_g128 28672x4096, 1 rows"."""
        other = "" if self.dtype == "bfloat16" else f", {self.dtype}"
        return f"{self.layout} {self.out}x{self.inner}, {self.rows} rows{other}"

    def members(self, key: jax.Array) -> dict[str, jax.Array]:
        """A random weight with numbers of about 1/sqrt(inner)."""
        layout = layout_of(self.layout)
        keys = jax.random.split(key, 3)
        scales = (self.out,) if layout.group is None else (self.out, self.inner // layout.group)
        stored = (self.out, self.inner // layout.per_byte)
        size: float = self.inner**-0.5 / {"int8": 74, "int4": 4.6, "fp8": 1}[layout.kind]
        if layout.kind == "fp8":
            codes = jax.random.normal(keys[0], stored).astype(jnp.float8_e4m3fn)
        else:
            codes = jax.random.bits(keys[0], stored, jnp.uint8)
            codes = jnp.maximum(codes.astype(jnp.int8), -127) if layout.kind == "int8" else codes
        spread = jax.random.uniform(keys[1], scales, jnp.float32, 0.5 * size, 1.5 * size)
        made = {self.layout: codes, "scales": spread.astype(layout.scale_dtype)}
        if layout.offset == "min":
            minima = jax.random.uniform(keys[2], scales, jnp.float32, -8 * size, -7 * size)
            made["minima"] = minima.astype(layout.scale_dtype)
        if layout.offset == "zero":
            made["zeros"] = jax.random.randint(keys[2], scales, -3, 3, jnp.int8)
        return made

    def example(self, key: jax.Array) -> dict[str, jax.Array]:
        """Random arrays for a call."""
        keys = jax.random.split(key)
        return {"x": jax.random.normal(keys[0], (self.rows, self.inner), self.dtype), **self.members(keys[1])}

    @property
    def flops(self) -> int:
        """A multiplication and an addition for each weight of each row."""
        return 2 * self.rows * self.out * self.inner

    @property
    def bytes(self) -> int:
        """The weight and the input, read once, and the result."""
        made = jax.eval_shape(self.example, jax.random.key(0))
        written = self.rows * self.out * jnp.dtype(self.dtype).itemsize
        return sum(array.size * array.dtype.itemsize for array in made.values()) + written


ROWS = (1, 16, 64)
"""Decode steps of one text and of several."""
LLAMA_8B = ((28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096))
"""[out, in] of gate and up together, down, the three of attention together, and its output, of Llama 3.1 8B."""
MEASURED = (
    *(ProductShape(layout, rows, *size) for layout in ("int8", "int4_g128") for size in LLAMA_8B for rows in ROWS),
    *(ProductShape("int8", rows, 128256, 4096) for rows in ROWS),
)

SHAPES = (
    *MEASURED,
    ProductShape("int4_g64_min", 1, 28672, 4096),
    ProductShape("int4_g64_min", 16, 28672, 4096),
    ProductShape("int4_g128_zero", 1, 4096, 14336),
    ProductShape("int4_g128_zero", 64, 4096, 14336),
    ProductShape("int8_g32", 2, 4096, 4096),
    ProductShape("int4_g32_min", 1, 3072, 576),  # SmolLM2 135M
    ProductShape("int4_g32_min", 16, 576, 1536),
    ProductShape("int8_g32", 1, 49152, 576),
    ProductShape("int4_g64_min", 8, 57344, 8192),  # Llama 3.1 70B
    ProductShape("int8", 64, 4096, 4096, "float16"),
    ProductShape("int4_g64_min", 512, 4096, 14336),
    ProductShape("int4_g32", 512, 576, 1536),
)
"""Calls that the kernels are compiled for."""
