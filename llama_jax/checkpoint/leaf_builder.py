"""Builds a leaf on its devices from consecutive rows, holding no more of it than necessary.

The rows of a tensor pass once through the host's memory. What a device keeps goes to that device; copies of the same
shard on several devices come from one read. On the CPU the buffer that the rows are read into becomes the device's own.
For other devices, and for a cast (which the device does), rows are gathered up to BLOCK_BYTES before they are sent.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.format import TensorInfo
from llama_jax.checkpoint.read import empty_aligned
from llama_jax.params import ParamSpec

type LeafSharding = jax.sharding.Sharding | jax.Device
"""The destination of a leaf."""
type Shardings = LeafSharding | Callable[[ParamSpec], LeafSharding] | None
"""One place for all leaves, or a function of the leaf; None is the default device."""

BLOCK_BYTES = 64 << 20
"""Bytes of rows that are gathered on the host before they are sent to a device."""
READ_BYTES = 8 << 20
"""Bytes of rows that are read at a time: small enough to stay in a processor's cache for the digest."""


@dataclass(frozen=True)
class Block:
    """The next rows of a tensor.

    Attributes:
      start: the first row.
      rows: [rows, ...], uninitialised; has to be filled if it is wanted.
      wanted: whether any device of this process keeps any of it.
    """

    start: int
    rows: np.ndarray
    wanted: bool


@dataclass
class _Shard:
    """One part of a leaf, and the devices of this process that keep it (None: the default device, uncommitted)."""

    box: tuple[tuple[int, int], ...]
    devices: list[jax.Device | None]
    step: int
    buffer: np.ndarray | None = None
    made: list[jax.Array] = field(default_factory=list)

    @property
    def rows(self) -> tuple[int, int]:
        return self.box[0]

    @property
    def columns(self) -> tuple[slice, ...]:
        return tuple(slice(*bounds) for bounds in self.box[1:])

    def cuts(self) -> set[int]:
        return {*range(*self.rows, self.step), self.rows[1]}

    def segment(self, row: int) -> tuple[int, int]:
        """The rows that are sent together with this one."""
        first, last = self.rows
        start = first + (row - first) // self.step * self.step
        return start, min(start + self.step, last)


