"""The pieces of a transformer block, as pure functions of arrays and specs.

Numbers that need it are float32 whatever the compute dtype: norms, rope, softmax, router and logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.config import LayerSpec, LlamaConfig, MoeSpec
from llama_jax.kernels.moe import routed_experts
from llama_jax.kernels.norm import rms_norm
from llama_jax.kernels.precision import matmul_precision
from llama_jax.model.rope import rotate
from llama_jax.params import PROJECTION_AXES, Params
from llama_jax.sharding import in_use, local, split_over

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


FEW_ROWS = 16
"""Up to so many rows a product on the CPU puts the weight first."""


def product(x: jax.Array, weight: jax.Array, *, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """x [..., in] times weight [*out, in]: [..., *out], accumulated in float32, in `dtype`."""
    if weight.ndim > 2 and not in_use():
        # The CPU's compiler would make a transposed copy of the weight. On a mesh this might join dimensions across
        # what the devices have.
        out = product(x, weight.reshape(-1, weight.shape[-1]), dtype=dtype)
        return out.reshape(*x.shape[:-1], *weight.shape[:-1])
    precision = matmul_precision(x.dtype)

    def contract(a: jax.Array, b: jax.Array) -> jax.Array:
        last = (((a.ndim - 1,), (b.ndim - 1,)), ((), ()))
        return jax.lax.dot_general(a, b, last, precision=precision, preferred_element_type=dtype)

    def weight_first(x: jax.Array, weight: jax.Array) -> jax.Array:
        # The barrier keeps XLA from swapping the operands back.
        out = jax.lax.optimization_barrier(contract(weight, x.reshape(-1, x.shape[-1])))
        return jnp.moveaxis(out, -1, 0).reshape(*x.shape[:-1], *weight.shape[:-1])

    # XLA's CPU library rearranges the right operand before it multiplies. Of a large weight and a few tokens (decoding
    # a batch) that should be the tokens: a step of SmolLM2-135M at batch 8 takes 51 ms so, 64 ms the other way.
    if 1 < math.prod(x.shape[:-1]) <= FEW_ROWS:
        return jax.lax.platform_dependent(x, weight, cpu=weight_first, default=contract)
    return contract(x, weight)


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in] times weight [*out, in], accumulated in float32, in x's dtype.

    The product itself is in that dtype: a float32 one would be written out, read and rounded by a second kernel (a
    tenth of a long prefill of bfloat16 on an H100), and its sum over devices would send twice the bytes.
    """
    return product(x, weight, dtype=x.dtype)


def lora(x: jax.Array, adapter: Params | None) -> jax.Array | float:
    """What a low-rank adapter (arXiv:2106.09685) adds: scale * x a^T b^T, with a [rank, in] and b [out, rank]."""
    if adapter is None:
        return 0.0
    return matmul(matmul(x, adapter["a"].astype(x.dtype)), adapter["b"].astype(x.dtype)) * adapter["scale"]


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows `tokens` int32 [batch, len] of `table` [vocab, hidden].

    Where the vocabulary is split, each device looks up what it has and the results are added up: for a single token XLA
    would rather send the whole table to all devices.
    """
    axis = split_over("vocab", table.shape[0])
    if axis is None:
        return table[tokens]

    def own(table: jax.Array, tokens: jax.Array) -> jax.Array:
        row = tokens - jax.lax.axis_index(axis) * table.shape[0]
        here = (row >= 0) & (row < table.shape[0])
        return jnp.where(here[..., None], table[jnp.where(here, row, 0)], 0)

    arguments = {"table": table, "tokens": tokens}
    return local(own, arguments, {"table": ("vocab",), "tokens": ("batch",)}, ("batch",), summed="vocab")


def linear(x: jax.Array, leaf: Params, adapter: Params | None = None) -> jax.Array:
    """Every projection of the model: x [..., in] -> [..., out].

    Args:
      leaf: {"weight": [out, in]} and, if the projection has one, {"bias": [out]}. Joint projections
        (`llama_jax.model.fuse`) have several dimensions in place of `out`.
      adapter: {"a", "b", "scale"} of a low-rank adapter, or None.
    """
    out = matmul(x, leaf["weight"])
    if "bias" in leaf:
        out = out + leaf["bias"].astype(x.dtype)
    return (out + lora(x, adapter)).astype(x.dtype)


def project_qkv(
    x: jax.Array, params: Params, config: LlamaConfig, adapters: Params
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [batch, len, num_heads, head_dim], keys and values [batch, len, num_kv_heads, head_dim].

    Takes the canonical q, k and v projections, or the one that `fuse_params` made of them.
    """
    batch, length, _ = x.shape
    names = ("q_proj", "k_proj", "v_proj")
    if "qkv_proj" in params:
        # [batch, len, kv_heads, group + 2, head_dim]: of each key/value head its queries, its key, its value.
        grouped = linear(x, params["qkv_proj"])
        parts: tuple[jax.Array, ...] = (grouped[:, :, :, :-2], grouped[:, :, :, -2], grouped[:, :, :, -1])
        parts = tuple(
            part.reshape(batch, length, -1) + lora(x, adapters.get(name))
            for part, name in zip(parts, names, strict=True)
        )
    else:
        parts = tuple(linear(x, params[name], adapters.get(name)) for name in names)
    q, k, v = (part.astype(x.dtype).reshape(batch, length, -1, config.head_dim) for part in parts)
    return q, k, v


