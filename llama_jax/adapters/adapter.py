"""`Adapter`: what fine-tuning has changed of a model, as a tree of arrays."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from typing import Any

import jax
import numpy as np

from llama_jax.checkpoint.format import Digest
from llama_jax.config import LlamaConfig
from llama_jax.params import Params, by_leaf, canonical_specs, flatten


@dataclasses.dataclass(frozen=True)
class About:
    """The facts of an adapter that no gradient changes.

    Attributes:
      scales: the factor of each low-rank product, by dotted name of its leaf, in the order of the forward pass.
      peft: JSON text of the adapter_config.json that belongs to it.
      name: what it was loaded from.
    """

    scales: tuple[tuple[str, float], ...]
    peft: str = "{}"
    name: str = ""

    @property
    def base(self) -> str:
        """The model that it was made for, as adapter_config.json names it; "" if it does not."""
        return str(json.loads(self.peft).get("base_model_name_or_path") or "")


@partial(jax.tree_util.register_dataclass, data_fields=["low_rank", "whole"], meta_fields=["about"])
@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank changes of a model's weights (LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353) and weights that replace
    its own. A pytree: jit, grad and optimisers take it as it is, and every leaf of it is trained.

    Attributes:
      low_rank: shaped like the canonical parameters, with {"a" [r, in], "b" [out, r]} in place of a weight [out, in],
        and where there is one "magnitude" [out] (DoRA) and "b_bias" [out]. Routed experts have {"a" [experts, r, in],
        "b" [experts, out, r]} under "moe.experts.gate_up_proj" (out: gate, then up) and "moe.experts.down_proj";
        "embed" {"a" [r, vocab], "b" [hidden, r]}.
      whole: weights and biases in place of the model's, under their names in the canonical parameters.
      about: static.
    """

    low_rank: Params
    whole: Params
    about: About

    @property
    def rank(self) -> int:
        """The largest rank; 0 without low-rank weights."""
        return max((x.shape[-2] for name, x in flatten(self.low_rank).items() if name.endswith(".a")), default=0)

    @property
    def leaves(self) -> dict[str, dict[str, Any]]:
        """The members of each low-rank leaf, by dotted name."""
        return by_leaf(self.low_rank)

    @property
    def digest(self) -> str:
        """A digest of its arrays and factors."""
        found = Digest()
        found.update(repr(self.about.scales).encode())
        for path, x in sorted({**flatten(self.low_rank), **flatten(self.whole)}.items()):
            array = np.ascontiguousarray(x)
            found.update(repr((path, array.shape, array.dtype.name)).encode())
            found.update(array.reshape(-1).view(np.uint8))
        return str(found)

    def __repr__(self) -> str:
        return f"Adapter({self.about.name or 'unnamed'}, rank {self.rank}, {len(self.about.scales)} low-rank weights)"


def low_rank_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes [out, in], or [experts, out, in], of all leaves that can have low-rank weights."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in canonical_specs(config):
        if spec.path[-1] != "weight" or len(spec.shape) == 1 or spec.path[-2] == "router":
            continue
        if spec.leaf.endswith("moe.experts.up_proj"):
            continue
        if spec.leaf.endswith("moe.experts.gate_proj"):
            experts, width, into = spec.shape
            shapes[spec.leaf.replace("gate_proj", "gate_up_proj")] = (experts, 2 * width, into)
        elif spec.leaf == "embed":
            shapes[spec.leaf] = spec.shape[::-1]
        else:
            shapes[spec.leaf] = spec.shape
    if config.tie_word_embeddings:
        shapes["lm_head"] = (config.vocab_size, config.hidden_size)
    return shapes
