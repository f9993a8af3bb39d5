"""Quantised weights: how they are laid out (`layout`), what is computed with them (`codes`), how they are made
(`nearest`).

Pure functions of arrays, which know neither the model nor its parameters. `llama_jax.schemes` makes a scheme of every
layout, and so the parameter tree, checkpoints, plans and the model take them.
"""

from llama_jax.quantized.layout import CODES, Layout, layout_named, stored_layout

__all__ = ["CODES", "Layout", "layout_named", "stored_layout"]
