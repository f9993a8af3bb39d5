"""Scales and offsets of groups, as the loop of the kernel reads them: one number of each row and group in a step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from llama_jax.kernels.quantized_matmul.unpack import WORD, WORD_BYTES, halves


class Groups(NamedTuple):
    """The scales or the offsets of a weight.

    Two neighbours of 16 bits are read as one word. That halves the loads, and on NVIDIA's GPUs it keeps them ahead: the
    assembler packs a number of 16 bits into one register with a constant, so that the first use of the constant waits
    for the load.

    Attributes:
      array: [out, groups], or int32 [out, groups / 2].
      pair: groups in a number of `array`.
      dtype: of a scale.
    """

    array: jax.Array
    pair: int
    dtype: jnp.dtype

    @classmethod
    def of(cls, array: jax.Array, step: int) -> Groups:
        """Of [out, groups], for a loop of which each step has `step` groups."""
        pair = WORD_BYTES // 2 if array.dtype.itemsize == 2 and step % 2 == 0 == array.shape[1] % 2 else 1
        if pair > 1:
            words = jax.lax.bitcast_convert_type(array.reshape(len(array), -1, pair), WORD)
            return cls(words, pair, array.dtype)
        return cls(array, pair, array.dtype)

    def vectors(self, groups: int) -> int:
        """The number of loads that `groups` groups take."""
        return groups // self.pair

    def load(self, ref: Any, row: jax.Array, first: jax.Array, groups: int) -> list[jax.Array]:
        """Numbers of `groups` neighbours from `first`, for rows [n]; past the end, of the last group."""
        start, last = first // self.pair if self.pair > 1 else first, self.array.shape[1] - 1
        return [plgpu.load(ref.at[row, jnp.minimum(start + k, last)]) for k in range(self.vectors(groups))]

    def group(self, loaded: list[jax.Array], k: int) -> jax.Array:
        """The k-th group of what was loaded: [n]."""
        number = loaded[k // self.pair]
        return number if self.pair == 1 else jax.lax.bitcast_convert_type(halves(number)[k % self.pair], self.dtype)
