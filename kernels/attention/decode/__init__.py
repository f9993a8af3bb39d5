"""Attention of a few queries a row (decoding, speculation) over a long cache: bound by reading keys and values."""

from __future__ import annotations

from llama_jax.kernels.attention import blocked
from llama_jax.kernels.attention.cases import decode_candidates, decode_cases, decode_models, decode_shape
from llama_jax.kernels.attention.reference import attention_reference
from llama_jax.kernels.dispatch import Backend, Operation

MAX_QUERIES = 8
"""The most queries a row that count as decoding."""

_KERNELS = f"{__name__}.pallas_triton"

decode_attention = Operation(
    "decode_attention",
    {
        "reference": Backend(attention_reference),
        "pallas_triton": Backend.at(_KERNELS, candidates=decode_candidates),
        "pallas_interpret": Backend.at(_KERNELS, interpreted=True, interpret=True),
        "blocked": Backend(blocked.run, blocked.unsupported),
        "jax_triton": Backend.at(f"{__name__}.jax_triton", candidates=decode_candidates),
    },
    shape=decode_shape,
    cases=decode_cases,
    models=decode_models,
)
