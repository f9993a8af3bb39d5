"""Routed experts through Pallas-Triton: two grouped products, tokens gathered and results scattered inside of them.

The first multiplies by gate and up at once and writes activation(gate) * up; the second multiplies by down. Weights are
read where they lie, and each expert's only if a token goes there.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.moe import products
from llama_jax.kernels.moe.grouped import grouped_product
from llama_jax.kernels.moe.reference import Activation
from llama_jax.kernels.moe.tiles import Tiles, candidates, default_tiles
from llama_jax.targets import Target

__all__ = ["Tiles", "candidates", "default_tiles", "run", "unsupported"]

_compiled = partial(grouped_product, interpret=False)
_interpreted = partial(grouped_product, interpret=True)


def unsupported(
    target: Target,
    x: jax.Array,
    expert_ids: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    activation: Activation,
    tiles: Tiles | None = None,
    interpret: bool = False,
    **scales: Any,
) -> str | None:
    """The reason this backend cannot run a call on `target`, or None."""
    if target.vendor == "cpu" and not interpret:
        return "it needs a GPU"
    if (reason := products.unsupported(target, x, expert_ids, gate, up, down)) or interpret:
        return reason
    if x.dtype == jnp.float32 and target.vendor == "amd" and target.wave_size == 32:
        return "RDNA has no matrix instructions for float32"
    # Triton's dialect has no error function (gelu without the tanh approximation).
    if re.search(r"\berfc?\b", str(jax.make_jaxpr(activation)(jax.ShapeDtypeStruct((), jnp.float32)))):
        return "the activation uses erf"
    if tiles is not None and not tiles.fits(target, x.dtype.itemsize):
        return (
            f"the tiles take {tiles.lds_bytes(target, x.dtype.itemsize)} bytes of local memory, of {target.lds_bytes}"
        )
    return None


def run(*args: jax.Array, interpret: bool = False, **options: Any) -> jax.Array:
    """`llama_jax.kernels.moe.routed_experts` with the keyword `tiles`: how to cut the products, or None.

    Args:
      interpret: runs the kernels as plain JAX operations, on any device.
    """
    return products.run(*args, product=_interpreted if interpret else _compiled, **options)