def position_queries_and_keys(
    q: jax.Array,
    k: jax.Array,
    params: Params,
    config: LlamaConfig,
    spec: LayerSpec,
    positions: jax.Array,
    angles: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Head norms, rope and the query temperature of one layer, in the order the layer's spec implies."""
    if spec.qk_norm == "rms":
        q = rms_norm(q, params["q_norm"]["weight"], config.rms_norm_eps)
        k = rms_norm(k, params["k_norm"]["weight"], config.rms_norm_eps)
    if spec.rope:
        q = rotate(q, *angles, interleaved=config.rope.interleaved)
        k = rotate(k, *angles, interleaved=config.rope.interleaved)
    if spec.qk_norm == "l2":
        q = rms_norm(q, None, config.rms_norm_eps)
        k = rms_norm(k, None, config.rms_norm_eps)
    if spec.query_scale is not None:
        steps = jnp.floor((positions.astype(jnp.float32) + 1.0) / spec.query_scale.floor)
        scale = 1.0 + spec.query_scale.scale * jnp.log1p(jnp.maximum(steps, 0.0))
        q = (q.astype(jnp.float32) * scale[:, :, None, None]).astype(q.dtype)
    return q, k


def mlp(x: jax.Array, params: Params, config: LlamaConfig, adapters: Params) -> jax.Array:
    """Gated MLP: down(activation(gate(x)) * up(x))."""
    activation = ACTIVATIONS[config.activation]
    if "gate_up_proj" in params:
        both = linear(x, params["gate_up_proj"])  # [batch, len, 2, mlp]
        gate = (both[..., 0, :] + lora(x, adapters.get("gate_proj"))).astype(x.dtype)
        up = (both[..., 1, :] + lora(x, adapters.get("up_proj"))).astype(x.dtype)
    else:
        gate = linear(x, params["gate_proj"], adapters.get("gate_proj"))
        up = linear(x, params["up_proj"], adapters.get("up_proj"))
    return linear(activation(gate) * up, params["down_proj"], adapters.get("down_proj"))


def moe(x: jax.Array, params: Params, config: LlamaConfig, spec: MoeSpec, adapters: Params) -> jax.Array:
    """Mixture of experts: float32 router, then each token's top_k experts, plus the shared expert if there is one."""
    tokens = x.reshape(-1, x.shape[-1])
    router = params["router"]["weight"].astype(jnp.float32)
    logits = jnp.einsum("nh,eh->ne", tokens.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
    input_scale = output_scale = None
    if spec.router == "softmax":
        weights, expert_ids = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), spec.top_k)
        output_scale = weights / jnp.sum(weights, axis=-1, keepdims=True)
    else:
        top_logits, expert_ids = jax.lax.top_k(logits, spec.top_k)
        input_scale = jax.nn.sigmoid(top_logits)
    experts = {name: leaf["weight"] for name, leaf in params["experts"].items()}

    def mixture(
        tokens: jax.Array,
        expert_ids: jax.Array,
        scales: tuple[jax.Array | None, jax.Array | None],
        experts: Params,
        shared: Params | None,
        adapters: Params,
    ) -> jax.Array:
        out = routed_experts(
            tokens,
            expert_ids,
            experts["gate_proj"],
            experts["up_proj"],
            experts["down_proj"],
            activation=ACTIVATIONS[config.activation],
            input_scale=scales[0],
            output_scale=scales[1],
        )
        return out if shared is None else out + mlp(tokens, shared, config, adapters)

    # All of it on each device's part of every expert's width, so that there is one sum over the devices. A shared
    # expert stands apart if its width divides where that of the others does not, or the other way round.
    shared = params.get("shared")
    apart = shared is not None and (
        split_over("mlp", spec.intermediate_size) != split_over("mlp", spec.shared_intermediate_size)
    )
    arguments = {
        "tokens": tokens,
        "expert_ids": expert_ids,
        "scales": (input_scale, output_scale),
        "experts": experts,
        "shared": None if apart else shared,
        "adapters": {} if apart else adapters.get("shared", {}),
    }
    axes = {
        "tokens": ("batch",),
        "expert_ids": ("batch",),
        "scales": ("batch",),
        "experts": {name: ("expert", *PROJECTION_AXES[name]) for name in experts},
        "shared": _axes(arguments["shared"]),
        "adapters": _axes(arguments["adapters"]),
    }
    out = local(mixture, arguments, axes, ("batch",), summed="mlp").reshape(x.shape)
    return out + mlp(x, params["shared"], config, adapters.get("shared", {})) if apart else out


def _axes(projections: Params | None) -> Params | None:
    """Logical axes of the leaves of some projections, or of their adapters."""
    if projections is None:
        return None
    axes = {}
    for name, leaves in projections.items():
        *out, into = PROJECTION_AXES[name]
        known = {"weight": (*out, into), "bias": tuple(out), "a": (None, into), "b": (out[0], None), "scale": ()}
        axes[name] = {leaf: known[leaf] for leaf in leaves}
    return axes
