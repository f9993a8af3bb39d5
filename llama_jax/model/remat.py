"""Values that a layer keeps for its backward pass, and those that it computes again: policies of `jax.checkpoint`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from llama_jax.errors import RequestError, did_you_mean

KEPT = ("dot_product_attention_fwd", "ragged_dot")
"""Beginnings of the names of primitives whose results take long to make, besides kernels in Pallas."""
CHEAP = "add_rms_norm"
"""The kernel that only reads and writes: its result is as large as what it is made from."""


def _kernels(primitive: Any, *_: Any, **parameters: Any) -> bool:
    if primitive.name == "pallas_call":
        return parameters["jaxpr"].debug_info.func_name != CHEAP
    return primitive.name.startswith(KEPT)


WIDENED = 16
"""A product whose result is this many times as wide as what it is made from, as an adapter's second one, is computed
again: that takes no longer than reading the result."""

_dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


def _products(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    if _kernels(primitive, *arguments, **parameters):
        return True
    return bool(_dots(primitive, *arguments, **parameters)) and not _widens(*arguments, **parameters)


def _widens(x: Any, weight: Any, *, dimension_numbers: Any, **_: Any) -> bool:
    (_, contracted), _ = dimension_numbers
    width = math.prod(weight.shape[i] for i in contracted)
    return bool(weight.size >= WIDENED * width * width)


REMAT: Mapping[str, Callable[..., bool] | None] = MappingProxyType(
    {"none": None, "products": _products, "kernels": _kernels, "full": jax.checkpoint_policies.nothing_saveable}
)
"""Policies by name, from the most memory to the least: "none" keeps everything; "products" the results of products with
weights and of kernels, and computes norms, rope and activation functions again; "kernels" those of kernels alone;
"full" nothing but what goes into each layer."""


def rematerialised(layer: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """`layer`, differentiated by a policy of `REMAT`.

    Raises:
      RequestError: there is no such policy.
    """
    if remat not in REMAT:
        hint = did_you_mean(remat, REMAT) or f"there are {', '.join(REMAT)}"
        raise RequestError(f"no remat policy is called {remat!r}", param="remat", hint=hint)
    policy = REMAT[remat]
    return layer if policy is None else jax.checkpoint(layer, policy=policy)
