"""Two schemes from outside of the package: 8-bit integers, and a float32 scale of each row or of the whole weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from helpers import random_params

from llama_jax.config import LlamaConfig
from llama_jax.params import Params, canonical_specs, flatten, unflatten
from llama_jax.schemes import Member, Members, Scheme, register_scheme


def _rows[T: tuple[Any, ...]](dimensions: T) -> T:
    return dimensions[:-1]


def _encode(weight: jax.Array) -> Members:
    scale = jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=-1) / 127
    return {"values": jnp.round(weight / scale[..., None]).astype(jnp.int8), "row_scale": scale}


def _decode(leaf: Members, dtype: Any) -> jax.Array:
    return (leaf["values"] * leaf["row_scale"][..., None]).astype(dtype)


def _product(x: jax.Array, leaf: Members, dtype: Any) -> jax.Array:
    values = leaf["values"].astype(jnp.float32)
    out = jnp.tensordot(x.astype(jnp.float32), values, axes=(-1, -1), precision=jax.lax.Precision.HIGHEST)
    return (out * leaf["row_scale"]).astype(dtype)


def _lookup(leaf: Members, tokens: jax.Array, dtype: Any) -> jax.Array:
    return (leaf["values"][tokens] * leaf["row_scale"][tokens][..., None]).astype(dtype)


TOY = Scheme(
    "toy_rows",
    {"values": Member("int8"), "row_scale": Member("float32", _rows, _rows)},
    _encode,
    _decode,
    _product,
    _lookup,
)
register_scheme(TOY)

# One number for the whole weight: has no rows, so that it cannot be fused. Decoding is all that it says.
WHOLE = Scheme(
    "toy_whole",
    {"codes": Member("int8"), "size": Member("float32", lambda shape: (1,), lambda axes: (None,))},
    lambda weight: {
        "codes": jnp.round(weight / jnp.max(jnp.abs(weight)) * 127).astype(jnp.int8),
        "size": (jnp.max(jnp.abs(weight)) / 127)[None].astype(jnp.float32),
    },
    lambda leaf, dtype: (leaf["codes"] * leaf["size"]).astype(dtype),
)
register_scheme(WHOLE)


def with_scheme(config: LlamaConfig, scheme: Scheme = TOY, *, without: tuple[str, ...] = ()) -> LlamaConfig:
    """All weights of two or more dimensions stored by it, but for leaves that end in one of `without`."""
    leaves = [s.leaf for s in canonical_specs(config) if len(s.shape) > 1 and not s.leaf.endswith(without or ("?",))]
    return config.replace(schemes=tuple((leaf, scheme.name) for leaf in leaves))


def encoded(config: LlamaConfig) -> tuple[Params, Params]:
    """Random parameters as the schemes of `config` store them; and plain ones that equal these exactly."""
    flat, plain, schemes = {}, {}, dict(config.schemes)
    for name, leaf in flatten(random_params(config.replace(schemes=()))).items():
        where, _, member = name.rpartition(".")
        scheme = {TOY.name: TOY, WHOLE.name: WHOLE}.get(schemes.get(where, "")) if member == "weight" else None
        members = {member: leaf} if scheme is None else scheme.encode(leaf)
        flat |= {f"{where}.{part}": array for part, array in members.items()}
        plain[name] = leaf if scheme is None else scheme.decode(members, jnp.float32)
    return unflatten(flat), unflatten(plain)
