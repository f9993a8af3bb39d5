"""Text to token ids and back: `load_tokenizer` reads a model's own files, `Tokenizer` encodes, decodes and streams.

Importing this package is cheap; the `tokenizers` library is imported by `load_tokenizer`.
"""

from __future__ import annotations

from llama_jax.text.tokenizer.loading import load_tokenizer, tokenizer_from_files
from llama_jax.text.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer", "load_tokenizer", "tokenizer_from_files"]
