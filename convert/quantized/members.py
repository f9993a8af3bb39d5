"""Codes of other programs, laid out as the model computes with them."""

from __future__ import annotations

import numpy as np

from llama_jax.convert.quantized.codes import Codes
from llama_jax.quantized import Layout
from llama_jax.quantized.layout import ORDER, pack_codes


def members(codes: Codes, layout: Layout, order: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Members of a matrix in a layout that holds its codes: they decode to bitwise the same numbers.

    Unsigned codes and their zeros are taken less half of the layout's range, or less the zero of all of them where the
    layout stores none. Scales of blocks of several rows are repeated.

    Args:
      codes: of one matrix, of whose columns, in that order, each group is one block.
      layout, order: see `Scheme`.
    """
    rows, cols = codes.values.shape
    columns = 1 if layout.group is None else cols // layout.group

    def by_row(blocks: np.ndarray) -> np.ndarray:
        of_rows = blocks if len(blocks) == 1 else blocks[np.arange(rows) // codes.block[0]]
        spread = np.broadcast_to(of_rows, (rows, columns))
        return spread[:, 0] if layout.group is None else spread

    values, half = codes.values if order is None else codes.values[:, order], 0
    if values.dtype == np.uint8:
        half = 1 << (layout.bits - 1)
        if layout.offset is None and codes.zeros is not None:
            half = int(codes.zeros.flat[0])
        values = (values - np.uint8(half)).view(np.int8)
    stored = pack_codes(values) if layout.kind == "int4" else values
    found = {layout.name: stored, "scales": by_row(codes.scales).astype(layout.scale_dtype)}
    if layout.offset is not None:
        assert codes.zeros is not None
        found["zeros"] = (by_row(codes.zeros).astype(np.int16) - half).astype(np.int8)
    if order is not None:
        found[ORDER] = order
    return {name: np.ascontiguousarray(member) for name, member in found.items()}
