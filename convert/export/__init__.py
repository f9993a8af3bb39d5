"""Export of checkpoints to other formats: Hugging Face folders (safetensors), plain or quantised, and GGUF files."""

from __future__ import annotations

from llama_jax.convert.export.compressed import export_compressed
from llama_jax.convert.export.gguf import GGUF_TYPES, export_gguf
from llama_jax.convert.export.hf import SHARD_BYTES, export_hf
from llama_jax.convert.export.source import Exported

__all__ = ["GGUF_TYPES", "SHARD_BYTES", "Exported", "export_compressed", "export_gguf", "export_hf"]
