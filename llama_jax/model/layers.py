"""The pieces of a transformer block, as pure functions of arrays and specs.

Norms, rope, softmax, router and logits are computed in float32 whatever the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.config import LayerSpec, LlamaConfig, MoeSpec
from llama_jax.kernels.norm import rms_norm
from llama_jax.kernels.quantized_matmul.fused import Normed
from llama_jax.kernels.rope import rotate
from llama_jax.model.adapters import MEMBERS, NO_ADAPTERS, Adapters
from llama_jax.model.weights import Pending, experts, gated, joined, joint, linear, norm_weight, pending, router
from llama_jax.params import JOINT, PROJECTION_AXES, Params
from llama_jax.schemes import leaf_axes
from llama_jax.sharding import local, split_over

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class Dims(NamedTuple):
    """Fields of the config that every block needs besides its own spec; so equal layers share one trace."""

    head_dim: int
    rms_norm_eps: float
    activation: str
    interleaved: bool
    activations: str | None

    @classmethod
    def of(cls, config: LlamaConfig) -> Dims:
        return cls(config.head_dim, config.rms_norm_eps, config.activation, config.rope.interleaved, config.activations)


def project_qkv(
    x: jax.Array | Normed, params: Params, dims: Dims, adapters: Adapters = NO_ADAPTERS
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [batch, len, num_heads, head_dim], keys and values [batch, len, num_kv_heads, head_dim].

    Takes the canonical q, k and v projections, or the one that `fuse_params` made of them.
    """
    parts = joint(x, params, "qkv_proj", adapters, dims.activations)
    q, k, v = (part.reshape(*part.shape[:2], -1, dims.head_dim) for part in parts)
    return q, k, v


def joint_heads(
    x: jax.Array | Normed, params: Params, dims: Dims, spec: LayerSpec, adapters: Adapters = NO_ADAPTERS
) -> jax.Array | None:
    """`project_qkv` in one array [batch, len, kv_heads, group + 2, head_dim], as `fuse_params` joins them; None where
    they are not joint, or where more than a rotation is done to them."""
    changed = any(adapters.of(part).tree.keys() - set(MEMBERS) for part in JOINT["qkv_proj"])
    rotated = spec.rope and spec.qk_norm == "none" and spec.query_scale is None
    if "qkv_proj" not in params or changed or not rotated:
        return None
    return joined(x, params, "qkv_proj", adapters, dims.activations)


def position_queries_and_keys(
    q: jax.Array,
    k: jax.Array,
    params: Params,
    dims: Dims,
    spec: LayerSpec,
    positions: jax.Array,
    angles: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Head norms, rope and the query temperature of one layer, in the order the layer's spec implies."""
    if spec.qk_norm == "rms":
        q = rms_norm(q, norm_weight(params["q_norm"]), dims.rms_norm_eps)
        k = rms_norm(k, norm_weight(params["k_norm"]), dims.rms_norm_eps)
    if spec.rope:
        q = rotate(q, *angles, interleaved=dims.interleaved)
        k = rotate(k, *angles, interleaved=dims.interleaved)
    if spec.qk_norm == "l2":
        q = rms_norm(q, None, dims.rms_norm_eps)
        k = rms_norm(k, None, dims.rms_norm_eps)
    if spec.query_scale is not None:
        steps = jnp.floor((positions.astype(jnp.float32) + 1.0) / spec.query_scale.floor)
        scale = 1.0 + spec.query_scale.scale * jnp.log1p(jnp.maximum(steps, 0.0))
        q = (q.astype(jnp.float32) * scale[:, :, None, None]).astype(q.dtype)
    return q, k


@jax.named_scope("mlp")
def mlp(x: jax.Array, params: Params, dims: Dims, adapters: Adapters = NO_ADAPTERS) -> jax.Array:
    """Gated MLP: down(activation(gate(x)) * up(x))."""
    return _projected(hidden_units(x, params, dims, adapters), params, "down_proj", dims, adapters)


def hidden_units(x: jax.Array | Normed, params: Params, dims: Dims, adapters: Adapters = NO_ADAPTERS) -> jax.Array:
    """Of an MLP: activation(gate(x)) * up(x)."""
    return gated(x, params, ACTIVATIONS[dims.activation], adapters, dims.activations)


def project(
    x: jax.Array,
    params: Params,
    name: str,
    dims: Dims,
    adapters: Adapters = NO_ADAPTERS,
    residual: jax.Array | None = None,
) -> jax.Array | Pending:
    """The projection that a part of a block ends with: x [..., in] -> [..., out].

    Args:
      residual: what it will be added to; without one it is an array.
    """
    later = None if residual is None else pending(x, params[name], residual, adapters.of(name), dims.activations)
    return _projected(x, params, name, dims, adapters) if later is None else later


def _projected(x: jax.Array, params: Params, name: str, dims: Dims, adapters: Adapters) -> jax.Array:
    return linear(x, params[name], adapters.of(name), dims.activations, axes=PROJECTION_AXES[name])


@jax.named_scope("moe")
def moe(x: jax.Array, params: Params, dims: Dims, spec: MoeSpec, adapters: Adapters = NO_ADAPTERS) -> jax.Array:
    """Mixture of experts: float32 router, then each token's top_k experts, plus the shared expert if there is one."""
    tokens = x.reshape(-1, x.shape[-1])
    logits = router(tokens, params["router"])
    input_scale = output_scale = None
    if spec.router == "softmax":
        weights, expert_ids = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), spec.top_k)
        output_scale = weights / jnp.sum(weights, axis=-1, keepdims=True)
    else:
        top_logits, expert_ids = jax.lax.top_k(logits, spec.top_k)
        input_scale = jax.nn.sigmoid(top_logits)

    def mixture(
        tokens: jax.Array,
        expert_ids: jax.Array,
        scales: tuple[jax.Array | None, jax.Array | None],
        routed: Params,
        shared: Params | None,
        adapters: Params,
        adapter_ids: jax.Array | None,
    ) -> jax.Array:
        out = experts(
            tokens,
            expert_ids,
            routed,
            activation=ACTIVATIONS[dims.activation],
            input_scale=scales[0],
            output_scale=scales[1],
        )
        return out if shared is None else out + mlp(tokens, shared, dims, Adapters(adapters, adapter_ids))

    # All of it on each device's part of every expert's width, so that there is one all-reduce. A shared
    # expert stands apart if its width divides where that of the others does not, or the other way round.
    shared = params.get("shared")
    apart = shared is not None and (
        split_over("mlp", spec.intermediate_size) != split_over("mlp", spec.shared_intermediate_size)
    )
    within = NO_ADAPTERS if apart else adapters.of("shared").of_tokens(x.shape[:-1])
    arguments = {
        "tokens": tokens,
        "expert_ids": expert_ids,
        "scales": (input_scale, output_scale),
        "routed": params["experts"],
        "shared": None if apart else shared,
        "adapters": within.tree,
        "adapter_ids": within.ids,
    }
    axes = {
        "tokens": ("batch",),
        "expert_ids": ("batch",),
        "scales": ("batch",),
        "routed": {n: leaf_axes(leaf, ("expert", *PROJECTION_AXES[n])) for n, leaf in params["experts"].items()},
        "shared": None if apart or not shared else {n: leaf_axes(x, PROJECTION_AXES[n]) for n, x in shared.items()},
        "adapters": within.axes,
        "adapter_ids": ("batch",),
    }
    out = local(mixture, arguments, axes, ("batch",), summed="mlp").reshape(x.shape)
    return out + mlp(x, params["shared"], dims, adapters.of("shared")) if apart else out
