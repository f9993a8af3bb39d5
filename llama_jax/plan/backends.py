"""The implementations of operations that a program would use, by the dispatch itself."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llama_jax.cache import stored_dtype
from llama_jax.config import LlamaConfig, MoeSpec
from llama_jax.decode.chunks import attention_backends
from llama_jax.kernels.dispatch import REFERENCE, choose
from llama_jax.kernels.moe import routed_experts_op
from llama_jax.kernels.norm import add_rms_norm_op
from llama_jax.sharding import AnyMesh, on, ruled
from llama_jax.targets import Target


@dataclass(frozen=True)
class Backends:
    """Names of backends: of attention those of all layers, each once; `moe` is "" for a model without experts."""

    attention: tuple[str, ...] = (REFERENCE,)
    moe: str = REFERENCE
    norm: str = REFERENCE


def backends(
    config: LlamaConfig,
    target: Target,
    mesh: AnyMesh,
    dtype: str,
    *,
    rows: int,
    tokens: int,
    capacity: int,
    kv_dtype: str | None = None,
) -> Backends:
    """The meaning of "auto" on one device of a target, for `tokens` tokens in each of `rows` rows.

    Args:
      config: as `layout.split_config` gives it for the mesh.
    """

    def array(*shape: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    with on(ruled(mesh)):
        shape = {"rows": rows, "tokens": tokens, "capacity": capacity}
        stored = stored_dtype(kv_dtype, dtype, target)
        attention = attention_backends(config, target, dtype, **shape, cache_dtype=stored)
    x, weight = array(rows * tokens, config.hidden_size), array(config.hidden_size)
    norm = choose(add_rms_norm_op, target, "auto", x, x, weight, eps=config.rms_norm_eps).backend
    moe = next((layer.mlp for layer in config.layers if isinstance(layer.mlp, MoeSpec)), None)
    if moe is None:
        return Backends(attention, "", norm)
    up = array(moe.num_experts, moe.intermediate_size, config.hidden_size)
    down = array(moe.num_experts, config.hidden_size, moe.intermediate_size)
    ids = array(rows * tokens, moe.top_k, dtype="int32")
    scale = array(rows * tokens, moe.top_k, dtype="float32")
    scales = {"input_scale": scale} if moe.router == "sigmoid" else {"output_scale": scale}
    experts = choose(routed_experts_op, target, "auto", x, ids, up, up, down, activation=jax.nn.silu, **scales)
    return Backends(attention, experts.backend, norm)
