"""Meta's params.json to the keys of Hugging Face's config.json.

Key names and defaults: `ModelArgs` in https://github.com/meta-llama/llama-models, models/llama3/args.py. What the file
does not say (the context length, the factor of scaled rope) is fixed in Meta's code or model cards; the rules below
give what the config.json of the same model on the Hugging Face hub says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_jax.config.fields import MAX_INT, Fields, bad
from llama_jax.config.hf import MAX_LAYERS
from llama_jax.config.rope import rope_to_hf
from llama_jax.config.spec import RopeSpec
from llama_jax.errors import CheckpointError, UnsupportedModel

PARAMS = "params.json"

_READ = {
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "ffn_dim_multiplier",
    "norm_eps",
    "rope_theta",
    "use_scaled_rope",
    "rope_scaling_factor",
    "rope_high_freq_factor",
}
NAMES: Mapping[str, str] = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "dim / n_heads",
    "intermediate_size": "the width of the MLP",
    "rms_norm_eps": "norm_eps",
    "rope_parameters.rope_theta": "rope_theta",
    "rope_parameters.factor": "rope_scaling_factor",
    "rope_parameters.high_freq_factor": "rope_high_freq_factor",
}
"""The names in params.json of the keys of config.json, for messages."""
_IGNORED = {"max_batch_size", "max_seq_len"}
"""Keys about running Meta's own program, not about the model."""
_VISION = "use the model's Hugging Face weights; vision models are not supported in Meta's own format"
_HINTS: Mapping[str, str] = {
    "moe_args": "Llama 4 is not supported in Meta's own format; use its Hugging Face weights",
    "vision_args": _VISION,
    "vision_model": _VISION,
    "vision_chunk_size": _VISION,
    "quantization_args": "use the model's bfloat16 weights",
    "lora_args": "use the model's bfloat16 weights",
}


def config_dict(
    params: Mapping[str, Any], *, vocab_size: int, tied: bool, dtype: str, bos: int, byte_level: bool
) -> dict[str, Any]:
    """Translates params.json.

    Args:
      params: the parsed file.
      vocab_size: rows of the embedding; params.json may say -1, "as many as the tokenizer has".
      tied: whether the output projection is the embedding.
      dtype: of the weights.
      bos: id of the token that begins a text; the next one ends it.
      byte_level: whether the tokenizer is a byte-level BPE (Llama 3 and later) or SentencePiece's (before).

    Returns:
      What config.json would hold.

    Raises:
      UnsupportedModel: a key that is unknown, missing, or out of range; names it.
      CheckpointError: vocab_size is not that of the embedding.
    """
    for key, value in params.items():
        if key not in _READ | _IGNORED and value not in (None, False) and (key, value) != ("vision_chunk_size", -1):
            raise UnsupportedModel(
                f"{PARAMS}: key {key!r:.100} is not supported", hint=_HINTS.get(key, "use the Hugging Face weights")
            )
    f = Fields(params, file=PARAMS)
    dim, heads = f.integer("dim"), f.integer("n_heads")
    if dim % heads:
        raise bad("dim", dim, f"a multiple of n_heads={heads}", PARAMS)
    stated = f.integer("vocab_size", -1, low=-1)
    if stated not in (-1, vocab_size):
        raise CheckpointError(
            f"{PARAMS} says vocab_size={stated}, the embedding has {vocab_size} rows",
            hint=f"{PARAMS} and the weights do not belong together, or a file is missing",
        )
    kv_heads = f.integer("n_kv_heads", heads)
    if heads % kv_heads:
        raise bad("n_kv_heads", kv_heads, f"a divisor of n_heads={heads}", PARAMS)
    layers, eps = f.integer("n_layers", high=MAX_LAYERS), f.number("norm_eps")
    theta, scaled = f.number("rope_theta", 10_000.0), f.boolean("use_scaled_rope", False)
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": dim,
        "intermediate_size": _intermediate_size(f, dim),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim // heads,
        "rms_norm_eps": eps,
        "max_position_embeddings": _context(
            byte_level=byte_level,
            scaled=scaled,
            theta=theta,
            # Llama 1 had an epsilon of 1e-6, but for its largest model, which unlike Llama 2's has no grouped heads.
            llama1=eps < 5e-6 or (kv_heads == heads and layers > 40),
        ),
        "rope_parameters": _rope(f, theta, scaled=scaled, tied=tied),
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": bos,
        "eos_token_id": bos + 1,
        "dtype": dtype,
    }


def _intermediate_size(f: Fields, dim: int) -> int:
    """`FeedForward.__init__` in models/llama3/model.py: two thirds of 4 * dim, times a factor, rounded up."""
    multiple = f.integer("multiple_of", 256)
    width = f.number("ffn_dim_multiplier", 1.0) * (8 * dim // 3)
    rounded = multiple * -(-int(min(width, MAX_INT)) // multiple)
    if rounded >= MAX_INT:
        raise bad(
            "ffn_dim_multiplier", f.get("ffn_dim_multiplier"), f"such that the MLP is narrower than {MAX_INT}", PARAMS
        )
    return rounded


def _context(*, byte_level: bool, scaled: bool, theta: float, llama1: bool) -> int:
    """Positions that the model was made for, which params.json does not hold."""
    if byte_level:
        return 131_072 if scaled else 8192
    if theta > 10_000.0:
        return 16_384  # Code Llama
    return 2048 if llama1 else 4096


def _rope(f: Fields, theta: float, *, scaled: bool, tied: bool) -> dict[str, Any]:
    if not scaled:
        return rope_to_hf(RopeSpec(theta))
    # `apply_scaling` in models/llama3/model.py says 8. Llama 3.2 1B and 3B, the ones with tied embeddings, were made
    # with 32, as their config.json says.
    factor = f.number("rope_scaling_factor", 32.0 if tied else 8.0)
    high = f.number("rope_high_freq_factor", 4.0)
    return rope_to_hf(RopeSpec(theta, "llama3", factor, 8192, high_freq_factor=high))
