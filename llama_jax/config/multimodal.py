"""The text models inside multimodal ones: which part of a config.json is theirs, and what else their files hold.

The meaning of every key is that of transformers 5.23 (`models/{mllama,llama4,mistral3,llava,llava_next}`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from llama_jax.config.fields import Fields, bad
from llama_jax.errors import UnsupportedModel

MAX_SKIPPED = 4096


@dataclass(frozen=True)
class Wrapper:
    """One multimodal `model_type`.

    Attributes:
      architecture: its class.
      text_type: `model_type` of its text model when `text_config` names none.
      defaults: what absent keys of `text_config` mean, where that is not what they mean in a text model.
      fixed: keys that its text model does not read, and what it does instead.
      own_text_type: name of a text model that exists inside this one alone; it is read as `text_type`.
      cross_attention: `cross_attention_layers` when `text_config` lacks it; None if it has no such layers.
      extra_embeddings: rows of the embedding after the vocabulary, for tokens that represent an image.
    """

    architecture: str
    text_type: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    own_text_type: str = ""
    cross_attention: tuple[int, ...] | None = None
    extra_embeddings: int = 0


_MLLAMA_TEXT = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 131_072,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "pad_token_id": 128004,
}
_MLLAMA_FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": None,
    "tie_word_embeddings": False,
    "architectures": None,
}

WRAPPERS: Mapping[str, Wrapper] = MappingProxyType(
    {
        "llama4": Wrapper("Llama4ForConditionalGeneration", "llama4_text"),
        "mistral3": Wrapper("Mistral3ForConditionalGeneration", "mistral"),
        "llava": Wrapper("LlavaForConditionalGeneration", "llama"),
        "llava_next": Wrapper("LlavaNextForConditionalGeneration", "llama"),
        "mllama": Wrapper(
            "MllamaForConditionalGeneration",
            "llama",
            defaults=_MLLAMA_TEXT,
            fixed=_MLLAMA_FIXED,
            own_text_type="mllama_text_model",
            cross_attention=(3, 8, 13, 18, 23, 28, 33, 38),
            extra_embeddings=8,
        ),
    }
)


@dataclass(frozen=True)
class TextModel:
    """The text model of a multimodal checkpoint.

    Attributes:
      config: what its own config.json would hold.
      architecture: of the whole.
      skipped_layers: layers that look at images, which a text passes by; `config` counts without them.
      extra_embeddings: rows of the embedding behind those of the vocabulary.
    """

    config: Mapping[str, Any]
    architecture: str
    skipped_layers: frozenset[int] = frozenset()
    extra_embeddings: int = 0


def text_model(hf: Mapping[str, Any]) -> TextModel | None:
    """The text model of a multimodal config.json; None if `hf` is no such file.

    Raises:
      UnsupportedModel: `text_config` is missing, or a value has the wrong type; names the key.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in WRAPPERS:
        return None
    wrapper = WRAPPERS[model_type]
    text = hf.get("text_config")
    if not isinstance(text, Mapping):
        raise bad("text_config", text, "an object")
    merged = {"model_type": wrapper.text_type, **wrapper.defaults, **text}
    # What is said of the whole counts where the part is silent; the output projection belongs to the whole.
    for key in ("dtype", "torch_dtype", "tie_word_embeddings"):
        if hf.get(key) is not None and (text.get(key) is None or key == "tie_word_embeddings"):
            merged[key] = hf[key]
    merged |= wrapper.fixed
    skipped: frozenset[int] = frozenset()
    if wrapper.own_text_type:
        if merged["model_type"] not in (wrapper.text_type, wrapper.own_text_type):
            raise UnsupportedModel(
                f"config.json: text_config.model_type {merged['model_type']!r} is not supported",
                hint=f"supported here: {wrapper.own_text_type}",
            )
        merged["model_type"] = wrapper.text_type
    if wrapper.cross_attention is not None:
        f = Fields(merged, "text_config.")
        layers = f.integer("num_hidden_layers", high=MAX_SKIPPED)
        crossing = f.integers("cross_attention_layers", low=0, high=MAX_SKIPPED)
        skipped = frozenset(i for i in (wrapper.cross_attention if crossing is None else crossing) if i < layers)
        if len(skipped) == layers:
            raise bad("text_config.cross_attention_layers", crossing, "some of the layers, not all")
        merged["num_hidden_layers"] = layers - len(skipped)
    return TextModel(merged, wrapper.architecture, skipped, wrapper.extra_embeddings)
