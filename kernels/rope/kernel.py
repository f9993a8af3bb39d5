"""The kernels: a program rotates the queries of one key/value head of one token, and stores its key and value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llama_jax.kernels.pallas import MIN_CONTRACTION, dot, next_power_of_2

LARGEST = 127


@dataclass(frozen=True)
class Shape:
    """The static part of a call.

    Attributes:
      length: tokens of a row; group: queries of a key/value head.
      entries, slots: of the cache: rows, or pages, and slots of each.
      paged: whether a token's page follows its slot in the arguments.
    """

    length: int
    group: int
    head_dim: int
    entries: int
    slots: int
    interleaved: bool
    paged: bool
    interpret: bool

    @property
    def half(self) -> int:
        return self.head_dim // 2

    def _columns(self) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
        """Of a tile with one number of each pair: of angles, of the first and the second number, and which are real."""
        column = jnp.arange(next_power_of_2(self.half), dtype=jnp.int32)
        pair = (2 * column, 2 * column + 1) if self.interleaved else (column, column + self.half)
        return column, *pair, None if len(column) == self.half else column < self.half

    def _place(self, token: jax.Array, slot_ref: Any, page_ref: Any) -> tuple[Any, Any, Any]:
        """Entry and slot of a token, and whether there is such an entry (None: there is)."""
        if page_ref is None:
            at = token % self.length
            # As a `dynamic_update_slice` does, which never writes beyond the end.
            return token // self.length, jnp.minimum(slot_ref[0], self.slots - self.length) + at, None
        entry = page_ref[token]
        exists = entry < self.entries
        return (jnp.minimum(entry, self.entries - 1) if self.interpret else entry), slot_ref[token], exists

    def plain(self) -> Callable[..., None]:
        """For a cache of numbers."""

        def rope_and_store(qkv_ref: Any, cos_ref: Any, sin_ref: Any, slot_ref: Any, *refs: Any) -> None:
            page_ref, (_, _, q_out, k_out, v_out) = (refs[0], refs[1:]) if self.paged else (None, refs)
            token, head, dtype = pl.program_id(0), pl.program_id(1), qkv_ref.dtype
            column, first, second, inside = self._columns()
            row = jnp.arange(next_power_of_2(self.group), dtype=jnp.int32)
            real = None if len(row) == self.group else (row < self.group)[:, None]
            if inside is not None:
                real = inside[None, :] if real is None else real & inside[None, :]
            real = None if real is None else jnp.broadcast_to(real, (len(row), len(column)))

            # All loads are issued before the first wait.
            queries = [_load(qkv_ref.at[token, head, row[:, None], c[None, :]], real) for c in (first, second)]
            key, value = (
                [_load(qkv_ref.at[token, head, part, c], inside) for c in (first, second)]
                for part in (self.group, self.group + 1)
            )
            cos, sin = (_load(ref.at[token, column], inside) for ref in (cos_ref, sin_ref))
            entry, into, exists = self._place(token, slot_ref, page_ref)
            there = inside
            if exists is not None:
                exists = jnp.broadcast_to(exists, column.shape)
                there = exists if inside is None else exists & inside

            for c, numbers in zip((first, second), _rotated(queries, cos, sin), strict=True):
                plgpu.store(q_out.at[token, head, row[:, None], c[None, :]], numbers.astype(dtype), mask=real)
            key = [x.astype(dtype) for x in _rotated(key, cos, sin)]
            for ref, pair in ((k_out, key), (v_out, value)):
                for c, numbers in zip((first, second), pair, strict=True):
                    plgpu.store(ref.at[entry, head, into, c], numbers.astype(ref.dtype), mask=there)

        return rope_and_store

    def coded(self) -> Callable[..., None]:
        """For a cache of codes of eight bits, as `coding.encoded` makes them.

        A Hadamard matrix H of n numbers is made of that of half as many, h: x H is (a h + b h, a h - b h) for the two
        halves of x, and likewise for every second number of it.
        """

        def rope_and_store_codes(qkv_ref: Any, cos_ref: Any, sin_ref: Any, slot_ref: Any, *refs: Any) -> None:
            page_ref, refs = (refs[0], refs[1:]) if self.paged else (None, refs)
            signs_ref, *_, q_out, k_out, v_out, k_scale_out, v_scale_out = refs
            token, head, dtype = pl.program_id(0), pl.program_id(1), qkv_ref.dtype
            column, first, second, _ = self._columns()
            row = jnp.arange(max(next_power_of_2(self.group + 2), MIN_CONTRACTION), dtype=jnp.int32)
            tile = (len(row), len(column))
            real = jnp.broadcast_to((row < self.group + 2)[:, None], tile)
            a, b = (_load(qkv_ref.at[token, head, row[:, None], c[None, :]], real) for c in (first, second))
            signs = plgpu.load(signs_ref.at[column[:, None], column[None, :]])
            cos, sin = (plgpu.load(ref.at[token, column]) for ref in (cos_ref, sin_ref))
            entry, into, exists = self._place(token, slot_ref, page_ref)
            turned = [dot(x.astype(dtype), signs) for x in _rotated([a, b], cos, sin)]
            turned = [turned[0] + turned[1], turned[0] - turned[1]]
            queries = jnp.broadcast_to((row < self.group)[:, None], tile)
            for c, numbers in zip((first, second), turned, strict=True):
                at = q_out.at[token, head, row[:, None], c[None, :]]
                plgpu.store(at, (numbers / self.head_dim).astype(dtype), mask=queries)

            def of_row(which: int, tiles: list[jax.Array]) -> list[jax.Array]:
                return [jnp.sum(jnp.where((row == which)[:, None], x, 0.0), axis=0) for x in tiles]

            key = of_row(self.group, turned)
            value = of_row(self.group + 1, [x.astype(jnp.float32) for x in (a, b)])
            there = None if exists is None else jnp.broadcast_to(exists, column.shape)
            for pair, out, scale_out in ((key, k_out, k_scale_out), (value, v_out, v_scale_out)):
                largest = jnp.maximum(jnp.max(jnp.abs(pair[0])), jnp.max(jnp.abs(pair[1])))
                scale = (largest / LARGEST).astype(scale_out.dtype)
                step = scale.astype(jnp.float32)
                step = jnp.where(step == 0, 1.0, step)
                for c, numbers in zip((first, second), pair, strict=True):
                    codes = jnp.clip(_rounded(numbers / step), -LARGEST, LARGEST).astype(out.dtype)
                    plgpu.store(out.at[entry, head, into, c], codes, mask=there)
                one = jnp.zeros((1,), jnp.int32)
                exist = None if exists is None else jnp.broadcast_to(exists, (1,))
                plgpu.store(scale_out.at[entry, head, into + one], jnp.broadcast_to(scale, (1,)), mask=exist)

        return rope_and_store_codes


def _load(ref: Any, mask: jax.Array | None) -> jax.Array:
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0)


def _rounded(x: jax.Array) -> jax.Array:
    """To the nearest, ties to even, which Pallas' Triton has no operation for."""
    up = jnp.floor(x + 0.5)
    odd = up - 2 * jnp.floor(up / 2)
    return jnp.where(up - x == 0.5, up - odd, up)


def _rotated(pair: list[jax.Array], cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pairs of numbers, turned by their angles, in float32."""
    a, b = (x.astype(jnp.float32) for x in pair)
    return a * cos - b * sin, b * cos + a * sin
