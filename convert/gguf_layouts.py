"""Quantised types of GGUF files that a layout of `llama_jax.quantized` holds as they are.

Blocks are those of ggml/src/ggml-common.h of llama.cpp. One of 32 numbers (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0) begins with
its scale in float16, perhaps followed by its minimum; one of 256 (the K types) has a scale, and perhaps one of minima,
for the small integers that are the scales and minima of its groups. Products of the two are kept in float32, which
holds them exactly. The scale of 32 four-bit floats (MXFP4) is a power of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from llama_jax.checkpoint.source import BFLOAT16
from llama_jax.convert.quantized.codes import E2M1
from llama_jax.quantized import Layout, layout_named
from llama_jax.quantized.layout import OFFSETS, pack_codes

_Block = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Of blocks [n]: codes [n, numbers] uint8 (of Q8_0, Q6_K and MXFP4 signed, int8), scales [n, groups], and minima."""


EXACT = (2, 3, 8)
"""Types that are nothing but their layout, so that `blocks` can make them of it: Q4_0, Q4_1 and Q8_0."""


def layout_of(kind: int) -> Layout | None:
    """The layout that holds a GGML type; None for one that is decoded."""
    return layout_named(_TYPES[kind][0]) if kind in _TYPES else None


def members(raw: np.ndarray, kind: int) -> Mapping[str, np.ndarray]:
    """Members of a matrix in the layout of its type.

    Args:
      raw: [rows, bytes of a row] uint8, as in the file.
      kind: number of the GGML type, one that `layout_of` knows.
    """
    name, size, taken_apart, zero = _TYPES[kind]
    layout = layout_named(name)
    assert layout is not None
    with np.errstate(all="ignore"):  # scales of a damaged file; who wants finite weights asks for them
        codes, scales, minima = taken_apart(raw.reshape(-1, size))
    codes = codes.view(np.int8) - np.int8(zero)
    found = {layout.name: pack_codes(codes) if layout.kind == "int4" else codes, "scales": scales}
    if minima is not None:
        found[OFFSETS["min"]] = minima
    return {name: np.ascontiguousarray(member).reshape(len(raw), -1) for name, member in found.items()}


def blocks(members: Mapping[str, np.ndarray], kind: int) -> np.ndarray:
    """The inverse of `members`, for a type of `EXACT`; leading axes of a stack become rows."""
    layout = layout_of(kind)
    assert layout is not None
    floats = [members[name].reshape(-1, 1) for name in ("scales", *([OFFSETS["min"]] if layout.offset else ()))]
    if layout.kind == "int4":
        packed = members[layout.name].reshape(len(floats[0]), -1) ^ 0x88  # which adds 8 to both codes
        numbers = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), 2, -1)
        codes = numbers[:, 0] | numbers[:, 1] << 4
    else:
        codes = members[layout.name].reshape(len(floats[0]), -1).view(np.uint8)
    raw = np.concatenate([*(each.astype("<f2").view(np.uint8) for each in floats), codes], axis=-1)
    rows = math.prod(members["scales"].shape[:-1])
    return raw.reshape(rows, -1)


def _floats(block: np.ndarray, first: int, count: int) -> np.ndarray:
    """[n, count] float16 from byte `first` on."""
    return np.ascontiguousarray(block[:, first : first + 2 * count]).view("<f2")


