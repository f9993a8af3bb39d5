"""Conversion of checkpoints from other formats: Hugging Face folders, folders of Meta and GGUF files."""

from __future__ import annotations

from llama_jax.convert.run import convert

__all__ = ["convert"]
