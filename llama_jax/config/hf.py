"""Hugging Face's config.json to `LlamaConfig` and back.

The meaning of every key, and of its absence, is that of transformers 5.23 (`models/*/configuration_*.py` and
`modeling_*.py`). Code named in `auto_map` is never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_jax.config.families import Family, find_family
from llama_jax.config.fields import Fields, bad, not_supported
from llama_jax.config.multimodal import text_model
from llama_jax.config.rope import rope_from_hf, rope_to_hf
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
_ACTIVATIONS_TO_HF = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
_DTYPES = ("float32", "bfloat16", "float16")
_LAYER_TYPES: Mapping[str, AttentionKind] = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
}


def config_from_hf(hf: Mapping[str, Any]) -> LlamaConfig:
    """Reads a config.json, old style or new, of a supported family or of a multimodal model around one.

    `quantization_config` says how weights are stored, not what the model is: `llama_jax.convert` reads it.

    Args:
      hf: the parsed file.

    Returns:
      The configuration; of a multimodal model, that of its text model.

    Raises:
      UnsupportedModel: an unknown model type, architecture, activation, rope type or layer type, or a value of the
        wrong type or out of range; the message names the key.
    """
    if not isinstance(hf, Mapping):
        raise UnsupportedModel("config.json does not hold a JSON object", hint="check the model's config.json")
    if (text := text_model(hf)) is None:
        return _from_text(hf, prefix="", extra_architecture=None)
    _refuse_variants(Fields(hf), (text.architecture,))
    return _from_text(text.config, prefix="text_config.", extra_architecture=text.architecture)


def _from_text(hf: Mapping[str, Any], *, prefix: str, extra_architecture: str | None) -> LlamaConfig:
    given = Fields(hf, prefix)
    model_type = given.string("model_type")
    family = find_family(model_type)
    extra = (extra_architecture,) if extra_architecture else ()
    _refuse_variants(given, (family.architecture, *family.aliases, *extra))

    said = {key: value for key, value in hf.items() if value is not None or key in _NULLABLE}
    f = Fields({**family.defaults, **said}, prefix)
    heads = f.integer("num_attention_heads")
    hidden = f.integer("hidden_size")
    head_dim = f.integer("head_dim", None)
    if head_dim is None:
        if hidden % heads:
            raise UnsupportedModel(
                f"config.json: {f.name('hidden_size')}={hidden} is not a multiple of num_attention_heads={heads}",
                hint="give head_dim in config.json",
            )
        head_dim = hidden // heads
    activation = f.string("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise not_supported(f"{f.name('hidden_act')} {activation!r}", ", ".join(_ACTIVATIONS))
    max_positions = f.integer("max_position_embeddings")
    biased = f.boolean("attention_bias", False)
    return LlamaConfig(
        vocab_size=f.integer("vocab_size"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=f.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        layers=_layers(f, family),
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
    """Refuses what would change the numbers or the weights, rather than computing something else."""
    if f.get("per_layer_config"):
        raise not_supported(f.name("per_layer_config"), "one set of sizes for all layers")
    named = f.get("architectures", [])
    if not isinstance(named, (list, tuple)):
        raise bad(f.name("architectures"), named, "a list of class names")
    if named and not any(name in architectures for name in named):
        raise UnsupportedModel(
            f"config.json: architecture {named[0]!r} is not supported",
            hint=f"supported here: {', '.join(architectures)}",
        )


def _dtype(f: Fields) -> str:
    key = "dtype" if f.get("dtype") is not None else "torch_dtype"
    dtype = f.string(key, "float32").removeprefix("torch.")
    if dtype not in _DTYPES:
        raise not_supported(f"{f.name(key)} {dtype!r}", ", ".join(_DTYPES))
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
            # The learned norm stands in every layer, the unlearned one only beside rope.
            qk_norm=qk_norm if rotated or qk_norm == "rms" else "none",
            query_scale=None if rotated else scale,
            mlp=mlp,
        )
        for rotated, (kind, window), mlp in zip(rope, attention, mlps, strict=True)
    )


def _rope_layers(f: Fields, n: int) -> list[bool]:
    """Which layers rotate; in no_rope_layers a 1 means that the layer does, in spite of the name."""
    flags = f.integers("no_rope_layers", low=0, high=1)
    if flags:
        if len(flags) < n:
            raise bad(f.name("no_rope_layers"), flags, f"a list with an entry for each of the {n} layers")
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
                f"config.json: {f.name('layer_types')} disagrees with sliding_window={window}",
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
                f"config.json: {f.name('layer_types')} holds {kind}_attention, which this model type does not have",
                hint=f"supported here: full_attention, {local}_attention",
            )
        if kind == local and window is None:
            raise UnsupportedModel(
                f"config.json: {f.name('layer_types')} asks for {local}_attention without {key}",
                hint=f"give {key} in config.json (and use_sliding_window, where the model type has it)",
            )
    return [(kind, window if kind == local else None) for kind in kinds]


def _layer_types(f: Fields, n: int) -> list[AttentionKind] | None:
    types = f.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, (list, tuple)) or len(types) != n:
        raise bad(f.name("layer_types"), types, f"a list with an entry for each of the {n} layers")
    for name in types:
        if not isinstance(name, str) or name not in _LAYER_TYPES:
            raise UnsupportedModel(
                f"config.json: {f.name('layer_types')} holds {name!r}, which is not supported",
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
        raise bad(f.name("num_experts_per_tok"), top_k, f"at most num_local_experts={experts}")
    if family.experts == "softmax":
        return [MoeSpec(experts, top_k, width)] * n
    moe = MoeSpec(experts, top_k, width, router="sigmoid", shared_intermediate_size=width)
    step = f.integer("interleave_moe_layer_step")
    chosen = f.integers("moe_layers", low=0, high=MAX_LAYERS)
    sparse = set(range(step - 1, n, step) if chosen is None else chosen)
    dense = f.integer("intermediate_size_mlp")
    return [moe if i in sparse else dense for i in range(n)]


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
    if (read := config_from_hf(hf).replace(schemes=config.schemes)) != config:
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
