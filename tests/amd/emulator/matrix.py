"""Matrix instructions: D = A B + C on tiles that lie spread over the lanes of a wave.

Lane layouts: AMD's matrix instruction calculator (github.com/ROCm/amd_matrix_instruction_calculator) and CDNA3 ISA,
chapter 7. With M rows of A, N columns of B and `blocks` independent products:
  A: lane = row + M * (block or K group); a lane holds consecutive K. B likewise, with columns.
  C, D: lane = column + N * h; a lane's registers are rows 4 at a time: row = 4 * (h + 64 / N * a) + c.
Products are exact and summed in float32 by numpy in an order of its own; the hardware's order is not documented.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from amd.emulator.errors import Fault, NotModelled
from amd.emulator.float8 import FLOAT8
from amd.emulator.instruction import Instruction
from amd.emulator.numerics import U16, Array, F, I, U
from amd.emulator.operands import Registers, Step, is_vector, scalar
from amd.emulator.waves import Waves


@dataclass(frozen=True)
class Shape:
    """M x N x K of each of `blocks` products."""

    m: int
    n: int
    k: int
    blocks: int

    @classmethod
    def of(cls, name: str) -> tuple[Shape, list[str]]:
        """Shape and element types (of A and of B) in a name such as V_MFMA_F32_32X32X4_2B_BF16."""
        parts = name.split("_")
        m, n, k = (int(size) for size in parts[3].split("X"))
        rest = parts[4:]
        blocks = int(rest.pop(0)[:-1]) if rest[0][:-1].isdigit() and rest[0].endswith("B") else 1
        return cls(m, n, k, blocks), rest * 2 if len(rest) == 1 else rest


def _elements(kind: str, arch: str) -> tuple[int, Callable[[Array], Array]]:
    """Elements in a register, and registers [regs, waves, 64] to [regs * elements, waves, 64] as float32 or int32."""

    def split(words: Array, count: int) -> Array:
        bits = 32 // count
        pieces = [words >> U(bits * k) & U((1 << bits) - 1) for k in range(count)]
        return np.stack(pieces, 1).reshape(-1, *words.shape[1:])

    if kind in ("F32", "XF32"):
        return 1, lambda words: words.view(F)
    if kind == "BF16":
        return 2, lambda words: (split(words, 2) << U(16)).view(F)
    if kind == "F16":
        return 2, lambda words: split(words, 2).astype(U16).view(np.float16).astype(F)
    if kind == "I8":
        return 4, lambda words: split(words, 4).astype(np.uint8).view(np.int8).astype(I)
    if kind in FLOAT8.get(arch, {}):
        of = FLOAT8[arch][kind]
        return 4, lambda words: split(words, 4).astype(np.uint8).view(of).astype(F)
    raise NotModelled(f"matrix elements of type {kind} on {arch}")


def tiles(values: Array, rows: int, shape: Shape) -> Array:
    """A (or B) [K a lane, waves, 64] to [waves, blocks, rows, K]."""
    per_lane, n, _ = values.shape
    groups = 64 // (rows * shape.blocks)
    # The lane is row + rows * (block + blocks * group); only one of the last two is ever more than 1.
    split = values.reshape(per_lane, n, groups, shape.blocks, rows)
    return split.transpose(1, 3, 4, 2, 0).reshape(n, shape.blocks, rows, groups * per_lane)


def spread_rows(product: Array, shape: Shape) -> Array:
    """D [waves, blocks, M, N] to [registers, waves, 64]."""
    n = product.shape[0]
    if shape.m == 4:  # lane = column + 4 * block
        return product.transpose(2, 0, 1, 3).reshape(4, n, 64)
    h = 64 // shape.n
    split = product.reshape(n, shape.blocks, shape.m // (4 * h), h, 4, shape.n)
    return split.transpose(1, 2, 4, 0, 3, 5).reshape(-1, n, 64)


def mfma(x: Instruction, registers: Registers, arch: str) -> Step:
    """Dense matrix instructions on float32, xfloat32, bfloat16, float16, int8 and float8."""
    if not x.name.startswith("V_MFMA_") or "F8F6F4" in x.name or "F64" in x.name or "SCALE" in x.name:
        raise NotModelled(x.name)
    if x.field("cbsz") or x.field("abid") or x.field("blgp"):
        raise NotModelled(f"{x.name} with broadcast or permuted blocks")
    shape, kinds = Shape.of(x.name)
    (per_a, of_a), (per_b, of_b) = (_elements(kind, arch) for kind in kinds)
    per_lane = shape.k * shape.m * shape.blocks // 64
    result = shape.m * shape.n * shape.blocks // 64
    accumulators = x.field("acc")
    a = registers.index(x.field("src0") - 256, per_lane // per_a, accumulation=bool(accumulators & 1))
    b = registers.index(x.field("src1") - 256, per_lane // per_b, accumulation=bool(accumulators & 2))
    in_accumulators = bool(x.field("acc_cd"))
    d = registers.index(x.field("vdst"), result, accumulation=in_accumulators)
    c = x.field("src2")
    integer = kinds[0] == "I8"
    number = I if integer else F
    if is_vector(c):
        row = registers.index(c - 256, result, accumulation=in_accumulators)
        added: Callable[[Waves], Array] = lambda w: w.v[row : row + result].view(number)  # noqa: E731
    else:
        constant = scalar(c, "i" if integer else "f")
        added = lambda w: np.asarray(constant(w)).reshape(1, -1, 1)  # noqa: E731

    def step(w: Waves) -> None:
        if w.lanes() is not None:
            raise Fault("matrix instruction with lanes off")
        left = tiles(of_a(w.v[a : a + per_lane // per_a]), shape.m, shape)
        right = tiles(of_b(w.v[b : b + per_lane // per_b]), shape.n, shape)
        product = spread_rows(left @ right.swapaxes(2, 3), shape)
        np.add(product, added(w), out=w.v[d : d + result].view(number))

    return step
