"""Attention of a few queries a row (decoding, speculation) over a long cache: bound by reading keys and values."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax

from llama_jax.kernels.attention.cases import (
    decode_candidates,
    decode_cases,
    decode_models,
    decode_shape,
    decode_tiles,
)
from llama_jax.kernels.attention.records import KeysValues, Places, Rule, beyond_kernels
from llama_jax.kernels.attention.reference import attention_reference
from llama_jax.kernels.dispatch import Backend, Operation
from llama_jax.targets import Target

MAX_QUERIES = 8
"""The most queries a row that count as decoding."""

MAX_HEAD_DIM = 256
DTYPES = ("bfloat16", "float16", "float32")


def _pallas_triton(*args: Any, **kwargs: Any) -> jax.Array:
    from llama_jax.kernels.attention.decode import pallas_triton  # Pallas takes 0.3 s to import

    return pallas_triton.run(*args, **kwargs)


def _interpretable(
    target: Target, q: jax.Array, kv: KeysValues, places: Places, rule: Rule, *, sinks: jax.Array | None = None
) -> str | None:
    """Why the kernels cannot compute this anywhere, or None."""
    if not 0 < q.shape[1] <= MAX_QUERIES:
        return f"{q.shape[1]} queries a row, it takes 1 to {MAX_QUERIES}"
    if q.shape[3] > MAX_HEAD_DIM:
        return f"head_dim {q.shape[3]} is more than {MAX_HEAD_DIM}"
    if not places.kv_positions.shape[1]:
        return "the cache has no slots"
    for x in (q, kv.k, kv.v):
        if x.dtype.name not in DTYPES:
            return f"dtype {x.dtype.name}, it takes {', '.join(DTYPES)}"
    return beyond_kernels(kv, places, rule)


def _unsupported(target: Target, q: jax.Array, *args: Any, **kwargs: Any) -> str | None:
    if target.vendor == "cpu":
        return "Pallas-Triton compiles for GPUs only; pallas_interpret runs the same kernels"
    reason = _interpretable(target, q, *args, **kwargs)
    if not reason and target.vendor == "amd" and target.wave_size == 32 and q.dtype == "float32":
        return f"{target.arch} has no matrix instruction for float32, and the kernels would spill registers"
    return reason


decode_attention = Operation(
    "decode_attention",
    {
        "reference": Backend(attention_reference),
        "pallas_triton": Backend(_pallas_triton, _unsupported, tiles=decode_tiles, candidates=decode_candidates),
        "pallas_interpret": Backend(partial(_pallas_triton, interpret=True), _interpretable, interpreted=True),
    },
    shape=decode_shape,
    cases=decode_cases,
    models=decode_models,
)
