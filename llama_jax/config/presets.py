"""Published models by name: their shapes, as the keys of config.json that differ from their family's defaults.

Source: the config.json files of the models' own repositories on the Hugging Face hub (Llama 1: Touvron et al. 2023,
arXiv:2302.13971, table 2, and its params.json files). `tests/test_presets.py` holds each against its published
parameter count.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from llama_jax.config.hf import config_from_hf
from llama_jax.config.rope import rope_to_hf
from llama_jax.config.spec import LlamaConfig, RopeSpec
from llama_jax.errors import ModelNotFound, did_you_mean


def _shape(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


def _llama1(*shape: int, eps: float = 1e-6) -> dict[str, Any]:
    return {"model_type": "llama", "dtype": "float16", "rms_norm_eps": eps} | _shape(*shape)


def _llama2(*shape: int, **keys: Any) -> dict[str, Any]:
    base = {"model_type": "llama", "dtype": "float16", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
    return base | _shape(*shape) | keys


def _codellama(*shape: int, vocab: int = 32016) -> dict[str, Any]:
    keys = {"dtype": "bfloat16", "vocab_size": vocab, "max_position_embeddings": 16384, "rope_parameters": _rope(1e6)}
    return _llama2(*shape, **keys)


def _llama3(*shape: int, rope_factor: float | None = None, **keys: Any) -> dict[str, Any]:
    """Llama 3; with a rope factor, Llama 3.1 and later."""
    base = {
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072 if rope_factor else 8192,
        "rope_parameters": _rope(500_000.0, rope_factor),
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }
    return base | _shape(*shape) | keys


def _llama4(*, experts: int, step: int, qk_norm: bool, context: int, rope: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "llama4_text",
        "dtype": "bfloat16",
        "max_position_embeddings": context,
        "num_local_experts": experts,
        "interleave_moe_layer_step": step,
        "use_qk_norm": qk_norm,
        "rope_parameters": rope,
        "bos_token_id": 200000,
        "eos_token_id": [200001, 200007, 200008],
        "pad_token_id": 200018,
    } | _shape(5120, 8192, 48, 40, 8)


def _mistral(**keys: Any) -> dict[str, Any]:
    base = {"model_type": "mistral", "dtype": "bfloat16", "rms_norm_eps": 1e-5, "max_position_embeddings": 32768}
    return base | _shape(4096, 14336, 32, 32, 8) | keys


def _mixtral(*shape: int, context: int) -> dict[str, Any]:
    return {"model_type": "mixtral", "dtype": "bfloat16", "max_position_embeddings": context} | _shape(*shape)


def _smollm2(*shape: int, theta: float) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": 49152,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "rope_parameters": _rope(theta),
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    } | _shape(*shape)


def _rope(theta: float, factor: float | None = None, high_freq_factor: float = 4.0) -> dict[str, Any]:
    """Plain rope; with a factor, "llama3" scaling."""
    if factor is None:
        return rope_to_hf(RopeSpec(theta))
    return rope_to_hf(RopeSpec(theta, "llama3", factor, 8192, high_freq_factor=high_freq_factor))


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama-1-7b": _llama1(4096, 11008, 32, 32, 32),
        "llama-1-13b": _llama1(5120, 13824, 40, 40, 40),
        "llama-1-30b": _llama1(6656, 17920, 60, 52, 52),
        "llama-1-65b": _llama1(8192, 22016, 80, 64, 64, eps=1e-5),
        "llama-2-7b": _llama2(4096, 11008, 32, 32, 32),
        "llama-2-13b": _llama2(5120, 13824, 40, 40, 40),
        "llama-2-70b": _llama2(8192, 28672, 80, 64, 8),
        "codellama-7b": _codellama(4096, 11008, 32, 32, 32),
        "codellama-13b": _codellama(5120, 13824, 40, 40, 40),
        "codellama-34b": _codellama(8192, 22016, 48, 64, 8, vocab=32000),
        "codellama-70b": _codellama(8192, 28672, 80, 64, 8),
        "llama-3-8b": _llama3(4096, 14336, 32, 32, 8),
        "llama-3-70b": _llama3(8192, 28672, 80, 64, 8),
        "llama-3.1-8b": _llama3(4096, 14336, 32, 32, 8, rope_factor=8.0),
        "llama-3.1-70b": _llama3(8192, 28672, 80, 64, 8, rope_factor=8.0),
        "llama-3.1-405b": _llama3(16384, 53248, 126, 128, 8, rope_factor=8.0),
        "llama-3.2-1b": _llama3(2048, 8192, 16, 32, 8, rope_factor=32.0, tie_word_embeddings=True),
        "llama-3.2-3b": _llama3(3072, 8192, 28, 24, 8, rope_factor=32.0, tie_word_embeddings=True),
        "llama-3.3-70b": _llama3(8192, 28672, 80, 64, 8, rope_factor=8.0, eos_token_id=[128001, 128008, 128009]),
        "llama-4-scout": _llama4(
            experts=16,
            step=1,
            qk_norm=True,
            context=10_485_760,
            rope=_rope(500_000.0, 16.0, high_freq_factor=1.0),
        ),
        "llama-4-maverick": _llama4(experts=128, step=2, qk_norm=False, context=1_048_576, rope=_rope(500_000.0)),
        "mistral-7b-v0.1": _mistral(sliding_window=4096),
        "mistral-7b-v0.3": _mistral(vocab_size=32768, sliding_window=None, rope_parameters=_rope(1e6)),
        "mixtral-8x7b": _mixtral(4096, 14336, 32, 32, 8, context=32768),
        "mixtral-8x22b": _mixtral(6144, 16384, 56, 48, 8, context=65536),
        "qwen2.5-7b": {
            "model_type": "qwen2",
            "dtype": "bfloat16",
            "vocab_size": 152064,
            "max_position_embeddings": 131072,
            "rope_parameters": _rope(1e6),
            "bos_token_id": 151643,
            "eos_token_id": 151643,
        }
        | _shape(3584, 18944, 28, 28, 4),
        "qwen3-8b": {
            "model_type": "qwen3",
            "dtype": "bfloat16",
            "max_position_embeddings": 40960,
            "rope_parameters": _rope(1e6),
            "bos_token_id": 151643,
            "eos_token_id": 151645,
        }
        | _shape(4096, 12288, 36, 32, 8),
        "smollm2-135m": _smollm2(576, 1536, 30, 9, 3, theta=100_000.0),
        "smollm2-360m": _smollm2(960, 2560, 32, 15, 5, theta=100_000.0),
        "smollm2-1.7b": _smollm2(2048, 8192, 24, 32, 32, theta=130_000.0),
        "smollm3-3b": {
            "model_type": "smollm3",
            "dtype": "bfloat16",
            "max_position_embeddings": 65536,
            "rope_parameters": _rope(5e6),
            "eos_token_id": 128012,
        }
        | _shape(2048, 11008, 36, 16, 4),
    }
)
"""Name to config.json-style keys. Multimodal models (Llama 4) appear with their text model."""


def preset(name: str) -> LlamaConfig:
    """The configuration of a published model.

    Args:
      name: a key of `PRESETS`; upper case and lower case are the same.

    Raises:
      ModelNotFound: no preset of this name; the hint lists close ones.
    """
    keys = PRESETS.get(name.lower())
    if keys is None:
        hint = did_you_mean(name, PRESETS) or f"presets: {', '.join(PRESETS)}"
        raise ModelNotFound(f"no preset is named {name!r}", hint=hint)
    return config_from_hf(keys)
