"""Quantised weights that XLA decodes to memory before it multiplies with them, where prompts are computed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from llama_jax.config import LlamaConfig
from llama_jax.kernels.quantized_matmul.reference import reads_codes
from llama_jax.layout import local_size
from llama_jax.params import JOINT, canonical_specs
from llama_jax.quantized import layout_named
from llama_jax.sharding import AnyMesh, ruled

_JOINT = {part: joint for joint, parts in JOINT.items() for part in parts}


def decoded_bytes(config: LlamaConfig, itemsize: int, mesh: AnyMesh) -> Mapping[str, int]:
    """Bytes on each device of the decoded weights of "attn", "mlp", "moe" and "head" that are there at one time.

    Of one device the largest of a block, which decodes one after the other; of several all of a block's, which XLA puts
    ahead of the sums between devices. Of a layer's three stacks of routed experts two, whatever their layout.

    Args:
      config: as the model is computed on the mesh.
      itemsize: bytes of a number of the dtype that it computes in.
    """
    schemes, products = dict(config.schemes), Counter[tuple[str, str, str]]()
    head = "embed" if config.tie_word_embeddings else "lm_head"
    for spec in canonical_specs(config):
        layout = layout_named(schemes.get(spec.leaf, "")) if spec.path[-1] == "weight" else None
        routed = ".moe.experts." in spec.name
        if layout is None or (reads_codes(layout) and not routed):
            continue
        size = local_size(spec, config, mesh) * itemsize
        *where, name = spec.leaf.split(".")
        if routed:
            products["moe", where[1], "experts"] = 2 * size
        elif where:
            products[where[2], where[1], _JOINT.get(name, name)] += size
        elif name == head:
            products["head", "", name] += size
    several, blocks = math.prod(ruled(mesh).shape.values()) > 1, dict[tuple[str, str], list[int]]()
    for (block, layer, _), size in products.items():
        blocks.setdefault((block, layer), []).append(size)
    at_once: dict[str, int] = {}
    for (block, _), sizes in blocks.items():
        at_once[block] = max(at_once.get(block, 0), sum(sizes) if several else max(sizes))
    return at_once
