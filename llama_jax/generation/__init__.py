"""Text generation: requests, the session that runs them, and their outputs."""

from __future__ import annotations

from llama_jax.generation.api import batch_generate, generate, stream_generate
from llama_jax.generation.request import encode_prompt, token_limit

__all__ = ["batch_generate", "encode_prompt", "generate", "stream_generate", "token_limit"]
