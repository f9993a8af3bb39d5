"""Costs of a training step: arithmetic, and memory of a device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llama_jax.config import LlamaConfig, MoeSpec
from llama_jax.plan.costs import attended_by_all, matmul_params
from llama_jax.sharding import AnyMesh, ruled


def step_flops(config: LlamaConfig, lengths: Iterable[int], trained: float | None = None) -> float:
    """Multiplications and additions of a step: what its results need, without what remat computes again.

    Of each token every weight is multiplied with three times: in the forward pass, for the gradient of its input, and,
    if it is trained, for its own gradient. Attention is counted for the pairs of tokens that see each other.

    Args:
      lengths: tokens of each text in the batch, without padding.
      trained: weights among those multiplied with that are trained, with those of adapters; None is all.
    """
    lengths = list(lengths)
    tokens, weights = sum(lengths), matmul_params(config, 1)
    pairs = sum(attended_by_all(layer, length) for layer in config.layers for length in lengths)
    added = 0.0 if trained is None else trained  # an adapter's weights are multiplied with besides the model's
    products = 2 * tokens * (2 * (weights + added) + (weights if trained is None else trained))
    return products + 12 * pairs * config.num_heads * config.head_dim


@dataclass(frozen=True)
class Memory:
    """Bytes of one device in a step.

    Attributes:
      weights: that are frozen, or the copy that is computed with.
      state: trained weights in float32, the optimiser's moments and the gradient.
      activations: what the backward pass finds.
      logits: those that exist at once, with their gradient.
    """

    weights: int
    state: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.state + self.activations + self.logits


def step_memory(
    config: LlamaConfig,
    *,
    rows: int,
    length: int,
    trained: int,
    frozen: int,
    itemsize: int,
    remat: str,
    logits: int,
    moments: float = 2,
    mesh: AnyMesh = None,
) -> Memory:
    """An estimate, by shapes alone; the compiler's own count comes with the compiled step.

    Args:
      rows, length: of a part of a batch.
      trained: numbers that are trained. frozen: bytes of the weights that are not.
      itemsize: bytes of a number of the dtype that is computed in.
      remat, logits: see `loss`.
      moments: float32 numbers that the optimiser keeps for each that is trained.
    """
    by = ruled(mesh)
    parts = by.shape.get("fsdp", 1) * by.shape.get("tensor", 1)
    heads = by.ways("kv_heads", config.num_kv_heads)
    tokens = -(-rows // by.ways("batch")) * length
    numbers = 0
    for layer in config.layers:
        width = (
            layer.mlp.top_k * layer.mlp.intermediate_size + layer.mlp.shared_intermediate_size
            if isinstance(layer.mlp, MoeSpec)
            else layer.mlp
        )
        q, kv, mlp = config.q_dim // heads, config.kv_dim // heads, width // by.ways("mlp", width)
        hidden = config.hidden_size
        enters = 2 * hidden  # the residual stream, and what the last block adds to it
        kernels = q + 2 * config.num_heads // heads  # what attention gives, and a float32 for each head
        numbers += {
            "full": enters,
            "kernels": enters + kernels,
            "products": enters + kernels + q + 2 * kv + hidden + 2 * mlp,
            # Both sums and norms; gate, up and the product; beside adapters XLA also keeps what activates gate.
            "none": 4 * hidden + kernels + q + 2 * kv + (4 if frozen else 3) * mlp,
        }[remat]
    computed = trained * itemsize if not frozen else 0
    return Memory(
        weights=(frozen + computed) // parts,
        state=round(trained * 4 * (2 + moments)) // parts,
        activations=tokens * numbers * itemsize,
        logits=min(logits, tokens * by.share("vocab", config.vocab_size)) * (4 + 4 + itemsize),
    )
