"""Quantised weights: their memory layout (`layout`), computations with them (`codes`), and making them
(`nearest`).

Pure functions of arrays, which know neither the model nor its parameters. `llama_jax.schemes` turns every
layout into a scheme, which the parameter tree, checkpoints, plans and the model accept.
"""

from llama_jax.quantized.layout import CODES, Layout, layout_named, stored_layout

__all__ = ["CODES", "Layout", "layout_named", "stored_layout"]
