"""The metadata of a GGUF file besides its weights: the keys that llama.cpp's convert_hf_to_gguf.py writes.

Key names are those of llama.cpp's gguf-py/gguf/constants.py, through the tables of `convert.gguf_config`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llama_jax.config import LlamaConfig, RopeSpec, config_from_hf, config_to_hf
from llama_jax.convert.export.gguf_writer import Value
from llama_jax.convert.gguf_config import (
    ARCHITECTURES,
    BIASES,
    HEAD_DIM_KEYS,
    LLAMA3_CONTEXT,
    LLAMA4,
    OPTIONAL,
    REQUIRED,
    YARN_BETAS,
    config_dict,
    llama3_factors,
)
from llama_jax.convert.gguf_file import Tensor
from llama_jax.errors import UnsupportedModel
from llama_jax.params import param_specs

_HINT = "llama.cpp has no such model; export it with --to hf"


def architecture(config: LlamaConfig) -> str:
    """llama.cpp's name for a model's architecture.

    Raises:
      UnsupportedModel: it has none; names the family.
    """
    for arch, families in ARCHITECTURES.items():
        if config.family in families:
            return arch
    raise UnsupportedModel(f"models of type {config.family!r} cannot be exported to GGUF", hint=_HINT)


def rope_factors(config: LlamaConfig) -> np.ndarray | None:
    """The tensor `rope_freqs.weight` of "llama3" scaling, float32 [head_dim / 2]; None for other models."""
    rope = config.rope
    if rope.kind != "llama3":
        return None
    assert rope.original_max_positions is not None
    factors = llama3_factors(
        rope.theta, config.head_dim // 2, rope.factor, rope.high_freq_factor, rope.original_max_positions
    )
    return factors.astype(np.float32)


def model_metadata(config: LlamaConfig) -> dict[str, Value]:
    """The keys below the architecture's name.

    Raises:
      UnsupportedModel: GGUF cannot express the model, or llama.cpp would compute something else; names what.
    """
    arch = architecture(config)
    hf = config_to_hf(config)
    table = {**REQUIRED, **OPTIONAL}
    if arch == "llama4":
        table |= LLAMA4
        hf |= {"interleave_moe_layer_step": min(hf["moe_layers"], default=0) + 1}
    own = {key: hf[name] for key, name in table.items() if hf.get(name) is not None}
    own |= {"vocab_size": config.vocab_size, **dict.fromkeys(HEAD_DIM_KEYS, config.head_dim)} | _rope(config.rope)
    metadata = {f"{arch}.{key}": value for key, value in own.items()}
    _check(config, arch, metadata)
    return metadata


def _rope(rope: RopeSpec) -> dict[str, Value]:
    keys: dict[str, Value] = {"rope.freq_base": rope.theta}
    if rope.kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope.kind, "rope.scaling.factor": rope.factor}
    if rope.kind == "yarn" or (rope.kind == "llama3" and rope.original_max_positions != LLAMA3_CONTEXT):
        assert rope.original_max_positions is not None
        keys["rope.scaling.original_context_length"] = rope.original_max_positions
    if rope.kind == "yarn":
        keys |= {key: getattr(rope, name) for key, name in YARN_BETAS.items()}
    return keys


def _check(config: LlamaConfig, arch: str, metadata: Mapping[str, Value]) -> None:
    """One check for everything that the keys cannot say: who reads them must get the same model.

    Token ids are left to the tokenizer's keys, and the dtype to the tensors. The family may change, since llama.cpp
    calls Mistral "llama", if nothing that is computed does.
    """
    tensors = {spec.gguf: Tensor(spec.shape, 0, 0, 0) for spec in param_specs(config)}
    try:
        read = config_dict({"general.architecture": arch} | dict(metadata), tensors, rope_factors(config))
    except UnsupportedModel as e:
        raise UnsupportedModel(
            f"this {config.family!r} model cannot be exported to GGUF: {e.message}", hint=_HINT
        ) from e
    kept = ("family", "dtype", "bos_token_id", "eos_token_ids", "pad_token_id")
    found = config_from_hf(read).replace(**{name: getattr(config, name) for name in kept})
    differing = [name for name, value in vars(config).items() if getattr(found, name) != value]
    differing += [
        name for name in ("qkv_bias", "o_bias", "mlp_bias") if getattr(config, name) and name not in BIASES[arch]
    ]
    if arch == "qwen2" and config.q_dim != config.hidden_size:
        differing.append("head_dim")
    if differing:
        raise UnsupportedModel(
            f"this {config.family!r} model cannot be exported to GGUF: architecture {arch!r} of llama.cpp has no such "
            f"{', '.join(dict.fromkeys(differing))}",
            hint=_HINT,
        )
