"""Quantised keys and values in kernels: codes become numbers of a product, exactly, and scales factors beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.kernels.attention import assembly, float8
from llama_jax.kernels.attention.records import KeysValues
from llama_jax.kernels.pallas import Index, dot, load_row, load_tile, store_tile, tile_width
from llama_jax.targets import Target, current


class Parts(NamedTuple):
    """The parts of a head whose numbers are in one array each, once codes are numbers: two halves where a byte holds
    two codes, else one.

    Attributes:
      number: of parts; each: numbers of one.
    """

    number: int
    each: int

    @classmethod
    def of(cls, x: Any, head_dim: int) -> Parts:
        """For keys or values [..., numbers or bytes of a head]."""
        return cls(head_dim // x.shape[-1], x.shape[-1])

    @property
    def width(self) -> int:
        """Columns of a tile with a part."""
        return tile_width(self.each)

    def split(self, x: jax.Array) -> jax.Array:
        """[..., head_dim] as [..., parts, each]."""
        return x.reshape(*x.shape[:-1], *self)

    def load(self, ref: Any, index: Index, valid: jax.Array | None = None) -> list[jax.Array]:
        """A tile of each part of what `split` gives."""
        return [load_tile(ref, (*index, part), self.width, valid) for part in range(self.number)]

    def store(self, ref: Any, index: Index, tiles: Iterable[jax.Array], valid: jax.Array) -> None:
        """Writes a tile of each part into what is shaped as `split` gives it."""
        for part, tile in enumerate(tiles):
            store_tile(ref, (*index, part), tile, valid)


def _upper(x: jax.Array) -> jax.Array:
    """float32 numbers that bfloat16 holds, in bfloat16: the upper half is an operation, where rounding takes five
    (`pallas.rounds_to_bfloat16`)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    upper = jax.lax.shift_right_logical(bits, jnp.full_like(bits, 16)).astype(jnp.int16)
    return jax.lax.bitcast_convert_type(upper, jnp.bfloat16)


def _parts(tile: jax.Array, given: Any, dtype: DTypeLike) -> list[jax.Array]:
    """`records.numbers` of a tile of codes in the dtype `given`, by `Parts`."""
    if given.name in float8.FLAVOURS:
        return [float8.widened(tile, given, dtype)]
    codes = [tile]
    if tile.dtype == jnp.uint8:
        wide = tile.astype(jnp.int32)
        codes = [2 * half - 15 for half in (wide & 15, wide >> 4)]
    if jnp.dtype(dtype) != jnp.bfloat16:
        return [x.astype(dtype) for x in codes]
    return [_upper(x.astype(jnp.float32)) for x in codes]


@dataclass(frozen=True)
class Decoder:
    """The way a kernel decodes codes to numbers, and scales to factors.

    Attributes:
      dtype: of products; unit: what numbers are divided by.
      by_assembly: by NVIDIA's instructions (`assembly`).
      apart: in a loop of one turn. Triton hands codes to all waves and has each convert all of them, which doubles the
        instructions of attention. It moves nothing out of a loop: there each wave converts what it has loaded. Where
        steps of the loop around overlap, that loop may hold no other.
    """

    dtype: DTypeLike
    unit: int
    by_assembly: bool
    apart: bool

    @classmethod
    def of(cls, kv: KeysValues, dtype: DTypeLike, *, num_warps: int, num_stages: int, interpret: bool) -> Decoder:
        """For a call on the current target, and queries in `dtype`."""
        by_assembly = kv.quantised and jnp.dtype(dtype) == jnp.bfloat16 and not interpret
        by_assembly = by_assembly and current().vendor == "nvidia"
        apart = kv.quantised and not by_assembly and num_warps > 1 and num_stages == 1
        made = assembly.made_of(kv.k.dtype) if by_assembly else assembly.Made(dtype, 1)
        return cls(*made, by_assembly, apart)

    def numbers(self, tile: jax.Array, given: DTypeLike, block: jax.Array) -> list[jax.Array]:
        """A tile of keys or values [slots, columns] in the dtype of products, by `Parts`.

        Args:
          given: the dtype of keys or values, of which the tile has the `float8.bits`.
          block: a number >= 0 of which the compiler knows no more.
        """
        given = jnp.dtype(given)
        if given.itemsize > 1:
            return [tile.astype(self.dtype)]
        if self.by_assembly:
            return assembly.numbers(tile, given)
        if not self.apart:
            return _parts(tile, given, self.dtype)
        nothing = [jnp.zeros(tile.shape, self.dtype)] * (2 if tile.dtype == jnp.uint8 else 1)
        return jax.lax.fori_loop(0, jnp.minimum(block + 1, 1), lambda *_: _parts(tile, given, self.dtype), nothing)

    def scales(self, ref: Any, index: Index, valid: jax.Array | None) -> jax.Array | None:
        """float32 [slots], factors on the numbers of the slots at `index`, zeros where not valid; None without any."""
        if ref is None:
            return None
        return self.factors(load_row(ref, index, valid, 0.0))

    def factors(self, scales: jax.Array) -> jax.Array:
        """Scales as float32 factors on the numbers of `numbers`."""
        return scales.astype(jnp.float32) * self.unit


def products(queries: Sequence[jax.Array], keys: Sequence[jax.Array]) -> jax.Array:
    """float32 [queries, slots], of tiles of queries and keys by parts."""
    first, *others = (dot(*pair, transpose_b=True) for pair in zip(queries, keys, strict=True))
    return sum(others, first)


def scaled(x: jax.Array, scales: jax.Array | None) -> jax.Array:
    """Logits or weights [rows, slots] times the scales of their slots' keys or values, if they have any."""
    return x if scales is None else x * scales[None, :]


def lacks(kv: KeysValues, head_dim: int, target: Target) -> str | None:
    """The reason why kernels with such codes do not fit a target; None if they do."""
    if (lack := float8.lacks(kv.k.dtype, target)) is not None:
        return lack
    if kv.quantised and target.arch.startswith("gfx11") and head_dim > 128:
        return f"with codes of head_dim {head_dim} {target.arch} would spill registers"
    return None
