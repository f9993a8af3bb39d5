"""GGUF metadata to the keys of Hugging Face's config.json (names: llama.cpp, gguf-py/gguf/constants.py).

The tables here serve both ways: `convert.export.gguf_metadata` writes by them what this module reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.config.fields import bad
from llama_jax.config.rope import rope_to_hf
from llama_jax.config.spec import RopeSpec
from llama_jax.convert.gguf_file import Tensor
from llama_jax.errors import UnsupportedModel

ROPE_FACTORS = "rope_freqs.weight"

ARCHITECTURES = {
    "llama": ("llama", "mistral", "mixtral"),
    "llama4": ("llama4_text",),
    "qwen2": ("qwen2",),
    "qwen3": ("qwen3",),
    "smollm3": ("smollm3",),
}
"""llama.cpp's architectures, each with the model types it covers; the first unless something says otherwise."""
PERMUTED = frozenset(("llama", "smollm3"))
"""Architectures whose query and key rows llama.cpp stores in the order of interleaved rope."""
BIASES: Mapping[str, tuple[str, ...]] = {
    "llama": ("qkv_bias", "o_bias", "mlp_bias"),
    **dict.fromkeys(("llama4", "qwen2", "qwen3", "smollm3"), ("qkv_bias",)),
}
"""Biases (fields of LlamaConfig) that llama.cpp has in each architecture: `load_arch_tensors` in its src/models."""

REQUIRED: Mapping[str, str] = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""Keys that every model has (below its architecture's name), and their names in config.json."""
OPTIONAL: Mapping[str, str] = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.sliding_window": "sliding_window",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}
"""The same of keys that some models have."""
LLAMA4: Mapping[str, str] = {
    "feed_forward_length": "intermediate_size_mlp",
    "expert_feed_forward_length": "intermediate_size",
    "interleave_moe_layer_step": "interleave_moe_layer_step",
    "expert_count": "num_local_experts",
}
"""Keys that Llama 4 has in addition, or under another name."""
HEAD_DIM_KEYS = ("attention.key_length", "rope.dimension_count", "attention.value_length")
"""Keys that all hold the size of a head in the models that are supported."""
EOS_KEYS = ("eos", "eot", "eom")
"""Keys of ids that end a text: `tokenizer.ggml.<key>_token_id`."""
_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}
"""Named tokens of config.json, and their names in GGUF keys."""
ROPE: Mapping[str, str] = {
    "rope.freq_base": "rope_theta",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
"""Keys of every kind of rope, and their names in `rope_parameters` of config.json."""
YARN_BETAS: Mapping[str, str] = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}

NO_ID = (-1, 0xFFFFFFFF)
"""Ids that mean "no token": -1, and the same as an unsigned number of 32 bits (llama.cpp's LLAMA_TOKEN_NULL)."""
METADATA = "GGUF metadata"
"""The name of a file's keys in messages."""