class LeafBuilder:
    """Builds one leaf on the devices of this process.

    Args:
      info: shape and dtype in which the rows come.
      dtype: of the leaf; that of the rows when None.
      where: its place; the default device when None.
    """

    def __init__(self, info: TensorInfo, dtype: np.dtype | None, where: LeafSharding | None):
        self._info = info
        self._dtype = dtype
        self._sharding = jax.sharding.SingleDeviceSharding(where) if isinstance(where, jax.Device) else where
        self._row_bytes = info.nbytes // max(info.shape[0], 1)
        self._shards = self._find_shards()

    def blocks(self) -> Iterator[Block]:
        """Every row of the tensor, in order; a block has been consumed when the next one is requested."""
        cuts = sorted({0, self._info.shape[0]}.union(*(shard.cuts() for shard in self._shards)))
        step = max(1, READ_BYTES // max(self._row_bytes, 1))
        scratch: np.ndarray | None = None
        for begin, end in itertools.pairwise(cuts):
            takers = [shard for shard in self._shards if shard.rows[0] <= begin < shard.rows[1]]
            for shard in takers:
                if shard.buffer is None:
                    first, last = shard.segment(begin)
                    shard.buffer = self._empty((last - first, *(b - a for a, b in shard.box[1:])))
            # A single taker of whole rows has them read to where they stay.
            direct = takers[0] if len(takers) == 1 and takers[0].box[1:] == self._whole[1:] else None
            for start in range(begin, end, step):
                stop = min(start + step, end)
                if direct is not None and direct.buffer is not None:
                    origin = direct.segment(begin)[0]
                    yield Block(start, direct.buffer[start - origin : stop - origin], True)
                    continue
                if scratch is None:
                    scratch = self._empty((min(step, self._info.shape[0]), *self._info.shape[1:]))
                rows = scratch[: stop - start]
                yield Block(start, rows, bool(takers))
                for shard in takers:
                    assert shard.buffer is not None
                    origin = shard.segment(begin)[0]
                    _bits(shard.buffer)[start - origin : stop - origin] = _bits(rows)[(slice(None), *shard.columns)]
            for shard in takers:
                if shard.segment(begin)[1] == end:
                    self._send(shard, shard.segment(begin)[0])

    def result(self) -> jax.Array:
        """The finished leaf, after all blocks have been taken."""
        if self._sharding is None:
            return self._shards[0].made[0]
        parts = {device: part for s in self._shards for device, part in zip(s.devices, s.made, strict=True)}
        ordered = [parts[device] for device in self._sharding.addressable_devices_indices_map(self._info.shape)]
        dtype = self._dtype or jnp.dtype(self._info.dtype)
        return jax.make_array_from_single_device_arrays(self._info.shape, self._sharding, ordered, dtype=dtype)

    @property
    def _whole(self) -> tuple[tuple[int, int], ...]:
        return tuple((0, n) for n in self._info.shape)

    def _empty(self, shape: tuple[int, ...]) -> np.ndarray:
        return empty_aligned(TensorInfo(shape, self._info.dtype, ""))

    def _find_shards(self) -> list[_Shard]:
        shape = self._info.shape
        if self._sharding is None:
            boxes: dict[tuple[tuple[int, int], ...], list[jax.Device | None]] = {self._whole: [None]}
        else:
            boxes = {}
            for device, index in self._sharding.addressable_devices_indices_map(shape).items():
                box = tuple(part.indices(n)[:2] for part, n in zip(index or (), shape, strict=True))
                boxes.setdefault(box, []).append(device)
        return [_Shard(box, devices, self._step(box, devices)) for box, devices in boxes.items()]

    def _step(self, box: tuple[tuple[int, int], ...], devices: list[jax.Device | None]) -> int:
        """The number of a shard's rows that are sent together."""
        cast = self._dtype is not None and self._dtype.name != self._info.dtype
        on_cpu = all((d.platform if d is not None else jax.default_backend()) == "cpu" for d in devices)
        whole = max(1, box[0][1] - box[0][0])
        # The CPU's devices keep the host's buffer, so that sending it in pieces would only add copies.
        return whole if on_cpu and not cast else min(whole, max(1, BLOCK_BYTES // max(self._row_bytes, 1)))

    def _send(self, shard: _Shard, start: int) -> None:
        first, last = shard.rows
        pieces = [jax.device_put(shard.buffer, device) for device in shard.devices]
        dtype = self._dtype or pieces[0].dtype
        with _ONE_AT_A_TIME:
            if shard.step >= last - first:
                made = [piece if piece.dtype == dtype else piece.astype(dtype) for piece in pieces]
            else:
                shape = tuple(b - a for a, b in shard.box)
                leaves = shard.made or [jnp.zeros(shape, dtype, device=device) for device in shard.devices]
                made = [_write_rows(leaf, piece, start - first) for leaf, piece in zip(leaves, pieces, strict=True)]
        # The transfer has to end before the host's buffer counts as free.
        shard.made = jax.block_until_ready(made)
        shard.buffer = None


_ONE_AT_A_TIME = threading.Lock()
"""Held where a program is launched, and compiled the first time: when two threads compile the same small program for
one of several devices, jax 0.11 can crash (a segmentation fault in `_gspmd_to_single_device_sharding`)."""


@functools.partial(jax.jit, donate_argnums=0)
def _write_rows(leaf: jax.Array, rows: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice(leaf, rows.astype(leaf.dtype), (start, *(0,) * (leaf.ndim - 1)))


def _bits(array: np.ndarray) -> np.ndarray:
    """The same memory as integers, which numpy copies without holding the interpreter lock, unlike bfloat16."""
    return array.view(np.dtype(f"u{array.itemsize}"))


def host_bytes(nbytes: int) -> int:
    """Host memory that building a leaf of this many bytes takes, beside what stays resident."""
    return min(nbytes, 2 * BLOCK_BYTES)


def fill(block: Block, tensor: np.ndarray) -> None:
    """Fills a block from the whole tensor."""
    _bits(block.rows)[...] = _bits(tensor)[block.start : block.start + len(block.rows)]
