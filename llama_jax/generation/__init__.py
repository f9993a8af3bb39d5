"""Text from text, over the decode step of `llama_jax.decode`."""

from __future__ import annotations

from llama_jax.generation.batch import batch_generate, encode_prompt, generate, stream_generate, token_limit

__all__ = ["batch_generate", "encode_prompt", "generate", "stream_generate", "token_limit"]
