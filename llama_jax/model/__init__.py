"""The model: `forward`, a pure function for training, prefill and decode, and its parts.

`transformer` is the forward pass, `layers` are the parts of a block, `head` follows the last block, `activations` are
those that can be read and changed, `rope` has the rotations, `fuse` the load-time layouts, `flax_module` the Linen
module, `loaded` the model that `load` returns.
"""

from __future__ import annotations

from llama_jax.model.activations import Patch, activation_names, patch
from llama_jax.model.head import unembed
from llama_jax.model.transformer import forward

__all__ = ["Patch", "activation_names", "forward", "patch", "unembed"]
