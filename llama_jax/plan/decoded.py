"""Quantised weights that XLA or a kernel decodes to memory before the product."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig, MoeSpec
from llama_jax.decode.weights_read import MOST_ROWS as FEW_ROWS
from llama_jax.kernels.dispatch import REFERENCE, choose
from llama_jax.kernels.quantized_matmul import quantized_matmul_op
from llama_jax.kernels.quantized_matmul.reference import reads_codes
from llama_jax.layout import local_shape, local_size
from llama_jax.params import JOINT, ParamSpec, canonical_specs, stored_as
from llama_jax.quantized import Layout, stored_layout
from llama_jax.quantized.layout import ORDER
from llama_jax.sharding import AnyMesh, ruled
from llama_jax.targets import Target

_JOINT = {part: joint for joint, parts in JOINT.items() for part in parts}


def decoded_bytes(config: LlamaConfig, itemsize: int, mesh: AnyMesh, target: Target, tokens: int) -> Mapping[str, int]:
    """Bytes on each device of decoded weights of "attn", "mlp", "moe" and "head" that exist at one time.

    The largest of a block, which decodes one after the other; of many tokens and several devices of AMD's CDNA all of a
    block's, which XLA puts ahead of the sums between devices. Of a layer's stacks of routed
    experts all three, or two if codes are read but for the sake of the kernel behind them; of few tokens only those of
    used experts, with a copy of their codes. What the kernel of `kernels.quantized_matmul` decodes in registers is
    nowhere.

    Args:
      config: as the model is computed on the mesh.
      itemsize: bytes of a number of the dtype that it computes in.
      tokens: that a device computes at one time.
    """
    schemes, products = dict(config.schemes), Counter[tuple[str, str, str]]()
    head = "embed" if config.tie_word_embeddings else "lm_head"
    several = math.prod(ruled(mesh).shape.values()) > 1
    for spec in canonical_specs(config):
        layout = stored_layout(schemes.get(spec.leaf, "")) if spec.path[-1] == "weight" else None
        routed = ".moe.experts." in spec.name
        if layout is None or (reads_codes(layout) and not routed):
            continue
        size = local_size(spec, config, mesh) * itemsize
        *where, name = spec.leaf.split(".")
        if routed:
            moe = config.layers[int(where[1])].mlp
            assert isinstance(moe, MoeSpec)
            used = tokens * moe.top_k
            if used < moe.num_experts:
                own = sum(local_size(m, config, mesh) * m.itemsize(itemsize) for m in stored_as(spec, schemes))
                products["moe", where[1], "experts"] += (size + own) * used // moe.num_experts
            elif name != "down_proj" or not reads_codes(layout):
                products["moe", where[1], "experts"] += size
        elif _in_registers(spec, layout, config, itemsize, mesh, target, tokens):
            continue
        elif where:
            products[where[2], where[1], _JOINT.get(name, name)] += size
        elif name == head:
            products["head", "", name] += size
    blocks: dict[tuple[str, str], list[int]] = {}
    for (block, layer, _), size in products.items():
        blocks.setdefault((block, layer), []).append(size)
    at_once: dict[str, int] = {}
    for (block, _), sizes in blocks.items():
        together = sum(sizes) if several and tokens > FEW_ROWS and target.wave_size == 64 else max(sizes)
        at_once[block] = max(at_once.get(block, 0), together)
    return at_once


def _in_registers(
    spec: ParamSpec, layout: Layout, config: LlamaConfig, itemsize: int, mesh: AnyMesh, target: Target, tokens: int
) -> bool:
    """Returns whether products with a weight are computed by a kernel that decodes its tiles while it multiplies."""
    from llama_jax.kernels.quantized_matmul.pallas_triton import MOST_ROWS

    dtype = "bfloat16" if itemsize == 2 else "float32"
    members = {
        m.path[-1]: jax.ShapeDtypeStruct(local_shape(m, config, mesh), jnp.dtype(m.dtype or dtype))
        for m in stored_as(spec, dict(config.schemes))
    }
    members.pop(ORDER, None)
    x = jax.ShapeDtypeStruct((tokens, local_shape(spec, config, mesh)[-1]), jnp.dtype(dtype))
    chosen = choose(quantized_matmul_op, target, "auto", x, members, layout=layout)
    return chosen.backend != REFERENCE and tokens <= MOST_ROWS
