"""Quantised types of GGUF files that a layout of `llama_jax.quantized` holds as they are.

A block of 32 numbers (`block_q4_0`, `block_q4_1`, `block_q8_0` in ggml/src/ggml-common.h of llama.cpp) begins with its
scale in float16, of Q4_1 followed by its minimum. Codes of four bits follow in 16 bytes: number i in the low half of
byte i, number i + 16 in its high half.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llama_jax.quantized import Layout, layout_named
from llama_jax.quantized.layout import pack_codes

_NAMES = {2: "int4_g32", 3: "int4_g32_min", 8: "int8_g32"}
"""Number of a GGML type (Q4_0, Q4_1, Q8_0) to the name of its layout."""


def layout_of(kind: int) -> Layout | None:
    """The layout that holds a GGML type; None for one that is decoded."""
    return layout_named(_NAMES[kind]) if kind in _NAMES else None


def members(raw: np.ndarray, kind: int) -> Mapping[str, np.ndarray]:
    """Members of a matrix in the layout of its type.

    Args:
      raw: [rows, bytes of a row] uint8, as in the file.
      kind: number of the GGML type, one that `layout_of` knows.
    """
    layout = layout_of(kind)
    assert layout is not None and layout.group is not None
    sized = 4 if layout.offset else 2
    blocks = raw.reshape(len(raw), -1, sized + layout.group // layout.per_byte)
    numbers = np.ascontiguousarray(blocks[..., :sized]).view("<f2")
    stored = blocks[..., sized:]
    if layout.kind == "int4":
        unsigned = np.concatenate([stored & 15, stored >> 4], axis=-1)
        codes = pack_codes(unsigned.astype(np.int8) - 8)
    else:
        codes = stored.view(np.int8)
    found = {layout.name: codes.reshape(len(raw), -1), "scales": np.ascontiguousarray(numbers[..., 0])}
    return found | ({"minima": np.ascontiguousarray(numbers[..., 1])} if layout.offset else {})
