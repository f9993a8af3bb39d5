"""Which tensors of a Hugging Face checkpoint make up each canonical leaf, in all layouts in use.

Mixtures of experts come in three: a tensor per expert and projection, as saved by transformers (`w1`, `w3`, `w2`); all
experts' gate and up projections in one, `gate_up_proj` [expert, 2 * mlp, embed] (Mixtral in memory since transformers
5); and the same transposed, [expert, embed, 2 * mlp] (Llama 4).
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass

from llama_jax.params import ParamSpec

_EXPERTS = re.compile(r"layers\.(\d+)\.moe\.experts\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class Recipe:
    """How one leaf is made.

    Attributes:
      sources: the tensor that holds the leaf, or one for each expert.
      shape: the shape that each of them must have.
      part: 0 or 1 for the first or second half of a fused gate and up projection, None for the whole.
      transposed: the source's last two dimensions stand the other way round.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    part: int | None = None
    transposed: bool = False


def recipe(spec: ParamSpec, names: Container[str]) -> Recipe:
    """How to make a leaf from the tensors called `names`; where several layouts fit none, that of `spec.hf`."""
    match = _EXPERTS.fullmatch(spec.name)
    if match:
        layer, short = f"model.layers.{match[1]}", match[2]
        experts, out, inner = spec.shape
        part = {"gate": 0, "up": 1, "down": None}[short]
        fused = "down_proj" if part is None else "gate_up_proj"
        rows = out if part is None else 2 * out
        if f"{layer}.mlp.experts.{fused}" in names:
            return Recipe((f"{layer}.mlp.experts.{fused}",), (experts, rows, inner), part)
        if "{e}" in spec.hf:
            return Recipe(tuple(spec.hf.format(e=e) for e in range(experts)), (out, inner))
        return Recipe((f"{layer}.feed_forward.experts.{fused}",), (experts, inner, rows), part, transposed=True)
    short_router = spec.hf.replace(".block_sparse_moe.gate.", ".mlp.gate.")
    if spec.name.endswith(".moe.router.weight") and spec.hf not in names and short_router in names:
        return Recipe((short_router,), spec.shape)
    return Recipe((spec.hf,), spec.shape)


# Frequencies that old checkpoints carry although they follow from the config.
_BUFFERS = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
_OTHER_TOWERS = re.compile(r"(model\.)?(vision_tower|vision_model|multi_modal_projector|image_newline)\b.*")
_TEXT_PREFIXES = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)


def text_name(name: str, *, multimodal: bool) -> str | None:
    """The name of a tensor as a text-only model would have it; None if it carries no weight of the text model."""
    if multimodal:
        if _OTHER_TOWERS.fullmatch(name):
            return None
        for prefix, plain in _TEXT_PREFIXES:
            if name.startswith(prefix):
                name = plain + name.removeprefix(prefix)
                break
    return None if _BUFFERS.fullmatch(name) else name
