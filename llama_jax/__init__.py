"""llama_jax: a high-performance Llama in JAX, AMD GPUs first.

    import llama_jax as lj

    model, tokenizer = lj.load()
    print(lj.generate(model, tokenizer, "The capital of France is", max_tokens=8))

Everything here is imported when it is first used: `import llama_jax` alone imports neither jax nor numpy. Conversion is
`llama_jax.convert.convert`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llama_jax.jax_log import silence_missing_amd_gpu

if TYPE_CHECKING:
    from llama_jax import training
    from llama_jax.adapters import Adapter, load_adapter, save_adapter
    from llama_jax.cache import DenseCache, PagedCache
    from llama_jax.checkpoint import load_params, open_checkpoint, save, verify
    from llama_jax.config import LlamaConfig, config_from_hf, config_to_hf, preset
    from llama_jax.errors import LlamaJaxError
    from llama_jax.generation import batch_generate, generate, stream_generate
    from llama_jax.generation.engine import Engine
    from llama_jax.generation.llm import LLM
    from llama_jax.generation.streams import Request
    from llama_jax.interp import (
        activation_gradients,
        attention_maps,
        head_outputs,
        logit_lens,
        open_activations,
        patched_generate,
        record_activations,
    )
    from llama_jax.loading import load
    from llama_jax.model import Patch, activation_names, forward, patch, unembed
    from llama_jax.model.flax_module import Llama
    from llama_jax.model.loaded import Model
    from llama_jax.model.quantization import quantize
    from llama_jax.params import abstract_params, count_params, init_params, param_specs
    from llama_jax.receipts import Receipt, read_receipt, receipt, replay
    from llama_jax.sampling import Grammar, SamplingParams, sample
    from llama_jax.scoring import perplexity, score, score_rolling
    from llama_jax.sharding import make_mesh
    from llama_jax.text.chat import encode_chat, render_chat
    from llama_jax.text.tokenizer import Tokenizer, load_tokenizer

__version__ = "0.1.0"

# Before jax can start: this module comes first, whatever of the package is imported.
silence_missing_amd_gpu()

_HOME = {
    "adapters": ("Adapter", "load_adapter", "save_adapter"),
    "cache": ("DenseCache", "PagedCache"),
    "text.chat": ("encode_chat", "render_chat"),
    "checkpoint": ("load_params", "open_checkpoint", "save", "verify"),
    "config": ("LlamaConfig", "config_from_hf", "config_to_hf", "preset"),
    "errors": ("LlamaJaxError",),
    "model.flax_module": ("Llama",),
    "model.loaded": ("Model",),
    "model.quantization": ("quantize",),
    "generation": ("batch_generate", "generate", "stream_generate"),
    "generation.engine": ("Engine",),
    "generation.llm": ("LLM",),
    "generation.streams": ("Request",),
    "interp": (
        "activation_gradients",
        "attention_maps",
        "head_outputs",
        "logit_lens",
        "open_activations",
        "patched_generate",
        "record_activations",
    ),
    "loading": ("load",),
    "model": ("Patch", "activation_names", "forward", "patch", "unembed"),
    "params": ("abstract_params", "count_params", "init_params", "param_specs"),
    "receipts": ("Receipt", "read_receipt", "receipt", "replay"),
    "sampling": ("Grammar", "SamplingParams", "sample"),
    "scoring": ("perplexity", "score", "score_rolling"),
    "sharding": ("make_mesh",),
    "text.tokenizer": ("Tokenizer", "load_tokenizer"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "LLM",
    "Adapter",
    "DenseCache",
    "Engine",
    "Grammar",
    "Llama",
    "LlamaConfig",
    "LlamaJaxError",
    "Model",
    "PagedCache",
    "Patch",
    "Receipt",
    "Request",
    "SamplingParams",
    "Tokenizer",
    "__version__",
    "abstract_params",
    "activation_gradients",
    "activation_names",
    "attention_maps",
    "batch_generate",
    "config_from_hf",
    "config_to_hf",
    "count_params",
    "encode_chat",
    "forward",
    "generate",
    "head_outputs",
    "init_params",
    "load",
    "load_adapter",
    "load_params",
    "load_tokenizer",
    "logit_lens",
    "make_mesh",
    "open_activations",
    "open_checkpoint",
    "param_specs",
    "patch",
    "patched_generate",
    "perplexity",
    "preset",
    "quantize",
    "read_receipt",
    "receipt",
    "record_activations",
    "render_chat",
    "replay",
    "sample",
    "save",
    "save_adapter",
    "score",
    "score_rolling",
    "stream_generate",
    "training",
    "unembed",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "training":
        return importlib.import_module("llama_jax.training")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'llama_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"llama_jax.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
