"""The methods of quantisation by name, and what each of them needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from llama_jax.quantized import awq, gptq, hqq, nearest

if TYPE_CHECKING:
    import jax

    from llama_jax.quantized.layout import Layout


@dataclass(frozen=True)
class Method:
    """One way from a weight to its members.

    Attributes:
      encode: layout, weight [*out, in] and the Gram matrix [in, in] of the layer's inputs, which it may leave unused.
      calibrated: whether it needs that matrix, and so a text.
      scales_inputs: whether inputs are scaled before (`awq.input_scales`), by the weights of what comes before.
      takes: whether it can make a layout.
    """

    encode: Callable[[Layout, jax.Array, jax.Array | None], Mapping[str, jax.Array]]
    calibrated: bool = False
    scales_inputs: bool = False
    takes: Callable[[Layout], bool] = lambda layout: True


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "rtn": Method(lambda layout, weight, _: nearest.encode(layout, weight)),
        "hqq": Method(lambda layout, weight, _: hqq.encode(layout, weight), takes=hqq.takes),
        "gptq": Method(gptq.encode, calibrated=True),
        "awq": Method(awq.encode, calibrated=True, scales_inputs=True),
    }
)
"""By the name that `llama-jax quantize --method` takes."""


@functools.cache
def encoder(method: str, layout: Layout) -> Callable[[jax.Array], Mapping[str, jax.Array]]:
    """The function from a weight to its members that a method without data is for one layout; equal calls give the same
    function, so that jax traces it once."""
    return lambda weight: METHODS[method].encode(layout, weight, None)
