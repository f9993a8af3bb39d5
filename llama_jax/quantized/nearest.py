"""Round to nearest: the codes of a weight without any data."""

from __future__ import annotations

from functools import partial

import jax

from llama_jax.quantized.grid import by_group, members, nearest, spanning
from llama_jax.quantized.layout import Layout


@partial(jax.jit, static_argnums=0)
def encode(layout: Layout, weight: jax.Array) -> dict[str, jax.Array]:
    """The members (`quantized.codes`) of a weight [*out, in] in floating point; every code is the nearest.

    Scales reach from the largest magnitude of a row or group, or from its smallest to its largest number, and codes are
    those of the scales as they are stored. Weights on such a grid, as GGUF's Q8_0 and Q4_1, come out unchanged.
    A group of zeros has the scale 0. A weight that is not finite, or too large for the scales' dtype, gives scales that
    are not.
    """
    grouped = by_group(layout, weight)
    grid = spanning(layout, grouped)
    return members(layout, grid, nearest(layout, grid, grouped).reshape(weight.shape))
