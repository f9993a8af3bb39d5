"""Hugging Face's config.json to `LlamaConfig`.

The meaning of every key, and of its absence, is that of transformers 5.23 (`models/*/configuration_*.py` and
`modeling_*.py`). Code named in `auto_map` is never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from llama_jax.config.families import Family, find_family
from llama_jax.config.fields import Fields
from llama_jax.config.multimodal import text_model
from llama_jax.config.rope import rope_from_hf
from llama_jax.config.spec import Activation, AttentionKind, LayerSpec, LlamaConfig, MoeSpec, QueryScale
from llama_jax.errors import UnsupportedModel

MAX_LAYERS = 4096
"""More layers than any model has; keeps a damaged file from filling the memory with layer specs."""
MAX_EXPERTS = 131_072
"""Likewise, in all layers together."""

# Keys whose null says something else than their absence.
_NULLABLE = frozenset(
    (
        "head_dim",
        "num_key_value_heads",
        "sliding_window",
        "attention_chunk_size",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
)
_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_DTYPES = ("float32", "bfloat16", "float16")
_LAYER_TYPES: Mapping[str, AttentionKind] = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
}


def config_from_hf(
    hf: Mapping[str, Any], *, file: str = "config.json", names: Mapping[str, str] = MappingProxyType({})
) -> LlamaConfig:
    """Reads a config.json, old style or new, of a supported family or of a multimodal model around one.

    `quantization_config` says how weights are stored, not what the model is: `llama_jax.convert` reads it.

    Args:
      hf: the parsed file.
      file: what messages call it, where other metadata was translated into these keys.
      names: what that metadata calls a key, for messages (`rope_parameters.factor` for one that is inside another).

    Returns:
      The configuration; of a multimodal model, that of its text model.

    Raises:
      UnsupportedModel: an unknown model type, architecture, activation, rope type or layer type, or a value of the
        wrong type or out of range; the message names the key.
    """
    if not isinstance(hf, Mapping):
        raise UnsupportedModel("config.json does not hold a JSON object", hint="check the model's config.json")
    given = Fields(hf, file=file, names=names)
    if (text := text_model(hf)) is None:
        return _from_text(given, extra_architecture=None)
    _refuse_variants(given, (text.architecture,))
    return _from_text(given.within("text_config", text.config), extra_architecture=text.architecture)


def _from_text(given: Fields, *, extra_architecture: str | None) -> LlamaConfig:
    model_type = given.string("model_type")
    family = find_family(model_type)
    extra = (extra_architecture,) if extra_architecture else ()
    _refuse_variants(given, (family.architecture, *family.aliases, *extra))

    said = {key: value for key, value in given.values.items() if value is not None or key in _NULLABLE}
    f = replace(given, values={**family.defaults, **said})
    heads, kv_heads = f.integer("num_attention_heads"), f.integer("num_key_value_heads", None)
    hidden = f.integer("hidden_size")
    head_dim = f.integer("head_dim", None)
    if head_dim is None:
        if hidden % heads:
            raise UnsupportedModel(
                f"{f.file}: {f.name('hidden_size')}={hidden} is not a multiple of "
                f"{f.name('num_attention_heads')}={heads}",
                hint=f"give {f.name('head_dim')} in {f.file}",
            )
        head_dim = hidden // heads
    if kv_heads is not None and heads % kv_heads:
        raise f.bad("num_key_value_heads", kv_heads, f"a divisor of {f.name('num_attention_heads')}={heads}")
    layers = _layers(f, family)
    if head_dim % 2 and any(layer.rope for layer in layers):
        raise f.bad("head_dim", head_dim, "even, since rope turns pairs of numbers")
    activation = f.string("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise f.not_supported(f"{f.name('hidden_act')} {activation!r}", ", ".join(_ACTIVATIONS))
    max_positions = f.integer("max_position_embeddings")
    biased = f.boolean("attention_bias", False)
    return LlamaConfig(
        vocab_size=f.integer("vocab_size"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        layers=layers,
        rope=rope_from_hf(
            f, default_theta=family.theta, max_positions=max_positions, interleaved=family.interleaved_rope
        ),
        rms_norm_eps=f.number("rms_norm_eps"),
        activation=_ACTIVATIONS[activation],
        qkv_bias=biased if family.qkv_bias == "attention_bias" else family.qkv_bias,
        o_bias=biased if family.o_bias == "attention_bias" else family.o_bias,
        mlp_bias=family.mlp_bias and f.boolean("mlp_bias", False),
        tie_word_embeddings=f.boolean("tie_word_embeddings", False),
        max_position_embeddings=max_positions,
        dtype=_dtype(f),
        bos_token_id=f.token_id("bos_token_id", None),
        eos_token_ids=f.token_ids("eos_token_id", None),
        pad_token_id=f.token_id("pad_token_id", None),
        family=model_type,
        hf_mlp_module=family.mlp_module,
    )


def _refuse_variants(f: Fields, architectures: tuple[str, ...]) -> None:
    """Refuses keys that would change the numbers or the weights, rather than computing something else."""
    if f.get("per_layer_config"):
        raise f.not_supported(f.name("per_layer_config"), "one set of sizes for all layers")
    named = f.get("architectures", [])
    if not isinstance(named, (list, tuple)):
        raise f.bad("architectures", named, "a list of class names")
    if named and not any(name in architectures for name in named):
        raise UnsupportedModel(
            f"{f.file}: architecture {named[0]!r} is not supported",
            hint=f"supported here: {', '.join(architectures)}",
        )


def _dtype(f: Fields) -> str:
    key = "dtype" if f.get("dtype") is not None else "torch_dtype"
    dtype = f.string(key, "float32").removeprefix("torch.")
    if dtype not in _DTYPES:
        raise f.not_supported(f"{f.name(key)} {dtype!r}", ", ".join(_DTYPES))
    return dtype


def _layers(f: Fields, family: Family) -> tuple[LayerSpec, ...]:
    n = f.integer("num_hidden_layers", high=MAX_LAYERS)
    rope = _rope_layers(f, n) if family.nope else [True] * n
    attention = _attention(f, family, rope)
    mlps = _mlps(f, family, n)
    qk_norm = family.qk_norm if f.boolean("use_qk_norm", True) or family.qk_norm == "rms" else "none"
    scale = None
    if f.boolean("attn_temperature_tuning", False, integers=True) and "attn_scale" in family.defaults:
        scale = QueryScale(scale=f.number("attn_scale", positive=False), floor=f.integer("floor_scale"))
    return tuple(
        LayerSpec(
            attention=kind,
            window=window,
            rope=rotated,
            # Every layer has the learned norm; only those with rope have the unlearned one.
            qk_norm=qk_norm if rotated or qk_norm == "rms" else "none",
            query_scale=None if rotated else scale,
            mlp=mlp,
        )
        for rotated, (kind, window), mlp in zip(rope, attention, mlps, strict=True)
    )


def _rope_layers(f: Fields, n: int) -> list[bool]:
    """The layers that use rope; in no_rope_layers a 1 means that the layer does, in spite of the name."""
    flags = f.integers("no_rope_layers", low=0, high=1)
    if flags:
        if len(flags) < n:
            raise f.bad("no_rope_layers", flags, f"a list with an entry for each of the {n} layers")
        return [bool(flag) for flag in flags[:n]]
    interval = f.integer("no_rope_layer_interval", 4)
    return [(i + 1) % interval != 0 for i in range(n)]


def _attention(f: Fields, family: Family, rope: list[bool]) -> list[tuple[AttentionKind, int | None]]:
    """Attention kind and window of each layer."""
    n = len(rope)
    types = _layer_types(f, n)
    if family.windows == "none":
        return [("full", None)] * n
    if family.windows == "chunked":
        kinds: list[AttentionKind] = types or ["chunked" if rotated else "full" for rotated in rope]
        return _windowed(f, kinds, "chunked", f.integer("attention_chunk_size", None), "attention_chunk_size")

    window = f.integer("sliding_window", None)
    if family.windows == "all":
        kinds = ["full" if window is None else "sliding"] * n
        if types not in (None, kinds):
            raise UnsupportedModel(
                f"{f.file}: {f.name('layer_types')} disagrees with {f.name('sliding_window')}={window}",
                hint="this model type has either a window in every layer or none",
            )
    elif family.windows == "qwen":
        window = window if f.boolean("use_sliding_window", False) else None
        first = f.integer("max_window_layers", low=0)
        kinds = types or ["full" if window is None or i < first else "sliding" for i in range(n)]
    else:
        sliding = f.boolean("use_sliding_window", False) and window is not None
        kinds = types or ["sliding" if sliding and not rotated else "full" for rotated in rope]
    return _windowed(f, kinds, "sliding", window, "sliding_window")


def _windowed(
    f: Fields, kinds: list[AttentionKind], local: AttentionKind, window: int | None, key: str
) -> list[tuple[AttentionKind, int | None]]:
    """Pairs each layer with its window, refusing kinds that the family does not have."""
    for kind in kinds:
        if kind not in ("full", local):
            raise UnsupportedModel(
                f"{f.file}: {f.name('layer_types')} holds {kind}_attention, which this model type does not have",
                hint=f"supported here: full_attention, {local}_attention",
            )
        if kind == local and window is None:
            raise UnsupportedModel(
                f"{f.file}: {f.name('layer_types')} asks for {local}_attention without {key}",
                hint=f"give {key} in {f.file} (and use_sliding_window, where the model type has it)",
            )
    return [(kind, window if kind == local else None) for kind in kinds]


def _layer_types(f: Fields, n: int) -> list[AttentionKind] | None:
    types = f.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, (list, tuple)) or len(types) != n:
        raise f.bad("layer_types", types, f"a list with an entry for each of the {n} layers")
    for name in types:
        if not isinstance(name, str) or name not in _LAYER_TYPES:
            raise UnsupportedModel(
                f"{f.file}: {f.name('layer_types')} holds {name!r}, which is not supported",
                hint=f"supported: {', '.join(_LAYER_TYPES)}",
            )
    return [_LAYER_TYPES[name] for name in types]


def _mlps(f: Fields, family: Family, n: int) -> list[int | MoeSpec]:
    width = f.integer("intermediate_size")
    if family.experts is None:
        return [width] * n
    experts = f.integer("num_local_experts", high=MAX_EXPERTS // n)
    top_k = f.integer("num_experts_per_tok")
    if top_k > experts:
        raise f.bad("num_experts_per_tok", top_k, f"at most num_local_experts={experts}")
    if family.experts == "softmax":
        return [MoeSpec(experts, top_k, width)] * n
    moe = MoeSpec(experts, top_k, width, router="sigmoid", shared_intermediate_size=width)
    step = f.integer("interleave_moe_layer_step")
    chosen = f.integers("moe_layers", low=0, high=MAX_LAYERS)
    sparse = set(range(step - 1, n, step) if chosen is None else chosen)
    dense = f.integer("intermediate_size_mlp")
    return [moe if i in sparse else dense for i in range(n)]
