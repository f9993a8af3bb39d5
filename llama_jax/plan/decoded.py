"""Quantised weights that XLA or a kernel decodes to memory before the product."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig, MoeSpec
from llama_jax.kernels.dispatch import REFERENCE, choose
from llama_jax.kernels.quantized_matmul import quantized_matmul_op
from llama_jax.kernels.quantized_matmul.reference import reads_codes
from llama_jax.kernels.quantized_moe import quantized_moe_op
from llama_jax.layout import local_shape, local_size
from llama_jax.params import JOINT, ParamSpec, canonical_specs, stored_as
from llama_jax.quantized import Layout, layout_named, stored_layout
from llama_jax.quantized.layout import ORDER
from llama_jax.sharding import AnyMesh
from llama_jax.targets import Target

_JOINT = {part: joint for joint, parts in JOINT.items() for part in parts}


def decoded_bytes(config: LlamaConfig, itemsize: int, mesh: AnyMesh, target: Target, tokens: int) -> Mapping[str, int]:
    """Bytes on each device of decoded weights of "attn", "mlp", "down", "moe" and "head" that exist at one time.

    The largest of a block, which decodes one after the other. Beside "mlp", gate and up, there is "down" already if a
    kernel decodes it for CDNA on a mesh that splits it, where XLA's schedule has that kernel ahead of the product. Of
    a layer's stacks of routed experts all three, or two if codes are read but for the sake of the kernel behind them;
    of few tokens only those of used experts, with a copy of their codes. What kernels decode in registers is nowhere.

    Args:
      config: as the model is computed on the mesh.
      itemsize: bytes of a number of the dtype that it computes in.
      tokens: that a device computes at one time.
    """
    from llama_jax.kernels.quantized_matmul.pallas_triton import MOST_ROWS

    schemes, products = dict(config.schemes), Counter[tuple[str, str, str]]()
    specs = {spec.leaf: spec for spec in canonical_specs(config) if spec.path[-1] == "weight"}
    kernels: dict[str, bool] = {}
    head = "embed" if config.tie_word_embeddings else "lm_head"
    for spec in specs.values():
        layout = stored_layout(schemes.get(spec.leaf, ""))
        routed = ".moe.experts." in spec.name
        if layout is None or (reads_codes(layout) and not routed):
            continue
        size = local_size(spec, config, mesh) * itemsize
        *where, name = spec.leaf.split(".")
        if routed:
            moe = config.layers[int(where[1])].mlp
            assert isinstance(moe, MoeSpec)
            if where[1] not in kernels:
                stacks = [specs[".".join((*where, part))] for part in ("gate_proj", "up_proj", "down_proj")]
                kernels[where[1]] = _experts_by_kernel(stacks, moe, config, itemsize, mesh, target, tokens)
            if kernels[where[1]]:
                continue
            used = tokens * moe.top_k
            if used < moe.num_experts:
                own = sum(local_size(m, config, mesh) * m.itemsize(itemsize) for m in stored_as(spec, schemes))
                products["moe", where[1], "experts"] += (size + own) * used // moe.num_experts
            elif name != "down_proj" or not reads_codes(layout):
                products["moe", where[1], "experts"] += size
            continue
        if tokens <= MOST_ROWS and _by_kernel(spec, layout, config, itemsize, mesh, target, tokens):
            continue
        if name == "down_proj":
            products["down", where[1], name] += size
            ahead = target.wave_size == 64 and local_shape(spec, config, mesh) != spec.shape
            if ahead and _by_kernel(spec, layout, config, itemsize, mesh, target, tokens):
                products[where[2], where[1], _JOINT["gate_proj"]] += size
        elif where:
            products[where[2], where[1], _JOINT.get(name, name)] += size
        elif name == head:
            products["head", "", name] += size
    at_once: dict[str, int] = {}
    for (block, _, _), size in products.items():
        at_once[block] = max(at_once.get(block, 0), size)
    return at_once


def _by_kernel(
    spec: ParamSpec, layout: Layout, config: LlamaConfig, itemsize: int, mesh: AnyMesh, target: Target, tokens: int
) -> bool:
    """Returns whether a kernel of `kernels.quantized_matmul` computes products with a weight or decodes it for them."""
    dtype = "bfloat16" if itemsize == 2 else "float32"
    members = _local_members(spec, config, mesh, dtype)
    members.pop(ORDER, None)
    x = jax.ShapeDtypeStruct((tokens, local_shape(spec, config, mesh)[-1]), jnp.dtype(dtype))
    chosen = choose(quantized_matmul_op, target, "auto", x, members, layout=layout)
    return chosen.backend != REFERENCE


def _local_members(spec: ParamSpec, config: LlamaConfig, mesh: AnyMesh, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The part that each device holds of a weight's members."""
    return {
        m.path[-1]: jax.ShapeDtypeStruct(local_shape(m, config, mesh), jnp.dtype(m.dtype or dtype))
        for m in stored_as(spec, dict(config.schemes))
    }


def _experts_by_kernel(
    stacks: list[ParamSpec],
    moe: MoeSpec,
    config: LlamaConfig,
    itemsize: int,
    mesh: AnyMesh,
    target: Target,
    tokens: int,
) -> bool:
    """Returns whether a kernel of `kernels.quantized_moe` computes the routed experts of these gate, up and down."""
    dtype, schemes = "bfloat16" if itemsize == 2 else "float32", dict(config.schemes)
    gate, up, down = (layout_named(schemes.get(spec.leaf, "")) for spec in stacks)
    if gate is None or gate != up or down is None:
        return False
    x = jax.ShapeDtypeStruct((tokens, config.hidden_size), jnp.dtype(dtype))
    ids = jax.ShapeDtypeStruct((tokens, moe.top_k), jnp.dtype("int32"))
    members = [_local_members(spec, config, mesh, dtype) for spec in stacks]
    how: dict[str, Any] = {"layouts": (gate, down), "activation": jax.nn.silu}
    return choose(quantized_moe_op, target, "auto", x, ids, *members, **how).backend != REFERENCE
