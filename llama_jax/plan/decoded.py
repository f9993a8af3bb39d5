"""Quantised weights that XLA decodes to memory before it multiplies with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from llama_jax.config import LlamaConfig
from llama_jax.layout import local_size
from llama_jax.params import JOINT, canonical_specs
from llama_jax.quantized import layout_named
from llama_jax.quantized.codes import reads_codes
from llama_jax.sharding import AnyMesh

_JOINT = {part: joint for joint, parts in JOINT.items() for part in parts}


def decoded_bytes(config: LlamaConfig, itemsize: int, mesh: AnyMesh) -> Mapping[str, int]:
    """Bytes on each device of the largest weight of "attn", "mlp", "moe" and "head" that a product decodes.

    Args:
      config: as the model is computed on the mesh.
      itemsize: bytes of a number of the dtype that it computes in.
    """
    schemes, products = dict(config.schemes), Counter[tuple[str, str]]()
    head = "embed" if config.tie_word_embeddings else "lm_head"
    for spec in canonical_specs(config):
        layout = layout_named(schemes.get(spec.leaf, "")) if spec.path[-1] == "weight" else None
        routed = ".moe.experts." in spec.name
        # A stack of routed experts is decoded whatever its layout, all three of a layer before the first product.
        if layout is None or (reads_codes(layout) and not routed):
            continue
        *where, name = spec.leaf.split(".")
        if where:
            block = where[2]
            products[block, ".".join([*where, "" if routed else _JOINT.get(name, name)])] += local_size(
                spec, config, mesh
            )
        elif name == head:
            products["head", name] += local_size(spec, config, mesh)
    largest: dict[str, int] = {}
    for (block, _), numbers in products.items():
        largest[block] = max(largest.get(block, 0), numbers * itemsize)
    return largest
