"""Bytes of one device: arguments and results of the programs, and the temporary memory they need while they run.

Arguments and results follow from the table of parameters, the sharding rules and the cache's layout, to the byte except
for a few scalars. Temporary memory models XLA's buffer assignment (jaxlib 0.11.2, checked for the shapes in
`tests/test_plan.py`): at any moment one block runs, so it is the largest of a block's intermediate results, plus
activations that live across them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

from llama_jax.config import LayerSpec, LlamaConfig, MoeSpec
from llama_jax.decode import buckets
from llama_jax.decode.chunks import written_bytes
from llama_jax.kernels.dispatch import REFERENCE
from llama_jax.layout import local_size, split_config
from llama_jax.model.fuse import JOINED
from llama_jax.params import param_specs
from llama_jax.plan.backends import Backends, backends
from llama_jax.plan.costs import held_bytes, token_bytes
from llama_jax.plan.decoded import decoded_bytes
from llama_jax.plan.workload import Calls, Workload, calls
from llama_jax.sharding import AnyMesh, on, ruled
from llama_jax.targets import Target

_STATE_ROW = 132
"""Bytes of a row in the state of decoding besides its cache: last token and its position, flags, limits, sampling."""

_STATE_SCALARS = 4

PAGE_SIZE = 64


@dataclass(frozen=True)
class Bytes:
    """Of one program on one device, under the names of XLA's memory analysis.

    Attributes:
      aliased: of the outputs, those that take the place of donated arguments.
    """

    arguments: int
    outputs: int
    aliased: int
    temporary: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporary


def cache_bytes(config: LlamaConfig, mesh: AnyMesh, itemsize: int, slots: int, kv_dtype: str | None = None) -> int:
    """Bytes on each device of keys and values of all layers in `slots` slots, of one row or several.

    Args:
      config: as the model is computed on the mesh.
    """
    return config.num_layers * slots * token_bytes(config, itemsize, mesh, kv_dtype)


@dataclass(frozen=True)
class DeviceShare:
    """The share of a model that one device of a mesh holds.

    Attributes:
      model: as it is read.
      mesh: its sizes and rules; devices are not asked for.
      itemsize: bytes of a number of activations, weights, unless a scheme gives some others, and cache, unless it
        is in `kv_dtype`.
    """

    model: LlamaConfig
    target: Target
    mesh: AnyMesh
    itemsize: int
    kv_dtype: str | None = None

    @cached_property
    def config(self) -> LlamaConfig:
        """The model as it is computed on the mesh: with key/value heads repeated where there are too few."""
        return split_config(self.model, self.mesh)

    def of(self, axis: str, size: int) -> int:
        """The size of one device's part of a dimension."""
        return ruled(self.mesh).share(axis, size)

    @cached_property
    def weights(self) -> int:
        """Parameters, in the layout of `fuse`, which has as many numbers as the canonical one."""
        return held_bytes(self.config, self.itemsize, self.mesh)

    @cached_property
    def loading(self) -> int:
        """Peak while the weights are read, with key/value heads that do not divide whole on each device, and while one
        layer's joint projections are made of parts that are still there."""
        read = held_bytes(self.model, self.itemsize, self.mesh)
        joint: Counter[str] = Counter()
        for spec in param_specs(self.config):
            if spec.path[-2] in JOINED and "experts" not in spec.path:
                joint[spec.path[1]] += local_size(spec, self.config, self.mesh) * spec.itemsize(self.itemsize)
        return max(read, self.weights) + max(joint.values())

    def cache(self, rows: int, slots: int) -> int:
        """Keys and values of all layers. A layer with a window keeps as many as the others."""
        return cache_bytes(self.config, self.mesh, self.itemsize, rows * slots, self.kv_dtype)

    def paged_cache(self, rows: int, tokens: int, page_size: int = PAGE_SIZE) -> int:
        """As `cache`, of as many pages as the tokens need; with the page table and the positions."""
        pages = -(-tokens // page_size)
        return self.cache(rows, pages * page_size) + 4 * rows * pages * (1 + page_size)

    def prefill(self, rows: int, tokens: int, capacity: int, backends: Backends) -> Bytes:
        """The first chunk of the prompts into a new cache; in later ones the cache is donated."""
        tables = 4 * rows * capacity
        logits = 4 * rows * self.of("vocab", self.config.vocab_size)
        return Bytes(
            arguments=self.weights + 8 * rows * tokens,
            outputs=logits + self.cache(rows, capacity) + tables,
            aliased=0,
            temporary=self.temporary(rows, tokens, capacity, backends, unwritten=self._last_keys(rows, capacity)),
        )

    def decode(self, rows: int, capacity: int, backends: Backends) -> Bytes:
        """One step, with all of its state donated."""
        state = self.state(rows, capacity)
        return Bytes(self.weights + state, state, state, self.temporary(rows, 1, capacity, backends))

    def state(self, rows: int, capacity: int) -> int:
        """Cache, the positions in it, and the numbers of each row."""
        return self.cache(rows, capacity) + rows * (4 * capacity + _STATE_ROW) + _STATE_SCALARS

    def _last_keys(self, rows: int, capacity: int) -> int:
        """Bytes that XLA uses for other arrays until the last layer's keys are written there."""
        return self.cache(rows, capacity) // (2 * self.config.num_layers)

    def temporary(self, rows: int, tokens: int, capacity: int, backends: Backends, *, unwritten: int = 0) -> int:
        """Of a call with `tokens` tokens in each of `rows` rows, over a cache of `capacity` slots.

        Args:
          unwritten: bytes of an output in which what lives across blocks lies, and one array of a block, if they fit.
        """
        on_cpu = self.target.vendor == "cpu"
        pieces = buckets.pieces(rows, tokens, ruled(self.mesh).ways("mlp"))
        tokens //= pieces
        # The residual, and its norm. XLA's GPU compiler writes both in float32 too; a kernel writes others like them.
        size = rows * tokens * self.config.hidden_size
        live = norm = size * self.itemsize
        live += 8 * size if backends.norm == REFERENCE and not on_cpu else 0
        if norm <= unwritten:
            live, norm = 0, 0 if on_cpu else norm
        live += (pieces - 1) * 2 * norm  # of the piece that waits for its all-reduce
        *before, last = self.config.layers
        of_all, of_last = (
            Counter(decoded_bytes(self.config, self.itemsize, self.mesh, self.target, n)) for n in (rows * tokens, rows)
        )
        decoded = of_all if before else of_last
        blocks = [norm + self._attention(rows, tokens if before else 1, capacity, backends) + decoded["attn"]]
        blocks += [self._mlp(layer, rows * tokens, backends, of_all, norm, unwritten) for layer in set(before)]
        blocks += [self._mlp(last, rows, backends, of_last, norm)]  # of the last token alone
        logits = norm + 4 * rows * self.of("vocab", self.config.vocab_size) + of_last["head"]
        if backends.norm != REFERENCE:
            blocks.append(3 * norm)
        return live + max(*blocks, logits) + (self._expert_copies(self.config.layers) if on_cpu else 0)

    def _attention(self, rows: int, tokens: int, capacity: int, backends: Backends) -> int:
        """Bytes that attention of one layer writes: see `written_bytes`. The reference decodes a quantised cache first:
        keys and values lie beside the logits, and give way to the weights."""
        with on(ruled(self.mesh)):
            written = written_bytes(backends.attention, self.config, self.itemsize, rows, tokens, capacity)
        if self.kv_dtype is None or not written:
            return written
        decoded = rows * capacity * token_bytes(self.config, self.itemsize, self.mesh)
        return max(written, written * 4 // (4 + self.itemsize) + decoded)

    def _mlp(
        self,
        layer: LayerSpec,
        tokens: int,
        backends: Backends,
        decoded: Mapping[str, int],
        norm: int,
        unwritten: int = 0,
    ) -> int:
        """gate and up beside what they are made of, or with their product; of routed experts, for each of a token's
        experts, with what they are made of."""
        if not isinstance(layer.mlp, MoeSpec):
            each = tokens * self.of("mlp", layer.mlp) * self.itemsize
            made_of = norm + decoded["mlp"]
            on_cpu = self.target.vendor == "cpu"
            return max(2 * each + made_of, (2 if on_cpu and each <= unwritten else 3) * each + decoded["down"])
        moe = layer.mlp
        rows = tokens * moe.top_k * self.of("mlp", moe.intermediate_size) * self.itemsize
        beside = norm + max(decoded["mlp"], decoded["down"], decoded["moe"])
        if backends.moe != REFERENCE:
            return 3 * rows + beside
        # On GPUs the ragged product of the reference first transposes the experts of a layer.
        copies = 0 if self.target.vendor == "cpu" else self._expert_copies([layer])
        return 4 * rows + copies + beside

    def _expert_copies(self, layers: Iterable[LayerSpec]) -> int:
        """Every routed expert of these layers. XLA's CPU compiler transposes those of all layers before the first
        runs."""
        total = 0
        for layer in layers:
            if isinstance(layer.mlp, MoeSpec):
                width = self.of("mlp", layer.mlp.intermediate_size)
                total += 3 * layer.mlp.num_experts * width * self.config.hidden_size * self.itemsize
        return total


@dataclass(frozen=True)
class Needs:
    """Bytes of one device for a workload.

    Attributes:
      weights, cache: of all layers; the cache at its last capacity.
      paged_cache: what the cache would take in pages.
      loading: peak while weights are loaded and joined: one layer exists twice.
      prefill, decode: of the programs.
      growing: peak while the cache grows: the old one and the new one; 0 where it need not.
    """

    weights: int
    cache: int
    paged_cache: int
    loading: int
    prefill: Bytes
    decode: Bytes
    growing: int

    @property
    def peak(self) -> int:
        """Bytes of the phase that needs most."""
        return max(self.phases.values())

    @property
    def phases(self) -> Mapping[str, int]:
        """The peak of each phase, in order."""
        return {
            "loading": self.loading,
            "prefill": self.prefill.total,
            "growing": self.growing,
            "decode": self.decode.total,
        }


def programs(share: DeviceShare, workload: Workload) -> tuple[Calls, Backends, Backends]:
    """The shapes of prefill and decode, and what each computes with."""
    shapes = calls(share.config, share.target, share.mesh, workload)
    about = share.config, share.target, share.mesh, workload.dtype
    chosen = partial(backends, *about, rows=shapes.rows, kv_dtype=workload.kv_dtype)
    prefill = chosen(tokens=shapes.chunk, capacity=shapes.capacities[0])
    return shapes, prefill, chosen(tokens=1, capacity=shapes.capacities[-1])


def needs_of(share: DeviceShare, workload: Workload) -> Needs:
    """Memory that a workload takes on one device."""
    shapes, prefill, decode = programs(share, workload)
    rows, first, last = shapes.rows, shapes.capacities[0], shapes.capacities[-1]
    growing = 0
    if len(shapes.capacities) > 1:
        growing = share.weights + share.state(rows, shapes.capacities[-2]) + share.state(rows, last)
    return Needs(
        weights=share.weights,
        cache=share.cache(rows, last),
        paged_cache=share.paged_cache(rows, workload.context),
        loading=share.loading,
        prefill=share.prefill(rows, shapes.chunk, first, prefill),
        decode=share.decode(rows, last, decode),
        growing=growing,
    )