_READ = {
    *REQUIRED,
    *OPTIONAL,
    *HEAD_DIM_KEYS,
    *YARN_BETAS,
    "vocab_size",
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
"""Keys that are not read, with the only value that has no effect."""
_SAFETENSORS = "use the safetensors weights"
NO_MODEL = "this is not a complete language model; use another GGUF file, or the model's safetensors weights"
_OTHER_KINDS = {
    "adapter": (
        "a LoRA adapter",
        "merge it into its base with llama.cpp's `llama-export-lora`, and give the result",
    ),
    "mmproj": ("the part of a multimodal model that reads images", "give the GGUF file of the text model beside it"),
    "imatrix": ("an importance matrix for quantising", "give the GGUF file of the model itself"),
    "vocab": ("a vocabulary without weights", "give the GGUF file of the model itself"),
}
"""Values of general.type of files that are not models: what they are, and what to do."""


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
    arch, kind = metadata.get("general.architecture"), metadata.get("general.type")
    if isinstance(kind, str) and kind in _OTHER_KINDS:
        what, hint = _OTHER_KINDS[kind]
        raise UnsupportedModel(f"the GGUF file holds {what}, not a model (general.type is {kind!r})", hint=hint)
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise UnsupportedModel(
            f"GGUF architecture {arch!r} is not supported", hint=f"supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    own = {k.removeprefix(f"{arch}."): v for k, v in metadata.items() if k.startswith(f"{arch}.")}
    for key, value in own.items():
        if (
            key not in _READ
            and not (arch == "llama4" and key in LLAMA4)
            and (key not in _NEUTRAL or value != _NEUTRAL[key])
        ):
            raise UnsupportedModel(f"GGUF key {arch}.{key} = {value!r} is not supported", hint=_SAFETENSORS)

    def need(key: str) -> Any:
        if key not in own:
            raise UnsupportedModel(f"GGUF file without {arch}.{key}", hint=NO_MODEL)
        if isinstance(own[key], list):
            raise UnsupportedModel(f"GGUF key {arch}.{key} differs between layers", hint=_SAFETENSORS)
        return own[key]

    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UnsupportedModel("GGUF file without token_embd.weight", hint=NO_MODEL)
    heads, hidden = need("attention.head_count"), need("embedding_length")
    if not isinstance(heads, int) or heads < 1:
        raise bad(f"{arch}.attention.head_count", heads, "a positive integer", METADATA)
    head_dim = next((own[key] for key in HEAD_DIM_KEYS[:2] if key in own), hidden // heads)
    if not isinstance(head_dim, int):
        raise bad(f"{arch}.attention.key_length", head_dim, "an integer", METADATA)
    for key in HEAD_DIM_KEYS:
        if own.get(key, head_dim) != head_dim:
            raise UnsupportedModel(
                f"GGUF key {arch}.{key} = {own[key]!r} differs from the head size {head_dim}",
                hint="supported: rope over whole heads, values as wide as keys",
            )
    eos = [found for key in EOS_KEYS if (found := _token_id(metadata, key)) is not None]
    config = {name: need(key) for key, name in REQUIRED.items()}
    config |= {
        "model_type": _model_type(arch, own),
        "vocab_size": embedding.shape[0],
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_parameters": _rope(arch, own, factors),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "bos_token_id": _token_id(metadata, "bos"),
        "eos_token_id": list(dict.fromkeys(eos)) or None,
        "pad_token_id": _token_id(metadata, "padding"),
        "dtype": "float32",
    }
    if window := own.get("attention.sliding_window"):
        config["sliding_window"] = window
    if arch == "smollm3":
        # Fixed in llama.cpp, which does not write it into the file (llama-model.cpp, n_no_rope_layer_step).
        config["no_rope_layer_interval"] = 4
    if experts := own.get("expert_count"):
        config |= {"num_local_experts": experts, "num_experts_per_tok": need("expert_used_count")}
    if arch == "llama4":
        config |= {name: need(key) for key, name in LLAMA4.items()}
        config |= {
            # Fixed in llama.cpp, as in all published models: chunks of 8192 and no rope in every fourth layer, query
            # scales there, and norms of heads in all models but that of 128 experts (src/models/llama4.cpp).
            "attention_chunk_size": 8192,
            "no_rope_layer_interval": 4,
            "attn_temperature_tuning": True,
            "floor_scale": 8192,
            "attn_scale": 0.1,
            "use_qk_norm": experts != 128,
        }
    return config


def key_names(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The names in a GGUF file of the keys of `config_dict`, for messages about their values."""
    arch = metadata.get("general.architecture")
    head_dim = next((key for key in HEAD_DIM_KEYS if f"{arch}.{key}" in metadata), "embedding_length")
    llama4 = LLAMA4 if arch == "llama4" else {}
    own = {
        **{name: key for table in (REQUIRED, OPTIONAL, llama4) for key, name in table.items()},
        **{f"rope_parameters.{name}": key for table in (ROPE, YARN_BETAS) for key, name in table.items()},
        "head_dim": head_dim,
    }
    tokens = {f"{ours}_token_id": f"tokenizer.ggml.{key}_token_id" for ours, key in _TOKENS.items()}
    return {name: f"{arch}.{key}" for name, key in own.items()} | tokens | {"vocab_size": "rows of token_embd.weight"}


def _token_id(metadata: Mapping[str, Any], key: str) -> Any:
    """The id of a named token; None where the file says that there is none."""
    found = metadata.get(f"tokenizer.ggml.{key}_token_id")
    return None if found in NO_ID else found


def _model_type(arch: str, own: Mapping[str, Any]) -> str:
    """llama.cpp's "llama" is also what Mistral and Mixtral are."""
    if arch == "llama" and own.get("expert_count"):
        return "mixtral"
    if own.get("attention.sliding_window") or (arch == "llama4" and "attention.sliding_window" in own):
        if arch == "llama":
            return "mistral"
        raise UnsupportedModel(f"GGUF key {arch}.attention.sliding_window is not supported", hint=_SAFETENSORS)
    if own.get("expert_count") and arch != "llama4":
        raise UnsupportedModel(f"GGUF key {arch}.expert_count is not supported", hint=_SAFETENSORS)
    return ARCHITECTURES[arch][0]


def _rope(arch: str, own: Mapping[str, Any], factors: np.ndarray | None) -> dict[str, Any]:
    theta = own.get("rope.freq_base", 10000.0)
    kind = own.get("rope.scaling.type", "none")
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0))
    if "rope.scaling.type" not in own and factor != 1.0:
        kind = "linear"
    if factors is not None:
        if kind != "none":
            raise UnsupportedModel(f"GGUF file with both {ROPE_FACTORS} and rope scaling {kind!r}", hint=_ROPE_HINT)
        return _llama3(theta, factors, own.get("rope.scaling.original_context_length", LLAMA3_CONTEXT))
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn"):
        raise UnsupportedModel(f"GGUF rope scaling {kind!r} is not supported", hint=_ROPE_HINT)
    rope = {"rope_type": kind, "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        if "rope.scaling.original_context_length" not in own:
            raise UnsupportedModel(f"GGUF file without {arch}.rope.scaling.original_context_length", hint=_ROPE_HINT)
        rope["original_max_position_embeddings"] = own["rope.scaling.original_context_length"]
        rope |= {name: own[key] for key, name in YARN_BETAS.items() if key in own}
    return rope


_ROPE_HINT = "use the safetensors weights, whose config.json says how rope is scaled"


LLAMA3_LOW, LLAMA3_HIGHS, LLAMA3_CONTEXT = 1.0, (4.0, 1.0), 8192
"""low_freq_factor, high_freq_factor and original positions of all published models with "llama3" scaling; Llama 4 has
the second high_freq_factor."""


def llama3_factors(theta: float, size: int, factor: float, high: float, original: int) -> np.ndarray:
    """Divisors of the rope frequencies under "llama3" scaling.

    Args:
      theta: base of the frequencies.
      size: how many there are, head_dim / 2.
      factor: by which the lowest frequencies are divided.
      high: high_freq_factor; low_freq_factor is 1.
      original: positions seen in pre-training.

    Returns:
      float64 [size].
    """
    turns = original * theta ** -(np.arange(size) / max(1, size)) / (2 * math.pi)
    ramp = (turns - LLAMA3_LOW) / (high - LLAMA3_LOW) if high > LLAMA3_LOW else np.where(turns > high, 1.0, 0.0)
    smooth = np.clip(ramp, 0.0, 1.0)
    return 1 / ((1 - smooth) / factor + smooth)


def _llama3(theta: float, factors: np.ndarray, original: int) -> dict[str, Any]:
    """Recovers the parameters of "llama3" scaling from the factors that llama.cpp's converter computed from them.

    `factor` is the largest of the factors. The others must then come out equal, or the file is refused.
    """
    factor = float(str(np.float32(factors.max(initial=1.0))))
    for high in LLAMA3_HIGHS:
        expected = llama3_factors(theta, len(factors), factor, high, original)
        if np.allclose(factors.astype(np.float64), expected, rtol=1e-4, atol=0):
            return rope_to_hf(RopeSpec(theta, "llama3", factor, original, LLAMA3_LOW, high))
    raise UnsupportedModel(f"the rope factors in {ROPE_FACTORS} follow no known scaling", hint=_ROPE_HINT)
