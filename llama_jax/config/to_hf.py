"""`LlamaConfig` to Hugging Face's config.json, in the style of transformers 5; `hf` reads it back."""

from __future__ import annotations

from typing import Any

from llama_jax.config.families import Family, find_family
from llama_jax.config.hf import config_from_hf
from llama_jax.config.rope import rope_to_hf
from llama_jax.config.spec import LlamaConfig, MoeSpec
from llama_jax.errors import UnsupportedModel

_ACTIVATIONS_TO_HF = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """Writes a config.json in the style of transformers 5, with every key that its family reads. How weights are stored
    (`config.schemes`) is not among them.

    Raises:
      UnsupportedModel: the config does not fit its `family`, so that reading the result would give another config.
    """
    family = find_family(config.family)
    eos = config.eos_token_ids
    hf: dict[str, Any] = {
        "architectures": [family.architecture],
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "dtype": config.dtype,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "head_dim": config.head_dim,
        "hidden_act": _ACTIVATIONS_TO_HF[config.activation],
        "hidden_size": config.hidden_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": config.family,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope_to_hf(config.rope),
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if family.qkv_bias == "attention_bias":
        hf["attention_bias"] = config.qkv_bias
    if family.mlp_bias:
        hf["mlp_bias"] = config.mlp_bias
    hf |= _mlps_to_hf(config, family) | _layers_to_hf(config, family)
    # One check for everything that a family's keys cannot say.
    if (read := config_from_hf(hf).replace(schemes=config.schemes, activations=config.activations)) != config:
        differing = [name for name, value in vars(config).items() if getattr(read, name) != value]
        raise UnsupportedModel(
            f"a config.json of model type {config.family!r} cannot express {', '.join(differing)} of this config",
            hint="choose the family whose features the config uses",
        )
    return hf


def _mlps_to_hf(config: LlamaConfig, family: Family) -> dict[str, Any]:
    dense = [layer.mlp for layer in config.layers if not isinstance(layer.mlp, MoeSpec)]
    sparse = [layer.mlp for layer in config.layers if isinstance(layer.mlp, MoeSpec)]
    width = dense[0] if dense else sparse[0].intermediate_size
    hf: dict[str, Any] = {"intermediate_size": width}
    if family.experts is not None and sparse:
        hf["intermediate_size"] = sparse[0].intermediate_size
        hf |= {"num_local_experts": sparse[0].num_experts, "num_experts_per_tok": sparse[0].top_k}
    if family.experts == "sigmoid":
        hf["intermediate_size_mlp"] = width
        hf["moe_layers"] = [i for i, layer in enumerate(config.layers) if isinstance(layer.mlp, MoeSpec)]
    return hf


def _layers_to_hf(config: LlamaConfig, family: Family) -> dict[str, Any]:
    """The keys about attention windows, rope layers, norms and query scales."""
    hf: dict[str, Any] = {}
    local = [i for i, layer in enumerate(config.layers) if layer.attention != "full"]
    window = config.layers[local[0]].window if local else None
    if family.windows in ("qwen", "nope", "chunked"):
        hf["layer_types"] = [f"{layer.attention}_attention" for layer in config.layers]
    if family.windows in ("all", "qwen", "nope"):
        hf["sliding_window"] = window
    if family.windows in ("qwen", "nope"):
        hf["use_sliding_window"] = bool(local)
    if family.windows == "qwen":
        # Older readers know only this key: the windows begin at this layer.
        hf["max_window_layers"] = local[0] if local else config.num_layers
    if family.windows == "chunked":
        # transformers wants a size even when no layer uses it.
        hf["attention_chunk_size"] = window or family.defaults["attention_chunk_size"]
    if family.nope:
        hf["no_rope_layers"] = [int(layer.rope) for layer in config.layers]
    if family.qk_norm == "l2":
        hf["use_qk_norm"] = any(layer.qk_norm == "l2" for layer in config.layers)
        scale = next((layer.query_scale for layer in config.layers if layer.query_scale), None)
        hf["attn_temperature_tuning"] = scale is not None
        if scale:
            hf |= {"attn_scale": scale.scale, "floor_scale": scale.floor}
    return hf
