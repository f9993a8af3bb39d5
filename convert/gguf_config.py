"""GGUF metadata to the keys of Hugging Face's config.json (names: llama.cpp, gguf-py/gguf/constants.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.convert.gguf_file import Tensor
from llama_jax.errors import UnsupportedModel

ROPE_FACTORS = "rope_freqs.weight"

_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3"}
PERMUTED = frozenset(("llama", "smollm3"))
"""Architectures whose query and key rows llama.cpp stores in the order of interleaved rope."""

_READ = {
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "expert_count",
    "expert_used_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
}
_NEUTRAL: Mapping[str, Any] = {
    "attention.causal": True,
    "expert_shared_count": 0,
    "expert_feed_forward_length": 0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "use_parallel_residual": False,
}
"""Keys that are not read, with the only value that changes nothing."""


def config_dict(
    metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], factors: np.ndarray | None
) -> dict[str, Any]:
    """Translates the metadata of a GGUF file.

    Args:
      metadata: of the file.
      tensors: of the file; their names and shapes say what the metadata does not (biases, tied embeddings, vocabulary).
      factors: the tensor `rope_freqs.weight`, [head_dim / 2], by which llama.cpp divides the rope frequencies; or None.

    Returns:
      What config.json would hold.

    Raises:
      UnsupportedModel: the architecture, or a key that would change the numbers; names it.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in _MODEL_TYPES:
        raise UnsupportedModel(
            f"GGUF architecture {arch!r} is not supported", hint=f"supported: {', '.join(sorted(_MODEL_TYPES))}"
        )
    if metadata.get("split.count", 1) > 1:
        raise UnsupportedModel(
            "GGUF files in several parts are not supported yet", hint="join them with gguf-split --merge"
        )
    own = {k.removeprefix(f"{arch}."): v for k, v in metadata.items() if k.startswith(f"{arch}.")}
    for key, value in own.items():
        if key not in _READ and (key not in _NEUTRAL or value != _NEUTRAL[key]):
            raise UnsupportedModel(
                f"GGUF key {arch}.{key} = {value!r} is not supported", hint="use the safetensors weights"
            )

    def need(key: str) -> Any:
        if key not in own:
            raise UnsupportedModel(f"GGUF file without {arch}.{key}", hint="the file is damaged or no language model")
        if isinstance(own[key], list):
            raise UnsupportedModel(f"GGUF key {arch}.{key} differs between layers", hint="use the safetensors weights")
        return own[key]

    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UnsupportedModel("GGUF file without token_embd.weight", hint="the file is damaged or no language model")
    heads, hidden = need("attention.head_count"), need("embedding_length")
    if not isinstance(heads, int) or heads < 1:
        raise UnsupportedModel(f"GGUF key {arch}.attention.head_count = {heads!r}", hint="the file is damaged")
    head_dim = own.get("attention.key_length", own.get("rope.dimension_count", hidden // heads))
    if not isinstance(head_dim, int):
        raise UnsupportedModel(f"GGUF key {arch}.attention.key_length = {head_dim!r}", hint="the file is damaged")
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            raise UnsupportedModel(
                f"GGUF key {arch}.{key} = {own[key]!r} differs from the head size {head_dim}",
                hint="supported: rope over whole heads, values as wide as keys",
            )
    eos = [
        metadata[f"tokenizer.ggml.{k}_token_id"] for k in ("eos", "eot") if f"tokenizer.ggml.{k}_token_id" in metadata
    ]
    config = {
        "model_type": _model_type(arch, own),
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": need("context_length"),
        "rope_parameters": _rope(arch, own, factors),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(eos)) or None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }
    if window := own.get("attention.sliding_window"):
        config["sliding_window"] = window
    if arch == "smollm3":
        # Fixed in llama.cpp, which does not write it into the file (llama-model.cpp, n_no_rope_layer_step).
        config["no_rope_layer_interval"] = 4
    if experts := own.get("expert_count"):
        config |= {"num_local_experts": experts, "num_experts_per_tok": need("expert_used_count")}
    return config


def _model_type(arch: str, own: Mapping[str, Any]) -> str:
    """llama.cpp's "llama" is also what Mistral and Mixtral are."""
    if arch == "llama" and own.get("expert_count"):
        return "mixtral"
    if own.get("attention.sliding_window"):
        if arch == "llama":
            return "mistral"
        raise UnsupportedModel(
            f"GGUF key {arch}.attention.sliding_window is not supported", hint="use the safetensors weights"
        )
    if own.get("expert_count"):
        raise UnsupportedModel(f"GGUF key {arch}.expert_count is not supported", hint="use the safetensors weights")
    return _MODEL_TYPES[arch]


def _rope(arch: str, own: Mapping[str, Any], factors: np.ndarray | None) -> dict[str, Any]:
    theta = own.get("rope.freq_base", 10000.0)
    kind = own.get("rope.scaling.type", "none")
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0))
    if "rope.scaling.type" not in own and factor != 1.0:
        kind = "linear"
    if factors is not None:
        if kind != "none":
            raise UnsupportedModel(f"GGUF file with both {ROPE_FACTORS} and rope scaling {kind!r}", hint=_ROPE_HINT)
        return _llama3(theta, factors)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn"):
        raise UnsupportedModel(f"GGUF rope scaling {kind!r} is not supported", hint=_ROPE_HINT)
    rope = {"rope_type": kind, "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        if "rope.scaling.original_context_length" not in own:
            raise UnsupportedModel(f"GGUF file without {arch}.rope.scaling.original_context_length", hint=_ROPE_HINT)
        rope["original_max_position_embeddings"] = own["rope.scaling.original_context_length"]
    return rope


_ROPE_HINT = "use the safetensors weights, whose config.json says how rope is scaled"


def _llama3(theta: float, factors: np.ndarray) -> dict[str, Any]:
    """Recovers the parameters of "llama3" scaling from the factors that llama.cpp's converter computed from them.

    All published models share low_freq_factor=1, high_freq_factor=4 and 8192 original positions and differ in `factor`,
    which is the largest of the factors. The others must then come out equal, or the file is refused.
    """
    low, high, original = 1.0, 4.0, 8192
    found = factors.astype(np.float64)
    factor = float(str(np.float32(factors.max())))
    inverse = theta ** -(np.arange(len(found)) / len(found))
    smooth = (original * inverse / (2 * math.pi) - low) / (high - low)
    expected = 1 / np.where(smooth > 1, 1.0, np.where(smooth < 0, 1 / factor, (1 - smooth) / factor + smooth))
    if not np.allclose(found, expected, rtol=1e-4, atol=0):
        raise UnsupportedModel(f"the rope factors in {ROPE_FACTORS} follow no known scaling", hint=_ROPE_HINT)
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
