"""Matrix instructions: numbers put where AMD's documents say each lane holds them, against numpy's product."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from amd.assembly import Machine, isa, rows, v
from amd.emulator import Fault, NotModelled
from amd.emulator.operands import Registers

# name, M = N, K, blocks, element, bits of an element
SHAPES = [
    ("v_mfma_f32_32x32x8_bf16", 32, 8, 1, ml_dtypes.bfloat16),
    ("v_mfma_f32_16x16x16_bf16", 16, 16, 1, ml_dtypes.bfloat16),
    ("v_mfma_f32_32x32x16_bf16", 32, 16, 1, ml_dtypes.bfloat16),
    ("v_mfma_f32_16x16x32_bf16", 16, 32, 1, ml_dtypes.bfloat16),
    ("v_mfma_f32_32x32x4_2b_bf16", 32, 4, 2, ml_dtypes.bfloat16),
    ("v_mfma_f32_16x16x4_4b_bf16", 16, 4, 4, ml_dtypes.bfloat16),
    ("v_mfma_f32_4x4x4_16b_bf16", 4, 4, 16, ml_dtypes.bfloat16),
    ("v_mfma_f32_32x32x8_f16", 32, 8, 1, np.float16),
    ("v_mfma_f32_16x16x16_f16", 16, 16, 1, np.float16),
    ("v_mfma_f32_32x32x16_f16", 32, 16, 1, np.float16),
    ("v_mfma_f32_16x16x32_f16", 16, 32, 1, np.float16),
    ("v_mfma_f32_4x4x4_16b_f16", 4, 4, 16, np.float16),
    ("v_mfma_f32_32x32x2_f32", 32, 2, 1, np.float32),
    ("v_mfma_f32_16x16x4_f32", 16, 4, 1, np.float32),
    ("v_mfma_f32_32x32x1_2b_f32", 32, 1, 2, np.float32),
    ("v_mfma_f32_4x4x1_16b_f32", 4, 1, 16, np.float32),
    ("v_mfma_f32_32x32x4_xf32", 32, 4, 1, np.float32),
    ("v_mfma_i32_32x32x16_i8", 32, 16, 1, np.int8),
    ("v_mfma_i32_16x16x32_i8", 16, 32, 1, np.int8),
    ("v_mfma_i32_32x32x32_i8", 32, 32, 1, np.int8),
    ("v_mfma_f32_32x32x16_fp8_fp8", 32, 16, 1, "FP8"),
    ("v_mfma_f32_16x16x32_fp8_fp8", 16, 32, 1, "FP8"),
    ("v_mfma_f32_16x16x32_bf8_bf8", 16, 32, 1, "BF8"),
]
FLOAT8 = {
    "gfx942": {"FP8": ml_dtypes.float8_e4m3fnuz, "BF8": ml_dtypes.float8_e5m2fnuz},
    "gfx950": {"FP8": ml_dtypes.float8_e4m3fn, "BF8": ml_dtypes.float8_e5m2},
}


def lanes_of(matrix: np.ndarray) -> np.ndarray:
    """[blocks, rows, K] as words [registers, 64]: lane = row + rows * (block, or which K), K consecutive in a lane."""
    blocks, rows, k = matrix.shape
    per_lane = k * rows * blocks // 64
    out = np.zeros((64, per_lane), matrix.dtype)
    for lane in range(64):
        row, rest = lane % rows, lane // rows
        block, group = (rest, 0) if blocks > 1 else (0, rest)
        out[lane] = matrix[block, row, group * per_lane : (group + 1) * per_lane]
    return out.view(np.uint32).reshape(64, -1).T


def result_places(size: int, blocks: int) -> list[tuple[int, int, int, int, int]]:
    """(register, lane, block, row, column) of every element of a result."""
    places = []
    for register in range(size * size * blocks // 64):
        for lane in range(64):
            if size == 4:
                places.append((register, lane, lane // 4, register, lane % 4))
                continue
            per_block = size * size // 64
            block, inside = divmod(register, per_block)
            row = 8 * (inside // 4) + 4 * (lane // 32) + inside % 4 if size == 32 else 4 * (lane // 16) + inside
            places.append((register, lane, block, row, lane % size))
    return places


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize(("name", "size", "k", "blocks", "of"), SHAPES, ids=[shape[0] for shape in SHAPES])
def test_layout_and_product(name: str, size: int, k: int, blocks: int, of: Any, arch: str) -> None:
    dtype = FLOAT8[arch][of] if isinstance(of, str) else of
    rng = np.random.default_rng(size * k + blocks)
    if dtype is np.int8:
        a, b = (rng.integers(-128, 128, (blocks, size, k)).astype(np.int8) for _ in range(2))
        c = rng.integers(-1000, 1000, (blocks, size, size)).astype(np.int32)
    else:
        a, b = (rng.standard_normal((blocks, size, k)).astype(dtype) for _ in range(2))
        c = rng.standard_normal((blocks, size, size)).astype(np.float32)
    places = result_places(size, blocks)
    registers = size * size * blocks // 64
    added = np.zeros((registers, 64), c.dtype)
    for register, lane, block, row, column in places:
        added[register, lane] = c[block, row, column]
    left, right = lanes_of(a), lanes_of(b)
    vectors = dict(enumerate(left)) | {16 + k: x for k, x in enumerate(right)}
    vectors |= {32 + k: x for k, x in enumerate(added.view(np.uint32))}
    code = getattr(isa, name)(
        rows(80, registers), rows(0, len(left)), rows(16, len(right)), rows(32, registers), **unpacked(name)
    )
    w = Machine(vectors=vectors, arch=arch, registers=Registers(128, 0)).run(code)
    exact = np.float64 if c.dtype == np.float32 else np.int64
    want = np.einsum("bmk,bnk->bmn", a.astype(exact), b.astype(exact)) + c
    got = np.zeros_like(c)
    for register, lane, block, row, column in places:
        got[block, row, column] = w.v[80 + register, 0, lane : lane + 1].view(c.dtype)[0]
    if exact is np.int64:
        np.testing.assert_array_equal(got, want)
    else:
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def unpacked(name: str) -> dict[str, int]:
    """tinygrad takes xfloat32 for a packed operation and would set modifiers that mean something else here."""
    return {"opsel_hi": 0, "opsel_hi2": 0} if name.endswith("xf32") else {}


def square(registers: np.ndarray) -> np.ndarray:
    """A 16 x 16 result from its four registers [4, 64]."""
    return registers.reshape(4, 4, 16).transpose(1, 0, 2).reshape(16, 16)


def test_accumulation_registers_and_constants() -> None:
    """A and C in accumulation registers, and 0 or 1.0 as C."""
    x = np.arange(16 * 4, dtype=np.float32).reshape(1, 16, 4)
    words = lanes_of(x)[0]
    product = x[0] @ x[0].T
    m = Machine(vectors={1: words, 256 + 1: words, 256 + 8: 1.0, 256 + 9: 1.0, 256 + 10: 1.0, 256 + 11: 1.0})
    w = m.run(isa.v_mfma_f32_16x16x4_f32(v[8:11], v[1], v[1], v[8:11], acc=1, acc_cd=1))
    np.testing.assert_allclose(square(w.f[64 + 8 : 64 + 12, 0]), product + 1)
    w = m.run(isa.v_mfma_f32_16x16x4_f32(v[8:11], v[1], v[1], 1.0))
    np.testing.assert_allclose(square(w.f[8:12, 0]), product + 1)
    w = m.run(isa.v_accvgpr_read(v[20], v[1]), isa.v_accvgpr_write(v[30], 2.0))
    np.testing.assert_array_equal(w.v[20, 0], words)
    assert (w.f[64 + 30, 0] == 2.0).all()


def test_what_is_refused() -> None:
    with pytest.raises(Fault, match="lanes off"):
        Machine(exec=1).run(isa.v_mfma_f32_16x16x4_f32(v[8:11], v[1], v[1], 0))
    with pytest.raises(NotModelled, match="broadcast"):
        Machine().run(isa.v_mfma_f32_16x16x4_f32(v[8:11], v[1], v[1], 0, cbsz=1))
    with pytest.raises(NotModelled, match="V_SMFMAC"):
        Machine().run(isa.v_smfmac_f32_16x16x32_bf16(v[8:11], v[0:1], v[4:7], v[2]))
