"""Maps each canonical leaf to the tensors of a Hugging Face checkpoint that make it up, in all layouts in use.

Mixtures of experts come in three: a tensor per expert and projection, as saved by transformers (`w1`, `w3`, `w2`) or by
quantisers (`gate_proj`, `up_proj`, `down_proj`); all experts' gate and up projections in one, `gate_up_proj`
[expert, 2 * mlp, embed] (Mixtral in memory since transformers 5); and the same transposed, [expert, embed, 2 * mlp]
(Llama 4).
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from llama_jax.config.families import renamed
from llama_jax.params import ParamSpec

_EXPERTS = re.compile(r"layers\.(\d+)\.moe\.experts\.(gate|up|down)_proj\.weight")
_SHORT = {"gate": "w1", "up": "w3", "down": "w2"}


@dataclass(frozen=True)
class Recipe:
    """The recipe for one leaf.

    Attributes:
      sources: the tensor that holds the leaf, or one for each expert.
      shape: the shape that each of them must have; it may have more rows than the leaf.
      part: 0 or 1 for the first or second half of a fused gate and up projection, None for the whole.
      transposed: the source's last two dimensions stand the other way round.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    part: int | None = None
    transposed: bool = False


def recipe(spec: ParamSpec, names: Container[str], *, extra_embeddings: int = 0) -> Recipe:
    """Finds how to make a leaf from the tensors called `names`; if no layout fits, that of `spec.hf`.

    Args:
      spec: the leaf.
      names: of the existing tensors, in the style of text-only models (`Names.plain`).
      extra_embeddings: rows of the embedding's tensor behind those of the leaf.
    """
    match = _EXPERTS.fullmatch(spec.name)
    if match:
        return _experts(spec, int(match[1]), match[2], names)
    if spec.name == "embed.weight":
        return Recipe((spec.hf,), (spec.shape[0] + extra_embeddings, *spec.shape[1:]))
    short_router = spec.hf.replace(".block_sparse_moe.gate.", ".mlp.gate.")
    if spec.name.endswith(".moe.router.weight") and spec.hf not in names and short_router in names:
        return Recipe((short_router,), spec.shape)
    return Recipe((spec.hf,), spec.shape)


def _experts(spec: ParamSpec, layer: int, short: str, names: Container[str]) -> Recipe:
    """The layouts of a stack of experts."""
    prefix, (experts, out, inner) = f"model.layers.{layer}", spec.shape
    part = {"gate": 0, "up": 1, "down": None}[short]
    fused = "down_proj" if part is None else "gate_up_proj"
    rows = out if part is None else 2 * out
    if f"{prefix}.mlp.experts.{fused}" in names:
        return Recipe((f"{prefix}.mlp.experts.{fused}",), (experts, rows, inner), part)
    single = [
        f"{prefix}.mlp.experts.{{e}}.{_SHORT[short]}.weight",
        f"{prefix}.mlp.experts.{{e}}.{short}_proj.weight",
        f"{prefix}.feed_forward.experts.{{e}}.{short}_proj.weight",
    ]
    own = [spec.hf] if "{e}" in spec.hf else []
    found = next((name for name in own + single if name.format(e=0) in names), own[0] if own else None)
    if found is not None:
        return Recipe(tuple(found.format(e=e) for e in range(experts)), (out, inner))
    return Recipe((f"{prefix}.feed_forward.experts.{fused}",), (experts, inner, rows), part, transposed=True)


# Frequencies that old checkpoints carry although they follow from the config.
_BUFFERS = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
CACHE_SCALE = re.compile(
    r"(?:.*\.)?self_attn\.(?:(?:[qkv]|qkv)_proj\.|attn\.)?"
    r"(?:(?:kv|[qkv]|prob|output|prob_output)(?:_cache)?_(?:scale|scale_inv|global_scale|zero_point))"
)
"""Scales of queries, keys, values and weights of attention for a cache kept in FP8 or INT8; vLLM, llm-compressor, Quark
and ModelOpt each have their own names (`maybe_remap_kv_scale_name` in vLLM's model_loader/weight_utils.py)."""
_OTHER_TOWERS = re.compile(r"(model\.)?(vision_tower|vision_model|multi_modal_projector|image_newline)\b.*")
_TEXT_PREFIXES = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")


@dataclass(frozen=True)
class Names:
    """The tensor names of one checkpoint.

    Attributes:
      multimodal: whether the text model is a part of it.
      skipped_layers: layers that a text-only model does not have.
      modules: the family's names of modules, each with Llama's.
    """

    multimodal: bool = False
    skipped_layers: frozenset[int] = frozenset()
    modules: Mapping[str, str] = MappingProxyType({})

    def plain(self, name: str) -> str | None:
        """The name of a tensor as a text-only model would have it; None if it carries no weight of the text model."""
        if self.multimodal:
            if _OTHER_TOWERS.fullmatch(name):
                return None
            for prefix, plain in _TEXT_PREFIXES:
                if name.startswith(prefix):
                    name = plain + name.removeprefix(prefix)
                    break
        name = renamed(name, self.modules)
        if self.skipped_layers and (found := _LAYER.fullmatch(name)):
            layer = int(found[1])
            if layer in self.skipped_layers:
                return None
            name = f"model.layers.{layer - sum(i < layer for i in self.skipped_layers)}.{found[2]}"
        return None if _BUFFERS.fullmatch(name) else name
