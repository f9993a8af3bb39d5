"""Packs small host arrays into one: each transfer to a device has a fixed cost, whatever its size."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def flat(tree: Any) -> np.ndarray:
    """Concatenates the leaves of a tree, numpy arrays of bool or 32-bit elements, as int32 [n]."""
    leaves = (x.astype(np.int32) if x.dtype == bool else np.ascontiguousarray(x) for x in jax.tree.leaves(tree))
    return np.concatenate([x.reshape(-1).view(np.int32) for x in leaves])


def views(array: np.ndarray, like: Any) -> Any:
    """The tree as views of the flat array, to be written to; those of bool are int32.

    Args:
      like: arrays of the shapes and dtypes of its leaves.
    """
    leaves, structure = jax.tree.flatten(like)
    parts, start = [], 0
    for x in leaves:
        part = array[start : start + x.size].reshape(x.shape)
        parts.append(part if x.dtype == bool else part.view(x.dtype))
        start += x.size
    return jax.tree.unflatten(structure, parts)


def unflat(array: jax.Array, like: Any) -> Any:
    """Rebuilds the tree on the device.

    Args:
      like: shapes and dtypes of its leaves.
    """
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([math.prod(x.shape) for x in leaves])
    parts = (array[end - math.prod(x.shape) : end].reshape(x.shape) for x, end in zip(leaves, ends, strict=True))
    return jax.tree.unflatten(structure, [_as(part, x.dtype) for part, x in zip(parts, leaves, strict=True)])


def flat_size(like: Any) -> int:
    """Length of the flat array."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(like))


def _as(part: jax.Array, dtype: Any) -> jax.Array:
    return part != 0 if dtype == jnp.bool else jax.lax.bitcast_convert_type(part, dtype)
