"""The model families, as data: the meaning of absent keys of config.json, and the names of tensors.

Source of every default: `models/<family>/configuration_<family>.py` of transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from llama_jax import plugins
from llama_jax.config.fields import not_supported
from llama_jax.config.multimodal import WRAPPERS
from llama_jax.config.spec import QkNorm

Windows = Literal["none", "all", "qwen", "nope", "chunked"]
Router = Literal["softmax", "sigmoid"]


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
      tensor_names: what the family's checkpoints call modules, by Llama's names for them; modules left out have
        Llama's. "{n}" stands for a layer, "{e}" for an expert:
        {"model.layers.{n}.self_attn.q_proj": "transformer.h.{n}.attn.q"}.
    """

    architecture: str
    defaults: Mapping[str, Any]
    theta: float = 10_000.0
    qkv_bias: bool | Literal["attention_bias"] = False
    o_bias: bool | Literal["attention_bias"] = False
    mlp_bias: bool = False
    qk_norm: QkNorm = "none"
    windows: Windows = "none"
    nope: bool = False
    experts: Router | None = None
    interleaved_rope: bool = False
    mlp_module: str = "mlp"
    aliases: tuple[str, ...] = field(default=())
    tensor_names: Mapping[str, str] = field(default=MappingProxyType({}))


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
_MISTRAL = {
    **_LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
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
            defaults=_defaults(**_MISTRAL, sliding_window=4096),
            windows="all",
        ),
        "mixtral": Family(
            architecture="MixtralForCausalLM",
            defaults=_defaults(
                **_MISTRAL,
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
"""The families of this package."""


def find_family(model_type: str) -> Family:
    """The family of a `model_type`: one of this package, or of a plugin (`llama_jax.plugins.FAMILIES`).

    Raises:
      UnsupportedModel: there is none.
    """
    if (family := FAMILIES.get(model_type)) is not None:
        return family
    added = {plugin.name: plugin.value for plugin in plugins.sound(plugins.FAMILIES)}
    if model_type in added:
        return added[model_type]
    supported = ", ".join([*FAMILIES, *WRAPPERS, *added])
    raise not_supported(f"model type {model_type!r}", supported + plugins.reports(plugins.FAMILIES))


def plugin_problem(plugin: plugins.Plugin, earlier: Sequence[plugins.Plugin]) -> str:
    """Describes the fault of a plugin that should add a family; "" if it has none."""
    family = plugin.value
    if not isinstance(family, Family):
        return "it is not a llama_jax.config.families.Family"
    if plugin.name in (*FAMILIES, *WRAPPERS, *(p.name for p in earlier)):
        return f"there is another model type {plugin.name!r}"
    for key, allowed in (
        ("qkv_bias", (True, False, "attention_bias")),
        ("o_bias", (True, False, "attention_bias")),
        ("qk_norm", get_args(QkNorm)),
        ("windows", get_args(Windows)),
        ("experts", (None, *get_args(Router))),
    ):
        if getattr(family, key) not in allowed:
            return f"its {key} is {getattr(family, key)!r}, not one of {', '.join(map(repr, allowed))}"
    if family.windows == "chunked" and "attention_chunk_size" not in family.defaults:
        return "its windows are chunked, and its defaults have no attention_chunk_size"
    for ours, theirs in family.tensor_names.items():
        holes = _HOLE.findall(ours)
        if sorted(holes) != sorted(_HOLE.findall(theirs)) or len(set(holes)) < len(holes):
            return f"its tensor names {ours!r} and {theirs!r} do not have the same holes, each once"
    if len(set(family.tensor_names.values())) < len(family.tensor_names):
        return "its tensor_names give two modules one name"
    return ""


_HOLE = re.compile(r"{(\w)}")


def renamed(name: str, names: Mapping[str, str]) -> str:
    """A tensor's name with its module renamed: "a.3.q.weight" is "b.3.wq.weight" by {"a.{n}.q": "b.{n}.wq"}.

    Args:
      names: as `Family.tensor_names`; a tensor of another module keeps its name.
    """
    for old, new in names.items():
        pattern = re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(old))
        if found := re.fullmatch(rf"{pattern}(?P<rest>(\.\w+)?)", name):
            return _HOLE.sub(lambda hole: found[hole[1]], new) + found["rest"]
    return name
