"""The model families, as data: what an absent key of config.json means in each.

Source of every default: `models/<family>/configuration_<family>.py` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from llama_jax.config.spec import QkNorm


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face.

    Attributes:
      architecture: class name written to and accepted in `architectures`.
      defaults: value of each key when config.json lacks it; a key without default here is required.
      theta: rope base when config.json names none.
      qkv_bias, o_bias: fixed by the architecture, or "attention_bias" where config.json decides.
      mlp_bias: whether config.json's mlp_bias counts.
      qk_norm: of the layers with rope.
      windows: which layers see only a part of the context: "all" (when sliding_window is not null), "qwen" (those from
        max_window_layers on, or layer_types), "nope" (those without rope, or layer_types), "chunked" (those with
        rope, or layer_types), or "none".
      nope: whether some layers may go without rope.
      mlp_module: name of a layer's MLP in the checkpoints' tensor names.
      experts: router of the mixture of experts, or None for dense models.
    """

    architecture: str
    defaults: Mapping[str, Any]
    theta: float = 10_000.0
    qkv_bias: bool | Literal["attention_bias"] = False
    o_bias: bool | Literal["attention_bias"] = False
    mlp_bias: bool = False
    qk_norm: QkNorm = "none"
    windows: Literal["none", "all", "qwen", "nope", "chunked"] = "none"
    nope: bool = False
    experts: Literal["softmax", "sigmoid"] | None = None
    interleaved_rope: bool = False
    mlp_module: str = "mlp"
    aliases: tuple[str, ...] = field(default=())


def _defaults(**values: Any) -> Mapping[str, Any]:
    common = {"rms_norm_eps": 1e-6, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return MappingProxyType(common | values)


_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(
            architecture="LlamaForCausalLM",
            defaults=_defaults(**_LLAMA, intermediate_size=11008, max_position_embeddings=2048),
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            mlp_bias=True,
            aliases=("LLaMAForCausalLM",),
        ),
        "mistral": Family(
            architecture="MistralForCausalLM",
            defaults=_defaults(
                **_LLAMA,
                intermediate_size=14336,
                num_key_value_heads=8,
                max_position_embeddings=131072,
                sliding_window=4096,
            ),
            windows="all",
        ),
        "mixtral": Family(
            architecture="MixtralForCausalLM",
            defaults=_defaults(
                **_LLAMA,
                intermediate_size=14336,
                num_key_value_heads=8,
                max_position_embeddings=131072,
                rms_norm_eps=1e-5,
                sliding_window=None,
                num_local_experts=8,
                num_experts_per_tok=2,
            ),
            theta=1_000_000.0,
            windows="all",
            experts="softmax",
        ),
        "qwen2": Family(
            architecture="Qwen2ForCausalLM",
            defaults=_defaults(**_QWEN),
            qkv_bias=True,
            windows="qwen",
        ),
        "qwen3": Family(
            architecture="Qwen3ForCausalLM",
            defaults=_defaults(**_QWEN, head_dim=128),
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm="rms",
            windows="qwen",
        ),
        "smollm3": Family(
            architecture="SmolLM3ForCausalLM",
            defaults=_defaults(
                vocab_size=128256,
                hidden_size=2048,
                intermediate_size=11008,
                num_hidden_layers=36,
                num_attention_heads=16,
                num_key_value_heads=4,
                max_position_embeddings=32768,
                sliding_window=None,
                bos_token_id=128000,
                eos_token_id=128001,
                pad_token_id=128004,
                tie_word_embeddings=True,
            ),
            theta=2_000_000.0,
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            mlp_bias=True,
            windows="nope",
            nope=True,
        ),
        "llama4_text": Family(
            architecture="Llama4ForCausalLM",
            defaults=_defaults(
                vocab_size=202048,
                hidden_size=5120,
                intermediate_size=8192,
                intermediate_size_mlp=16384,
                num_hidden_layers=48,
                num_attention_heads=40,
                num_key_value_heads=8,
                head_dim=128,
                max_position_embeddings=131072,
                rms_norm_eps=1e-5,
                bos_token_id=1,
                eos_token_id=2,
                num_local_experts=16,
                num_experts_per_tok=1,
                interleave_moe_layer_step=1,
                use_qk_norm=True,
                attention_chunk_size=8192,
                attn_temperature_tuning=True,
                floor_scale=8192,
                attn_scale=0.1,
            ),
            theta=500_000.0,
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm="l2",
            windows="chunked",
            nope=True,
            experts="sigmoid",
            interleaved_rope=True,
            mlp_module="feed_forward",
        ),
    }
)
