"""Lower bounds on the time of prefill and of a decode step, from the data sheet's peak rates alone.

What a program reads, computes and sends is counted from shapes (`costs`); a device reads and computes at the same time,
but all-reduces must finish before the next product starts, unless there is another piece of the prompts
to compute ("Roofline", doi:10.1145/1498765.1498785). So these predictions are bounds that nothing can beat: launches,
latencies and rates below the peak add to them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from llama_jax.config import LlamaConfig, MoeSpec
from llama_jax.decode.buckets import pieces
from llama_jax.plan.costs import (
    exchange_s,
    least_s,
    local_rows,
    prefill_flops,
    read_bytes,
    seconds,
    step_bytes,
    step_flops,
    token_bytes,
)
from llama_jax.plan.workload import Workload
from llama_jax.sharding import AnyMesh, ruled
from llama_jax.targets import Collective, Target


@dataclass(frozen=True)
class Floor:
    """The least time of one run on the busiest device.

    Attributes:
      read_bytes: weights that the tokens use, and keys and values that they see.
      flops: multiplications and additions; None where they are not known.
      collectives: what devices exchange.
      memory_s, compute_s, links_s: seconds for each at the target's peak rates; None where the rate is not known.
      overlapped: whether devices compute while they exchange.
    """

    read_bytes: int
    flops: float | None
    collectives: tuple[Collective, ...]
    memory_s: float | None
    compute_s: float | None
    links_s: float | None
    overlapped: bool = False

    @classmethod
    def of(
        cls,
        target: Target,
        dtype: str,
        read: int,
        flops: float | None,
        exchanged: tuple[Collective, ...],
        *,
        latency_s: float = 0.0,
        overlapped: bool = False,
    ) -> Floor:
        """The floor of these amounts at a target's peak rates; each collective takes `latency_s` besides its bytes."""
        return cls(
            read,
            flops,
            exchanged,
            memory_s=seconds(read, target.bandwidth),
            compute_s=seconds(flops, target.rates.of(dtype)),
            links_s=exchange_s(exchanged, target, latency_s=latency_s),
            overlapped=overlapped,
        )

    @property
    def seconds(self) -> float | None:
        """Reading and arithmetic overlap; exchange only where there are pieces."""
        return least_s(self.compute_s, self.memory_s, self.links_s, overlapped=self.overlapped)

    @property
    def bound(self) -> str | None:
        """The bottleneck, which takes longest: "memory", "arithmetic" or "links"."""
        times = {"memory": self.memory_s, "arithmetic": self.compute_s, "links": self.links_s}
        known = {name: time for name, time in times.items() if time is not None}
        return max(known, key=lambda name: known[name]) if len(known) == len(times) else None


def decode_floor(
    config: LlamaConfig, target: Target, mesh: AnyMesh, workload: Workload, *, latency_s: float = 0.0
) -> Floor:
    """Of a decode step when every text has reached the whole context.

    Args:
      config: as `layout.split_config` gives it for the mesh.
      latency_s: seconds of each collective besides what its bytes take.
    """
    w = workload
    return Floor.of(
        target,
        w.dtype,
        step_bytes(config, w.itemsize, w.batch, w.context, mesh, w.kv_dtype),
        step_flops(config, w.batch, w.context, mesh),
        collectives(config, mesh, rows=local_rows(w.batch, mesh), tokens=1, itemsize=w.itemsize, greedy=True),
        latency_s=latency_s,
    )


def prefill_floor(
    config: LlamaConfig, target: Target, mesh: AnyMesh, workload: Workload, *, latency_s: float = 0.0
) -> Floor:
    """Of all prompts at once: weights are read once, keys and values written.

    Args: as `decode_floor`.
    """
    w = workload
    rows = local_rows(w.batch, mesh)
    cache = config.num_layers * rows * w.prompt * token_bytes(config, w.itemsize, mesh, w.kv_dtype)
    return Floor.of(
        target,
        w.dtype,
        read_bytes(config, w.itemsize, rows * w.prompt, mesh) + cache,
        prefill_flops(config, w.batch, w.prompt, mesh),
        collectives(config, mesh, rows=rows, tokens=w.prompt, itemsize=w.itemsize),
        latency_s=latency_s,
        overlapped=pieces(rows, w.prompt, ruled(mesh).ways("mlp")) > 1,
    )


def collectives(
    config: LlamaConfig, mesh: AnyMesh, *, rows: int, tokens: int, itemsize: int, greedy: bool = False
) -> tuple[Collective, ...]:
    """The communication that the sharding rules imply: after each block that is split one all-reduce of its output
    and one for the embedding, of each piece where prefill runs in pieces; with `greedy` sampling the best token
    of each device's part of the vocabulary.

    Args:
      rows, tokens: of one device, and of each row.
    """
    by = ruled(mesh)
    heads, vocab = by.ways("kv_heads", config.num_kv_heads), by.ways("vocab", config.vocab_size)
    count = pieces(rows, tokens, by.ways("mlp"))
    # The number of all-reduces over this many devices, of this many tokens a row.
    sums = Counter({(vocab, tokens // count): count})
    for i, layer in enumerate(config.layers):
        if isinstance(layer.mlp, MoeSpec):
            widths = {layer.mlp.intermediate_size, layer.mlp.shared_intermediate_size} - {0}
        else:
            widths = {layer.mlp}
        # Of experts of which some are split and others not, only the former need a sum.
        for ways in (heads, max(by.ways("mlp", width) for width in widths)):
            if i == config.num_layers - 1:  # its output is needed for the last token alone
                sums[ways, 1] += 1
            else:
                sums[ways, tokens // count] += count
    row = config.hidden_size * itemsize
    found = [Collective("all-reduce", ways, n, rows * length * row) for (ways, length), n in sums.items() if ways > 1]
    if greedy and vocab > 1:
        found.append(Collective("all-gather", vocab, 1, 8 * rows * vocab))
    return tuple(found)
