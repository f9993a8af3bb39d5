"""A model's source with an adapter merged into it while it is read, leaf by leaf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llama_jax.adapters.adapter import Adapter
from llama_jax.checkpoint.source import ModelSource, SourceTensor, provenance
from llama_jax.convert.quantizing import Wrapped
from llama_jax.errors import RequestError
from llama_jax.params import ParamSpec, by_leaf, canonical_specs, flatten


class MergedSource(Wrapped):
    """A source with an adapter added to its weights, in float32, before they are stored in their own dtype; see
    `checkpoint.source.ModelSource`.

    Raises:
      RequestError: the model is quantised, or has no place for something that the adapter adds.

    Attributes:
      change: a digest of the adapter.
    """

    def __init__(self, source: ModelSource, adapter: Adapter):
        if source.config.schemes:
            raise RequestError(
                f"{source.path} is quantised, and what an adapter adds cannot be added to codes",
                param="base",
                hint="give --dequantize, and quantise the merged model again, or load it with --adapter unmerged",
            )
        super().__init__(source)
        self.change = f"adapter {adapter.digest}"
        self._leaves, self._whole = adapter.leaves, flatten(adapter.whole)
        self._scales = dict(adapter.about.scales)
        self._embed = next(spec for spec in canonical_specs(source.config) if spec.leaf == "embed")
        tied = source.config.tie_word_embeddings
        touched = {*self._leaves, *by_leaf(adapter.whole)} & {"embed", "lm_head"}
        self._untied = tied and bool(touched)
        self.config = source.config.replace(tie_word_embeddings=False) if self._untied else source.config
        names = {spec.name for spec in canonical_specs(self.config)}
        for leaf, members in self._leaves.items():
            if "b_bias" in members and f"{leaf}.bias" not in names:
                raise RequestError(
                    f"the adapter adds a bias to {leaf}, which has none",
                    param="adapter",
                    hint="load the model with --adapter, unmerged",
                )

    def dtype(self, spec: ParamSpec) -> np.dtype:
        return self._inner.dtype(self._of_inner(spec))

    def provenance(self, spec: ParamSpec) -> Sequence[SourceTensor]:
        return provenance(self._inner, self._of_inner(spec))

    def read(self, spec: ParamSpec) -> np.ndarray:
        found = self._whole.get(spec.name)
        base = self._inner.read(self._of_inner(spec)) if found is None else found
        return self._merged(spec, base).astype(self.dtype(spec), copy=False)

    def _of_inner(self, spec: ParamSpec) -> ParamSpec:
        """The spec of the source's own tensor: tied, the output is the embedding."""
        return replace(self._embed) if self._untied and spec.leaf == "lm_head" else spec

    def _merged(self, spec: ParamSpec, base: np.ndarray) -> np.ndarray:
        block, _, name = spec.leaf.rpartition(".")
        if ".moe.experts" in spec.leaf:
            leaf = f"{block}.{'down_proj' if name == 'down_proj' else 'gate_up_proj'}"
            if leaf not in self._leaves:
                return base
            width = spec.shape[1]
            rows = slice(width, None) if name == "up_proj" else slice(0, width)
            return base.astype(np.float32) + self._product(leaf, rows)
        members = self._leaves.get(spec.leaf)
        if members is None:
            return base
        if spec.path[-1] == "bias":
            added = members.get("b_bias")
            if added is None:
                return base
            gain = self._gain(spec.leaf) if "magnitude" in members else 1.0
            return base.astype(np.float32) + gain * self._scales[spec.leaf] * added.astype(np.float32)
        product = self._product(spec.leaf)
        moved = base.astype(np.float32) + (product.T if spec.leaf == "embed" else product)
        return moved * self._gain(spec.leaf, moved)[:, None] if "magnitude" in members else moved

    def _product(self, leaf: str, rows: slice = slice(None)) -> np.ndarray:
        a, b = (self._leaves[leaf][member].astype(np.float32) for member in ("a", "b"))
        return self._scales[leaf] * np.matmul(b[..., rows, :], a)

    def _gain(self, leaf: str, moved: np.ndarray | None = None) -> np.ndarray:
        """DoRA's factor of each row."""
        if moved is None:
            spec = self._weights.get(leaf) or replace(self._embed, name="lm_head.weight")
            moved = self._inner.read(self._of_inner(spec)).astype(np.float32) + self._product(leaf)
        return self._leaves[leaf]["magnitude"].astype(np.float32) / np.linalg.norm(moved, axis=1)
