"""Calls of attention whose arrays and options are given one by one, by name or in this order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from llama_jax.kernels.attention import Places, Visibility
from llama_jax.kernels.attention import visible as visible_places
from llama_jax.kernels.attention.cases import arguments

ORDER = ("q", "k", "v", "q_positions", "kv_positions", "visibility")
OWN = ("backend", "tiles", "interpret")


def flat(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f`, which takes records, as a function of what they hold."""

    def call(*args: Any, **named: Any) -> Any:
        own = {name: named.pop(name) for name in OWN if name in named}
        return f(**arguments(**dict(zip(ORDER, args, strict=False)), **named), **own)

    return call


def visible(
    q: jax.Array, kv: jax.Array, visibility: Visibility, q_segments: Any = None, kv_segments: Any = None
) -> jax.Array:
    """`llama_jax.kernels.attention.visible` of positions and segments."""
    return visible_places(Places(q, kv, q_segments, kv_segments), visibility)
