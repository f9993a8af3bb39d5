"""Attention of many queries (prefill, training): tiles of keys and values with a running softmax.

"FlashAttention-2", arXiv:2307.08691.
"""

from __future__ import annotations

from llama_jax.kernels.attention.cases import flash_cases, flash_shape
from llama_jax.kernels.attention.reference import attention_reference
from llama_jax.kernels.dispatch import Backend, Operation

flash_attention = Operation("flash_attention", {"reference": Backend(attention_reference)}, flash_shape, flash_cases)