def _halves(packed: np.ndarray) -> np.ndarray:
    """[n, bytes] to [n, 2 * bytes]: numbers of four bits, all low halves first."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _bits(packed: np.ndarray, width: int, run: int) -> np.ndarray:
    """Numbers of `width` bits: of each run of bytes first all lowest bits, then the next.

    Args:
      packed: [n, bytes] uint8.

    Returns:
      [n, 8 / width * bytes].
    """
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    parts = packed.reshape(len(packed), -1, 1, run) >> shifts & np.uint8((1 << width) - 1)
    return parts.reshape(len(packed), -1)


def _q4_0(block: np.ndarray) -> _Block:
    return _halves(block[:, 2:]), _floats(block, 0, 1), None


def _q4_1(block: np.ndarray) -> _Block:
    return _halves(block[:, 4:]), _floats(block, 0, 1), _floats(block, 2, 1)


def _with_fifth_bits(packed: np.ndarray) -> np.ndarray:
    """Four bytes with the highest bit of number i in bit i, before 16 with the others."""
    high = np.unpackbits(packed[:, :4], axis=-1, bitorder="little")
    return _halves(packed[:, 4:]) | high << 4


def _q5_0(block: np.ndarray) -> _Block:
    return _with_fifth_bits(block[:, 2:]), _floats(block, 0, 1), None


def _q5_1(block: np.ndarray) -> _Block:
    return _with_fifth_bits(block[:, 4:]), _floats(block, 0, 1), _floats(block, 2, 1)


def _q8_0(block: np.ndarray) -> _Block:
    return block[:, 2:], _floats(block, 0, 1), None


def _products(floats: np.ndarray, small: np.ndarray) -> np.ndarray:
    """float16 [n, 1] times small integers [n, groups], in float32."""
    return floats.astype(np.float32) * small.astype(np.float32)


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima out of the 12 bytes of Q4_K and Q5_K: the upper two bits of the last four of each
    lie above the six of the first four."""
    first, second, third = (packed[:, at : at + 4] for at in (0, 4, 8))
    return (
        np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1),
        np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1),
    )


def _with_minima(block: np.ndarray, codes: np.ndarray) -> _Block:
    scales, minima = _six_bits(block[:, 4:16])
    return codes, _products(_floats(block, 0, 1), scales), -_products(_floats(block, 2, 1), minima)


def _q4_k(block: np.ndarray) -> _Block:
    return _with_minima(block, _bits(block[:, 16:], 4, 32))


def _q5_k(block: np.ndarray) -> _Block:
    return _with_minima(block, _bits(block[:, 48:], 4, 32) | _bits(block[:, 16:48], 1, 32) << 4)


def _q6_k(block: np.ndarray) -> _Block:
    codes = _bits(block[:, :128], 4, 64) | _bits(block[:, 128:192], 2, 32) << 4
    return codes, _products(_floats(block, 208, 1), block[:, 192:208].view(np.int8)), None


def _q2_k(block: np.ndarray) -> _Block:
    small = block[:, :16]
    scales, minima = _products(_floats(block, 80, 1), small & 15), _products(_floats(block, 82, 1), small >> 4)
    return _bits(block[:, 16:80], 2, 32), scales, -minima


def _q3_k(block: np.ndarray) -> _Block:
    codes = _bits(block[:, 32:96], 2, 32) | _bits(block[:, :32], 1, 32) << 2
    scales = _halves(block[:, 96:104]) | _bits(block[:, 104:108], 2, 4) << 4
    return codes, _products(_floats(block, 108, 1), scales.view(np.int8) - np.int8(32)), None


def _mxfp4(block: np.ndarray) -> _Block:
    scales = np.ldexp(np.float32(1), block[:, :1].astype(np.int32) - 128)
    return E2M1[_halves(block[:, 1:])], scales.astype(BFLOAT16), None


_TYPES: Mapping[int, tuple[str, int, Callable[[np.ndarray], _Block], int]] = MappingProxyType(
    {
        2: ("int4_g32", 18, _q4_0, 8),
        3: ("int4_g32_min", 20, _q4_1, 8),
        6: ("int8_g32", 22, _q5_0, 16),
        7: ("int8_g32_min", 24, _q5_1, 0),
        8: ("int8_g32", 34, _q8_0, 0),
        10: ("int4_g16_min_f32", 84, _q2_k, 8),
        11: ("int4_g16_f32", 110, _q3_k, 4),
        12: ("int4_g32_min_f32", 144, _q4_k, 8),
        13: ("int8_g32_min_f32", 176, _q5_k, 0),
        14: ("int8_g16_f32", 210, _q6_k, 32),
        39: ("int8_g32_bf16", 17, _mxfp4, 0),
    }
)
"""Number of a GGML type to the name of its layout, bytes of a block, what takes blocks apart, and the number that is
subtracted from its codes to store them."""
