"""Adapters in slots as real models have them: to compile for every target, and to measure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

Kind = Literal["qkv", "gate", "one"]
"""Queries, keys and values, of which each may have slots; gate and up with their activation; one projection."""


@dataclass(frozen=True)
class LoraShape:
    """One call of `llama_jax.kernels.lora.add_lora`.

    Attributes:
      out: columns of one projection; of queries, keys and values those of a head.
      slots: with slot 0.
      heads: key/value heads, and query heads of each.
      targets: which of queries, keys and values have slots.
    """

    kind: Kind
    rows: int
    inner: int
    out: int
    slots: int = 9
    rank: int = 16
    heads: tuple[int, int] = (1, 1)
    targets: tuple[int, ...] = (0, 1, 2)
    dtype: str = "bfloat16"
    static: dict[str, Any] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        group = self.heads[1]
        parts: tuple[tuple[int, int], ...] = ((0, 1),)
        if self.kind == "qkv":
            parts = tuple(((0, group), (group, group + 1), (group + 1, group + 2))[n] for n in self.targets)
        elif self.kind == "gate":
            parts = ((0, 1), (1, 2))
        static = {"parts": parts, "activation": jax.nn.silu if self.kind == "gate" else None}
        object.__setattr__(self, "static", static)

    @property
    def name(self) -> str:
        """Such as "gate 14336x4096 s9 r16, 64 rows"."""
        size = f"{self.out}x{self.inner}"
        if self.kind == "qkv":
            size = f"h{self.heads[0] * self.heads[1]} kv{self.heads[0]} d{size}"
            size += "" if len(self.targets) == 3 else f" of {'qkv'[self.targets[0]]}{'qkv'[self.targets[-1]]}"
        other = "" if self.dtype == "bfloat16" else f", {self.dtype}"
        return f"{self.kind} {size} s{self.slots} r{self.rank}, {self.rows} rows{other}"

    def shape(self) -> tuple[int, ...]:
        """That of a token's projections."""
        if self.kind == "qkv":
            return self.heads[0], self.heads[1] + 2, self.out
        return 2 if self.kind == "gate" else 1, self.out

    def columns(self) -> list[int]:
        """Of each projection that has slots."""
        heads = self.heads[0] if self.kind == "qkv" else 1
        return [heads * (last - first) * self.out for first, last in self.static["parts"]]

    def example(self, key: jax.Array) -> dict[str, Any]:
        """Random arrays for a call; every third token has no adapter, or a slot that does not exist."""
        keys = jax.random.split(key, 3)
        made = {
            "out": jax.random.normal(keys[0], (self.rows, *self.shape()), self.dtype),
            "x": jax.random.normal(keys[1], (self.rows, self.inner), self.dtype),
            "ids": jnp.arange(1, self.rows + 1, dtype=jnp.int32) * 5 % (self.slots + self.slots // 2),
        }
        for n, size in enumerate(self.columns()):
            ka, kb = jax.random.split(jax.random.fold_in(keys[2], n))
            made[f"a{n}"] = (jax.random.normal(ka, (self.slots, self.rank, self.inner)) * self.inner**-0.5).astype(
                self.dtype
            )
            made[f"b{n}"] = jax.random.normal(kb, (self.slots, self.rank, size), self.dtype)
            made[f"scale{n}"] = 0.1 * (1.0 + jnp.arange(self.slots, dtype=jnp.float32))
        return made

    def bytes(self) -> int:
        """Slots in use, the input, and what is read and written of the projections."""
        width = jnp.dtype(self.dtype).itemsize
        used = min(self.slots - 1, self.rows)
        sizes = self.columns()
        weights = used * self.rank * sum(self.inner + size for size in sizes)
        return width * (weights + self.rows * (self.inner + 2 * sum(sizes)))


MEASURED = tuple(
    shape
    for rows in (1, 64, 256)
    for shape in (
        LoraShape("qkv", rows, 4096, 128, heads=(8, 4)),
        LoraShape("one", rows, 4096, 4096),
        LoraShape("gate", rows, 4096, 14336),
        LoraShape("one", rows, 14336, 4096),
    )
)
"""Steps of Llama 3.1 8B with eight adapters."""
SHAPES = (
    *MEASURED,
    LoraShape("qkv", 64, 4096, 128, heads=(8, 4), targets=(0, 2)),
    LoraShape("qkv", 8, 8192, 128, heads=(8, 8), slots=5, rank=64),  # Llama 3.1 70B
    LoraShape("one", 64, 8192, 2048, slots=33, rank=8),
    LoraShape("gate", 8, 576, 1536, slots=3, rank=8),  # SmolLM2 135M
    LoraShape("qkv", 8, 576, 64, heads=(3, 3), slots=3, rank=8),
    LoraShape("one", 64, 4096, 4096, dtype="float16"),
)
"""The shapes that the kernels are compiled for."""
