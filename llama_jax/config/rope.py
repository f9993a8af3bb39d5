"""Rotary embedding parameters in config.json: reading the old and the new style, and writing them.

Old: `rope_theta` beside `rope_scaling: {"type" | "rope_type": ..., "factor": ...}`. New (transformers 5): everything in
`rope_parameters`. The rules of precedence are those of `RotaryEmbeddingConfigMixin` in transformers'
modeling_rope_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from llama_jax.config.fields import MISSING, Fields
from llama_jax.config.spec import RopeKind, RopeSpec
from llama_jax.errors import UnsupportedModel


def rope_from_hf(fields: Fields, *, default_theta: float, max_positions: int, interleaved: bool) -> RopeSpec:
    """The rope of a config.json.

    Args:
      fields: the whole config.
      default_theta: base of the family when no key gives one.
      max_positions: max_position_embeddings, the stand-in for an absent original context length, in tokens.
      interleaved: whether the family rotates neighbouring pairs.

    Raises:
      UnsupportedModel: unknown rope type, partial rotation, rope per layer type, or a value out of range.
    """
    # An old-style dict that is not empty wins over a new-style one, whole.
    key = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    values = fields.get(key, {})
    if not isinstance(values, Mapping):
        raise fields.bad(key, values, "an object")
    scaling = fields.within(key, values)
    for name, value in values.items():
        if isinstance(value, Mapping):
            raise UnsupportedModel(
                f"{fields.file}: {scaling.name(name)} gives a layer type its own rope, which is not supported",
                hint="supported: one rope for all layers",
            )
    for place in (scaling, fields):
        rotated = place.number("partial_rotary_factor", 1.0, positive=False)
        if rotated != 1.0:
            what = f"{place.name('partial_rotary_factor')}={rotated}"
            raise place.not_supported(what, "1.0, the whole head is rotated")
    kind = scaling.string("rope_type", None) or scaling.string("type", "default")
    if kind not in get_args(RopeKind):
        raise fields.not_supported(f"rope type {kind!r}", ", ".join(get_args(RopeKind)))
    place = fields if scaling.get("rope_theta") is None else scaling
    theta = place.number("rope_theta", default_theta)
    # A base of 1 or less gives equal or growing frequencies; yarn divides by its logarithm.
    if theta <= 1.0:
        raise place.bad("rope_theta", theta, "greater than 1")
    base = {"theta": theta, "kind": kind, "interleaved": interleaved}
    if kind == "default":
        return RopeSpec(**base)
    if kind == "linear":
        return RopeSpec(**base, factor=scaling.number("factor"))
    if kind == "dynamic":
        # transformers measures the growth against max_position_embeddings, whatever else the file says.
        return RopeSpec(**base, factor=scaling.number("factor"), original_max_positions=max_positions)

    # A length beside the rope dict wins over the one inside it.
    original = fields.integer("original_max_position_embeddings", None) or scaling.integer(
        "original_max_position_embeddings", max_positions
    )
    if kind == "llama3":
        return RopeSpec(
            **base,
            factor=scaling.number("factor"),
            original_max_positions=original,
            low_freq_factor=scaling.number("low_freq_factor"),
            high_freq_factor=scaling.number("high_freq_factor"),
        )
    # In yarn a factor of null asks for the ratio of the two context lengths; a missing one is an error.
    ratio = max_positions / original if "factor" in values else MISSING
    truncate = values.get("truncate", True)
    if truncate is not None and not isinstance(truncate, bool):
        raise scaling.bad("truncate", truncate, "true or false")
    return RopeSpec(
        **base,
        factor=scaling.number("factor", ratio),
        original_max_positions=original,
        beta_fast=scaling.number("beta_fast", 0.0, positive=False) or 32.0,
        beta_slow=scaling.number("beta_slow", 0.0, positive=False) or 1.0,
        attention_factor=scaling.number("attention_factor", None, positive=False),
        mscale=scaling.number("mscale", None, positive=False),
        mscale_all_dim=scaling.number("mscale_all_dim", None, positive=False),
        truncate=bool(truncate),
    )


def rope_to_hf(rope: RopeSpec) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 writes them; keys that a kind does not read are left out."""
    result: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind == "default":
        return result
    result["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        result["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "llama3":
        result |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        result |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        optional = ("attention_factor", "mscale", "mscale_all_dim")
        result |= {name: value for name in optional if (value := getattr(rope, name)) is not None}
    return result
