"""Costs of an engine's steps, counted from their contents: bytes that one device moves, and its arithmetic."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
from jax.typing import DTypeLike

from llama_jax.config import LayerSpec, LlamaConfig, MoeSpec
from llama_jax.layout import local_heads
from llama_jax.plan.costs import attended, attended_by_all, last_token_params, matmul_params, read_bytes, token_bytes
from llama_jax.sharding import AnyMesh
from llama_jax.targets import Target

_FOR_EVER = 1 << 40
"""Longer than any text."""


@dataclass(frozen=True)
class Peak:
    """Peak rates of a device: bytes/s of reads and FLOP/s in the dtype that it computes in; None where not known.

    Attributes:
      source: "measured" or "data sheet".
    """

    bytes_per_s: float | None
    flops_per_s: float | None
    source: str = "measured"

    @classmethod
    def of(cls, target: Target, dtype: str) -> Self | None:
        """By the data sheet; None where the table has neither rate."""
        rates = target.bandwidth or None, target.rates.of(dtype) or None
        return cls(*rates, source="data sheet") if any(rates) else None


@dataclass(frozen=True)
class Load:
    """Content of one dispatch.

    Attributes:
      steps: how often each decoding row draws.
      lengths: tokens of each decoding row behind the last of the steps.
      chunks: (first token, number of tokens, whether the next one is drawn) of each part of a prompt.
    """

    steps: int
    lengths: list[int]
    chunks: list[tuple[int, int, bool]]

    @property
    def tokens(self) -> int:
        """Tokens of one of its steps."""
        return len(self.lengths) + sum(count for _, count, _ in self.chunks)


class StepCosts:
    """Sums over a model's parameters and layers, computed once, so that only a step's contents remain to be counted."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, mesh: AnyMesh = None, kv_dtype: str | None = None):
        """Counts for the busiest device.

        Args:
          config: as `layout.split_config` gives it for the mesh.
          dtype: of the arithmetic and, without `kv_dtype`, of the cache.
        """
        itemsize = np.dtype(dtype).itemsize
        self._config, self._last = config, config.layers[-1]
        alike = {(layer.attention, layer.window): layer for layer in config.layers}
        counts = Counter((layer.attention, layer.window) for layer in config.layers)
        self._kinds = [(layer, counts[kind]) for kind, layer in alike.items()]  # layers that see alike, and how many
        self._token_bytes = token_bytes(config, itemsize, mesh, kv_dtype)
        self._pair_flops = 4 * local_heads(config, mesh)[0] * config.head_dim
        self._once = last_token_params(config, mesh)
        self._each = matmul_params(config, 1, mesh) - self._once
        # From this many tokens on, every expert may be used.
        moes = [layer.mlp for layer in config.layers if isinstance(layer.mlp, MoeSpec)]
        self._all_experts = max((-(-moe.num_experts // moe.top_k) for moe in moes), default=1)
        self._weights = functools.cache(lambda tokens: read_bytes(config, itemsize, tokens, mesh))

    def total(self, loads: Iterable[Load]) -> tuple[float, float]:
        """Bytes and FLOPs of some dispatches: in each step the weights that it uses once, keys and values that its
        tokens see and those that it stores. The scores of prompts (`prompt_logprobs`) are not counted."""
        moved = flops = 0.0
        decoding: dict[int, list[int]] = defaultdict(list)
        for load in loads:
            moved += load.steps * self._weights(min(load.tokens, self._all_experts))
            decoding[load.steps] += load.lengths
            for chunk in load.chunks:
                seen, computed = self._chunk(*chunk)
                moved, flops = moved + seen, flops + computed
        for steps, lengths in decoding.items():
            drawn, pairs = steps * len(lengths), self._pairs(steps, lengths)
            moved += self._token_bytes * (pairs + drawn * self._config.num_layers)
            flops += 2 * drawn * (self._each + self._once) + self._pair_flops * pairs
        return moved, flops

    def _pairs(self, steps: int, lengths: list[int]) -> int:
        """Pairs of a token that decoding rows draw behind and one that it sees, of all layers."""
        at = np.subtract.outer(np.asarray(lengths, np.int64), np.arange(steps))
        return sum(n * int(np.minimum(at, attended(layer, _FOR_EVER)).sum()) for layer, n in self._kinds)

    def _chunk(self, start: int, count: int, draws: bool) -> tuple[float, float]:
        """Bytes of the cache that a part of a prompt reads and writes, and its FLOPs."""
        end = start + count

        def pairs(layer: LayerSpec) -> int:
            return attended_by_all(layer, end) - attended_by_all(layer, start)

        read = sum(n * (attended(layer, start + 1) - 1) for layer, n in self._kinds)
        # The last layer computes what is needed of the last token alone.
        seen = sum(n * pairs(layer) for layer, n in self._kinds) - pairs(self._last)
        seen += draws * attended(self._last, end)
        products = 2 * (count * self._each + draws * self._once)
        return self._token_bytes * (read + count * self._config.num_layers), products + self._pair_flops * seen
