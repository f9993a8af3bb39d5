"""Attention of many queries (prefill, training): tiles of keys and values with a running softmax.

"FlashAttention-2", arXiv:2307.08691.
"""

from __future__ import annotations

from functools import partial

from llama_jax.kernels.attention.cases import (
    flash_candidates,
    flash_cases,
    flash_models,
    flash_shape,
    flash_tiles,
)
from llama_jax.kernels.attention.flash import cudnn, pallas_triton
from llama_jax.kernels.attention.reference import attention_reference
from llama_jax.kernels.dispatch import Backend, Operation

flash_attention = Operation(
    "flash_attention",
    {
        "reference": Backend(attention_reference),
        "pallas_triton": Backend(
            pallas_triton.run, pallas_triton.unsupported, tiles=flash_tiles, candidates=flash_candidates
        ),
        "pallas_interpret": Backend(
            partial(pallas_triton.run, interpret=True),
            partial(pallas_triton.unsupported, interpret=True),
            interpreted=True,
        ),
        "cudnn": Backend(cudnn.run, cudnn.unsupported),
    },
    shape=flash_shape,
    cases=flash_cases,
    models=flash_models,
)
