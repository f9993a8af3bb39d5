"""The costs of running a model, counted from its shapes: weights and keys that are read, and arithmetic.

Everything is counted for the busiest device of a mesh; without a mesh, for one device. Key/value
heads are those of `config`: on a mesh give `layout.split_config`.
"""

from __future__ import annotations

from collections.abc import Iterable

from llama_jax.cache import pair_bytes
from llama_jax.config import LayerSpec, LlamaConfig, MoeSpec
from llama_jax.layout import local_heads, local_size
from llama_jax.params import ParamSpec, canonical_specs, param_specs
from llama_jax.sharding import AnyMesh, ruled
from llama_jax.targets import Collective, Target


def held_bytes(config: LlamaConfig, itemsize: int, mesh: AnyMesh = None) -> int:
    """Bytes of the parameters that one device holds.

    Args:
      itemsize: bytes of a number of the dtype that the model computes in.
    """
    return sum(local_size(s, config, mesh) * s.itemsize(itemsize) for s in param_specs(config))


def local_rows(batch: int, mesh: AnyMesh) -> int:
    """Rows of a batch on one device: the most that any has."""
    return -(-batch // ruled(mesh).ways("batch"))


def share_used(spec: ParamSpec, config: LlamaConfig, tokens: int) -> float:
    """Part of a parameter that a step of `tokens` tokens multiplies with: the embedding counts once, as logits, and of
    the experts only as many as the tokens can use."""
    if spec.leaf == "embed" and not config.tie_word_embeddings:
        return 0.0
    if ".moe.experts." not in spec.name:
        return 1.0
    moe = config.layers[int(spec.path[1])].mlp
    assert isinstance(moe, MoeSpec)
    return min(1.0, tokens * moe.top_k / moe.num_experts)


def matmul_params(config: LlamaConfig, tokens: int, mesh: AnyMesh = None) -> float:
    """Weights that a step of `tokens` tokens multiplies with."""
    return sum(local_size(s, config, mesh) * share_used(s, config, tokens) for s in canonical_specs(config))


def read_bytes(config: LlamaConfig, itemsize: int, tokens: int, mesh: AnyMesh = None) -> int:
    """Bytes of the parameters that a step of `tokens` tokens reads, as they are stored: each that it uses once."""
    used = ((s, local_size(s, config, mesh) * share_used(s, config, tokens)) for s in param_specs(config))
    return round(sum(numbers * spec.itemsize(itemsize) for spec, numbers in used))


def attended(layer: LayerSpec, length: int) -> int:
    """The most tokens that the last of `length` tokens sees."""
    return length if layer.attention == "full" else min(length, layer.window or length)


def attended_by_all(layer: LayerSpec, length: int) -> int:
    """Pairs of a token and one that it sees, of a text of `length` tokens."""
    width = attended(layer, length)
    if layer.attention == "chunked" and length:
        whole, rest = divmod(length, width)
        return whole * _triangle(width) + _triangle(rest)
    return _triangle(width) + (length - width) * width


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def token_bytes(config: LlamaConfig, itemsize: int, mesh: AnyMesh = None, kv_dtype: str | None = None) -> int:
    """Bytes of one token's key and value in one layer's cache, of the heads that one device has."""
    return local_heads(config, mesh)[1] * pair_bytes(config.head_dim, itemsize, kv_dtype)


def cache_read_bytes(
    config: LlamaConfig,
    itemsize: int,
    batch: int,
    length: int,
    mesh: AnyMesh = None,
    kv_dtype: str | None = None,
) -> int:
    """Bytes of keys and values that a decode step reads when each row has `length` tokens: of what it can see."""
    seen = sum(attended(layer, length) for layer in config.layers)
    return local_rows(batch, mesh) * seen * token_bytes(config, itemsize, mesh, kv_dtype)


def step_bytes(
    config: LlamaConfig,
    itemsize: int,
    batch: int,
    length: int,
    mesh: AnyMesh = None,
    kv_dtype: str | None = None,
) -> int:
    """Bytes that a decode step must read: every weight that it uses once, and the cache of `length` tokens a row."""
    weights = read_bytes(config, itemsize, local_rows(batch, mesh), mesh)
    return weights + cache_read_bytes(config, itemsize, batch, length, mesh, kv_dtype)


def step_flops(config: LlamaConfig, batch: int, length: int, mesh: AnyMesh = None) -> float:
    """Multiplications and additions of a decode step when each row has `length` tokens."""
    attention = 4 * sum(attended(layer, length) for layer in config.layers)
    attention *= local_heads(config, mesh)[0] * config.head_dim
    return local_rows(batch, mesh) * (2 * matmul_params(config, 1, mesh) + attention)


def prefill_flops(config: LlamaConfig, batch: int, prompt: int, mesh: AnyMesh = None) -> float:
    """Multiplications and additions of a prompt. Of all tokens the products up to the last layer's queries, keys and
    values, and attention up to the layer before; of the last token what follows."""
    *before, last = config.layers
    once = last_token_params(config, mesh)
    attention = 4 * (sum(attended_by_all(layer, prompt) for layer in before) + attended(last, prompt))
    attention *= local_heads(config, mesh)[0] * config.head_dim
    products = 2 * (prompt * (matmul_params(config, 1, mesh) - once) + once)
    return local_rows(batch, mesh) * (products + attention)


def last_token_params(config: LlamaConfig, mesh: AnyMesh = None) -> float:
    """Weights that a prompt multiplies with for its last token alone."""
    return sum(
        local_size(s, config, mesh) * share_used(s, config, 1)
        for s in canonical_specs(config)
        if _of_last_token(s, config)
    )


def _of_last_token(spec: ParamSpec, config: LlamaConfig) -> bool:
    """Returns whether prefill multiplies with a parameter for the last token alone."""
    if spec.path[0] != "layers":
        return True
    before = ("attn_norm", "q_proj", "k_proj", "v_proj")
    return spec.path[1] == str(config.num_layers - 1) and spec.path[-2] not in before


def seconds(amount: float | None, rate: float) -> float | None:
    """The least time for an amount at a rate; None if either is not known."""
    if amount == 0:
        return 0.0
    return amount / rate if amount and rate else None


def least_s(
    compute_s: float | None, memory_s: float | None, links_s: float | None, *, overlapped: bool
) -> float | None:
    """Seconds of arithmetic and reading, which overlap, with exchange, which may; None if one is not known."""
    if compute_s is None or memory_s is None or links_s is None:
        return None
    alone = max(compute_s, memory_s)
    return max(alone, links_s) if overlapped else alone + links_s


def exchange_s(collectives: Iterable[Collective], target: Target, *, latency_s: float = 0.0) -> float | None:
    """The least time for the communication between the devices of one host; None if the rate is not known.

    Args:
      latency_s: seconds that each collective takes besides what its bytes take.
    """
    total = 0.0
    for c in collectives:
        sending = seconds(c.traffic, target.links.ring_bandwidth(c.devices))
        if sending is None or c.devices > target.links.host_devices:
            return None
        total += sending + c.count * latency_s
    return total
