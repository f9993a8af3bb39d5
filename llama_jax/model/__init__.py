"""The model: `forward`, a pure function for training, prefill and decode, and what it is made of.

`transformer` is the forward pass, `layers` are the parts of a block, `head` is what follows the last one, `rope` the
rotations, `fuse` the load-time layouts, `flax_module` the Linen face, `loaded` a model as `load` gives it.
"""

from __future__ import annotations

from llama_jax.model.head import unembed
from llama_jax.model.transformer import activation_names, forward

__all__ = ["activation_names", "forward", "unembed"]
