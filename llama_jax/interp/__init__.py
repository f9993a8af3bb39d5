"""Interpretability: attention maps, the logit lens, gradients of activations, generation with patches, and datasets of
activations on disk.

Activations themselves are read and changed by `forward(capture=, patch=)`.
"""

from llama_jax.interp.dataset import Activations, open_activations
from llama_jax.interp.functions import activation_gradients, attention_maps, head_outputs, logit_lens
from llama_jax.interp.generation import patched_generate
from llama_jax.interp.recording import record_activations

__all__ = [
    "Activations",
    "activation_gradients",
    "attention_maps",
    "head_outputs",
    "logit_lens",
    "open_activations",
    "patched_generate",
    "record_activations",
]
