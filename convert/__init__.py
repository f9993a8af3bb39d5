"""Conversion of checkpoints from and export to other formats: Hugging Face folders, folders of Meta, GGUF files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.convert.export import GGUF_TYPES, Exported, export_gguf, export_hf
    from llama_jax.convert.run import convert

__all__ = ["GGUF_TYPES", "Exported", "convert", "export_gguf", "export_hf"]


def __getattr__(name: str) -> Any:
    # These need jax, some of them gguf, so they are loaded when first asked for.
    if name == "convert":
        from llama_jax.convert.run import convert

        return convert
    if name in __all__:
        from llama_jax.convert import export

        return getattr(export, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
