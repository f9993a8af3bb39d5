"""The rest of products whose numbers differ from the weights: for each group a shift, times the sum of its inputs.

It is added once, after the loop. In the loop these sums would be products with ones, as many as those with codes. Their
input would be in another order than that of codes, and therefore no longer be loaded ahead on NVIDIA's GPUs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from llama_jax.kernels.pallas import dot, next_power_of_2
from llama_jax.kernels.quantized_matmul.operands import Weight

NUMBERS = 4096
"""Numbers of the input that a program adds up at once, for a single row."""
SHIFTS = 2048
"""Shifts that it multiplies with their sums at once."""
GROUPS = 32
"""Groups that a product of shifts and sums is over, for several rows."""


class RowShifts(NamedTuple):
    """The shifts for a single row of the input, whose sums each program computes.

    Attributes:
      weight: with rows that may be folded.
      x: the input, [fold, groups, group].
      added: by how much the numbers exceed the codes.
    """

    weight: Weight
    x: jax.Array
    added: int

    @property
    def arrays(self) -> tuple[jax.Array | None, ...]:
        """Arrays that the kernel reads."""
        return self.x, self.weight.scales, self.weight.offsets

    def of(self, refs: Any, row: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
        """[n / fold, 1], of rows [n] of the weight, for the groups that begin at numbers `first` to `last` of a row."""
        fold, groups, group = self.x.shape
        width = max(min(next_power_of_2(groups), NUMBERS // (fold * group), SHIFTS // len(row)), 1)
        x_ref, *others = refs
        first, last = -(-first // group), jnp.minimum(-(-last // group), groups)

        def some(i: jax.Array, total: jax.Array) -> jax.Array:
            at = i * width + jnp.arange(width, dtype=jnp.int32)
            real = None if groups % width == 0 else at < groups
            where = _axis(fold, 0), at[None, :, None], _axis(group, 2)
            mask = None if real is None else jnp.broadcast_to(real[None, :, None], (fold, width, group))
            numbers = plgpu.load(x_ref.at[where], mask=mask, other=None if real is None else 0)
            sums = jnp.where(((at >= first) & (at < last))[None, :], jnp.sum(numbers.astype(jnp.float32), axis=2), 0.0)
            products = _shift(self.weight, others, row, at, real, self.added).reshape(-1, fold, width) * sums[None]
            return total + jnp.sum(jnp.sum(products, axis=2), axis=1)

        zero = jnp.zeros(len(row) // fold, jnp.float32)
        return jax.lax.fori_loop(first // width, -(-last // width), some, zero)[:, None]


class Shifts(NamedTuple):
    """The shifts for several rows of the input, whose sums XLA computes.

    Attributes:
      weight: as above.
      sums: bfloat16 [2, rows, groups], `_halves` of them.
    """

    weight: Weight
    sums: jax.Array

    @property
    def arrays(self) -> tuple[jax.Array | None, ...]:
        """Arrays that the kernel reads."""
        return self.sums, self.weight.scales, self.weight.offsets

    def of(self, refs: Any, row: jax.Array, inputs: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
        """[n, m]: as `RowShifts.of`, without folding, for rows [m] of the input."""
        groups = self.sums.shape[2]
        assert self.weight.layout.group is not None
        sums_ref, *others = refs
        first, last = (-(-number // self.weight.layout.group) for number in (first, last))

        def some(i: jax.Array, total: jax.Array) -> jax.Array:
            at = i * GROUPS + jnp.arange(GROUPS, dtype=jnp.int32)
            inside = (at >= first) & (at < jnp.minimum(last, groups))
            real = None if groups % GROUPS == 0 else at < groups
            where = inputs[:, None], at[None, :]
            sums = [plgpu.load(sums_ref.at[n, *where], mask=inside[None, :], other=0.0) for n in range(2)]
            shifts = _halves(_shift(self.weight, others, row, at, real, 0))
            pairs = ((0, 0), (0, 1), (1, 0))
            return total + sum(dot(shifts[m], sums[n], transpose_b=True) for m, n in pairs)

        zero = jnp.zeros((len(row), len(inputs)), jnp.float32)
        return jax.lax.fori_loop(first // GROUPS, -(-jnp.minimum(last, groups) // GROUPS), some, zero)


def shifts_of(weight: Weight, x: jax.Array, fold: int, added: int, *, several: bool) -> RowShifts | Shifts | None:
    """The shifts of a weight in groups; None where the loop adds them up.

    Args:
      weight, x: with rows that are folded.
      added: by how much the numbers of codes exceed them.
      several: whether those of several rows are kept out of the loop too. `added` is 0 then.
    """
    group = weight.layout.group
    if group is None:
        return None
    if len(x) == fold:
        return RowShifts(weight, x.reshape(fold, -1, group), added)
    if not several:
        return None
    sums = jnp.sum(x.reshape(len(x), -1, group).astype(jnp.float32), axis=-1)
    # Not by converting there and back, as in the kernel: XLA may keep the excess precision, and the rest would be 0.
    upper = jax.lax.reduce_precision(sums, exponent_bits=8, mantissa_bits=7)
    return Shifts(weight, jnp.stack([upper, sums - upper]).astype(jnp.bfloat16))


def _halves(x: jax.Array) -> list[jax.Array]:
    """float32 as two bfloat16, which add up to it but for a hundred-thousandth."""
    upper = x.astype(jnp.bfloat16)
    return [upper, (x - upper.astype(jnp.float32)).astype(jnp.bfloat16)]


def _axis(n: int, axis: int) -> jax.Array:
    """0 to n - 1 along one of three axes."""
    return jnp.arange(n, dtype=jnp.int32).reshape([n if k == axis else 1 for k in range(3)])


def _shift(
    weight: Weight, refs: list[Any], row: jax.Array, group: jax.Array, real: jax.Array | None, added: int
) -> jax.Array:
    """float32 [n, m] of rows [n] and groups [m], of which some may not be `real`; refs of scales, and of offsets or
    None."""
    at, mask = (row[:, None], group[None, :]), None if real is None else real[None, :]
    other = None if real is None else 0
    scale, offset = (
        None if ref is None else plgpu.load(ref.at[at], mask=mask, other=other).astype(jnp.float32) for ref in refs
    )
    assert scale is not None
    if offset is None:
        return -added * scale
    shift = weight.shift(scale, offset)
    return shift - added * scale if added else shift
