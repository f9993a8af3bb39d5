"""Sizes as people write them; `llama_jax.disk`, which lower rooms can import, has the function."""

from __future__ import annotations

from llama_jax.disk import size_text as size_text
