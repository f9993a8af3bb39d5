"""Helpers of all Pallas-Triton kernels: one way to launch, tiles addressed by rows and columns, powers of two."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from llama_jax.errors import KernelError
from llama_jax.kernels.precision import matmul_precision
from llama_jax.targets import Target

MAX_ELEMENTS = 2**31 - 1
"""The most elements of an array that a kernel addresses: Pallas-Triton computes offsets in 32 bits."""

MIN_CONTRACTION = 16
"""The fewest numbers that a product of tiles may sum over. For shorter 16-bit sums Triton silently gives wrong results
on NVIDIA GPUs (seen on an H100); one rule holds for all dtypes and targets."""

Index = tuple[int | jax.Array, ...]
"""Indices of a tile's rows in all axes but the last: numbers, and vectors with one number per row."""


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def tile_width(n: int) -> int:
    """The columns of a tile that holds n: a power of two that products may sum over. `load_tile` fills it up."""
    return max(next_power_of_2(n), MIN_CONTRACTION)


def launch(
    kernel: Callable[..., None],
    *args: Any,
    grid: tuple[int, ...],
    out: Any,
    num_warps: int,
    num_stages: int,
    interpret: bool,
) -> Any:
    """Runs `kernel` once for each point of `grid`; it gets whole arrays by reference, `args` before `out`.

    Args:
      kernel: its `__name__` is the name that the compiled kernel has in profiles.
      out: tree of ShapeDtypeStruct. None in `args` or `out` reaches the kernel as None.
      num_warps, num_stages: waves of a work-group, and steps of a loop that overlap.
      interpret: runs the kernel as plain JAX operations, on any device.
    """
    # Said at every lowering. The seam in kernels/ is what prepares for the removal; users cannot act on it.
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    params = plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    return pl.pallas_call(kernel, grid=grid, out_shape=out, compiler_params=params, interpret=interpret)(*args)


def _address(ref: Any, index: Index, first: int, width: int, valid: jax.Array | None) -> tuple[Any, Any]:
    columns = first + jnp.arange(width, dtype=jnp.int32)[None, :]
    where = tuple(i[:, None] if isinstance(i, jax.Array) and i.ndim else i for i in index)
    mask = None if valid is None else valid[:, None]
    if first + width > ref.shape[-1]:
        inside = columns < ref.shape[-1]
        mask = inside if mask is None else mask & inside
    return ref.at[(*where, columns)], mask


def load_row(ref: Any, index: Index, valid: jax.Array | None, other: float) -> jax.Array:
    """[n] of ref[index], where one of `index` is a vector [n]; `other` where not valid (None: all are)."""
    return plgpu.load(ref.at[index], mask=valid, other=None if valid is None else other)


def load_tile(ref: Any, index: Index, width: int, valid: jax.Array | None = None, *, first: int = 0) -> jax.Array:
    """[rows, width] of ref[*index, first:]: zeros in columns that `ref` lacks, and in rows that are not valid."""
    at, mask = _address(ref, index, first, width, valid)
    return plgpu.load(at, mask=mask, other=None if mask is None else 0)


def store_tile(ref: Any, index: Index, tile: jax.Array, valid: jax.Array | None = None) -> None:
    """Writes what `load_tile` would read, in ref's dtype: the valid rows, and the columns that `ref` has."""
    at, mask = _address(ref, index, 0, tile.shape[1], valid)
    plgpu.store(at, tile.astype(ref.dtype), mask=mask)


def rounds_to_bfloat16(target: Target) -> bool:
    """Returns whether one instruction rounds float32 to bfloat16 there. CDNA 3 and older, and RDNA, take five."""
    return target.vendor == "nvidia" or target.arch == "gfx950"


def narrow(x: jax.Array, dtype: DTypeLike, *, by_hand: bool) -> jax.Array:
    """float32 `x` in a narrower dtype.

    Args:
      by_hand: to bfloat16 in two integer operations, ties away from zero: half a loop's conversions on targets where
        `rounds_to_bfloat16` is false. Infinities stay what they are; of NaN only those with all bits set do not.
    """
    if not by_hand or jnp.dtype(dtype) != jnp.bfloat16:
        return x.astype(dtype)
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) + 0x8000
    upper = jax.lax.shift_right_logical(bits, jnp.full_like(bits, 16)).astype(jnp.int16)
    return jax.lax.bitcast_convert_type(upper, jnp.bfloat16)


def dot(a: jax.Array, b: jax.Array, *, transpose_b: bool = False) -> jax.Array:
    """float32 product of two tiles of one dtype, by the matrix units.

    Raises:
      KernelError: it sums over fewer than `MIN_CONTRACTION` numbers.
    """
    if a.shape[1] < MIN_CONTRACTION:
        raise KernelError(
            f"a kernel's product sums over {a.shape[1]} numbers; fewer than {MIN_CONTRACTION} compile to wrong results",
            hint=f"make every block of the tiles at least {MIN_CONTRACTION}, or leave them to default_tiles",
        )
    contract = (((1,), (1 if transpose_b else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, contract, precision=matmul_precision(a.dtype), preferred_element_type=jnp.float32)
