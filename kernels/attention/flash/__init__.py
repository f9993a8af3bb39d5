"""Attention of many queries (prefill, training): tiles of keys and values with a running softmax.

"FlashAttention-2", arXiv:2307.08691.
"""

from __future__ import annotations

from llama_jax.kernels.attention import blocked
from llama_jax.kernels.attention.cases import flash_candidates, flash_cases, flash_models, flash_shape
from llama_jax.kernels.attention.flash import cudnn
from llama_jax.kernels.attention.reference import attention_reference
from llama_jax.kernels.dispatch import Backend, Operation

_KERNELS = f"{__name__}.pallas_triton"

flash_attention = Operation(
    "flash_attention",
    {
        "reference": Backend(attention_reference),
        "pallas_triton": Backend.at(_KERNELS, candidates=flash_candidates, indexed=True),
        "pallas_interpret": Backend.at(_KERNELS, interpreted=True, indexed=True, interpret=True),
        "blocked": Backend(blocked.run, blocked.unsupported),
        "cudnn": Backend(cudnn.run, cudnn.unsupported),
    },
    shape=flash_shape,
    cases=flash_cases,
    models=flash_models,
)
