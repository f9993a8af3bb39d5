"""Low-rank adapters of a few tokens in two kernels, through Pallas-Triton, whatever the number of projections."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.lora import kernel
from llama_jax.kernels.lora.reference import Activation, Part, Slots, add_lora_reference
from llama_jax.kernels.lora.tiles import Tiles, default_tiles
from llama_jax.kernels.moe.schedule import schedule
from llama_jax.kernels.pallas import MAX_ELEMENTS
from llama_jax.targets import Target, current

__all__ = ["Tiles", "run", "unsupported"]

DTYPES = ("bfloat16", "float16")
MOST_RANK = 512
MOST_TOKENS = 512
"""Tokens up to which kernels are so short that their number counts."""


def unsupported(
    target: Target,
    out: jax.Array,
    x: jax.Array,
    slots: Sequence[Slots],
    ids: jax.Array,
    *,
    parts: Sequence[Part],
    activation: Activation | None = None,
    interpret: bool = False,
) -> str | None:
    """The reason this backend cannot run a call on `target`, or None."""
    if target.vendor == "cpu" and not interpret:
        return "Pallas-Triton compiles for GPUs only; pallas_interpret runs the same kernels"
    tokens = math.prod(x.shape[:-1])
    if not tokens or (not interpret and tokens > MOST_TOKENS):
        return f"{tokens} tokens are none, or more than {MOST_TOKENS}"
    if x.dtype.name not in DTYPES or any(of_one[name].dtype != x.dtype for of_one in slots for name in ("a", "b")):
        return f"tokens in {x.dtype} and adapters that are not: it takes {' or '.join(DTYPES)}"
    if len({of_one["a"].shape for of_one in slots}) > 1:
        return "the slots of the projections have several ranks"
    number, rank, _ = slots[0]["a"].shape
    if number < 2 or rank > MOST_RANK:
        return f"{number} slots of rank {rank}: it takes two and more, of rank {MOST_RANK} at most"
    if max(out.size, x.size, *(of_one[name].size for of_one in slots for name in ("a", "b"))) > MAX_ELEMENTS:
        return f"an array has more than {MAX_ELEMENTS} elements"
    # Triton's dialect has no error function (gelu without the tanh approximation).
    if activation is not None and not interpret:
        program = str(jax.make_jaxpr(activation)(jax.ShapeDtypeStruct((), "float32")))
        return "the activation uses erf" if re.search(r"\berfc?\b", program) else None
    return None


def run(
    out: jax.Array,
    x: jax.Array,
    slots: Sequence[Slots],
    ids: jax.Array,
    *,
    parts: Sequence[Part],
    activation: Activation | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `llama_jax.kernels.lora.add_lora`; differentiable as the reference is.

    Args:
      tiles: by default `default_tiles` of the current target.
      interpret: runs as plain JAX operations, on any device.
    """
    if tiles is None:
        tiles = default_tiles(current(), **sizes(x, slots))

    @jax.custom_vjp
    def add(out: jax.Array, x: jax.Array, slots: Sequence[Slots], ids: jax.Array) -> jax.Array:
        lead = x.shape[:-1]
        flat = x.reshape(-1, x.shape[-1])
        number = slots[0]["a"].shape[0]
        own = jnp.where((ids > 0) & (ids < number), ids, 0)
        order = schedule(jnp.broadcast_to(own, lead).reshape(-1, 1), number, tiles.rows)
        places = [kernel.Places.of(part, out.shape[len(lead) :]) for part in parts]
        inner = kernel.shrink(flat, slots, order, tiles, interpret=interpret)
        result = kernel.expand(
            *(out.reshape(len(flat), -1), inner, slots, order, places, tiles),
            activation=activation,
            interpret=interpret,
        )
        return result.reshape(*(out.shape if activation is None else (*lead, -1)))

    def save(*args: Any) -> tuple[jax.Array, Any]:
        return add(*args), args

    def backward(args: Any, gradient: jax.Array) -> Any:
        out, x, slots, ids = args

        def again(out: jax.Array, x: jax.Array, slots: Sequence[Slots]) -> jax.Array:
            return add_lora_reference(out, x, slots, ids, parts=parts, activation=activation)

        _, pull = jax.vjp(again, out, x, slots)
        return *pull(gradient), None

    add.defvjp(save, backward)
    return add(out, x, slots, ids)


def sizes(x: jax.Array, slots: Sequence[Slots]) -> dict[str, int]:
    """The sizes that tiles depend on."""
    rows = math.prod(x.shape[:-1])
    number, rank, inner = slots[0]["a"].shape
    return {"rows": rows, "inner": inner, "slots": number, "rank": rank, "projections": len(slots)}
