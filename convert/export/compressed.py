"""A quantised checkpoint as a folder of compressed-tensors, in its format `pack-quantized`: the same codes and scales.

vLLM and transformers read it (https://github.com/vllm-project/compressed-tensors). Of a weight [out, in] there are
`weight_packed` int32 with unsigned codes, lowest bits first, `weight_scale` [out, groups], `weight_shape`, and
`weight_zero_point` int32 [out / 8, groups], packed down the rows, where code 0 does not stand for 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoint.checkpoint_source import CheckpointSource
from llama_jax.checkpoint.format import CONFIG, Progress
from llama_jax.checkpoint.small_files import json_bytes
from llama_jax.config import LlamaConfig
from llama_jax.config.families import find_family, renamed
from llama_jax.convert.export.hf import FILES, METADATA, is_export
from llama_jax.convert.export.source import Exported, PlainSource, checked_files
from llama_jax.convert.export.staging import staged, start_folder, write_file
from llama_jax.convert.folders import SINGLE
from llama_jax.convert.safetensors_writer import SafetensorsWriter, TensorPlan
from llama_jax.errors import UnsupportedModel
from llama_jax.params import ParamSpec, canonical_specs
from llama_jax.quantized import Layout, stored_layout

FORMAT = "pack-quantized"
_WORD = 8
"""Four-bit codes per 32-bit word."""


def export_compressed(
    checkpoint: str | Path, dst: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> Exported:
    """Writes a quantised checkpoint without changing a code.

    A quantised embedding is decoded, also one that the output projection is tied to, since the format's readers take
    few bits of linear layers only. Leaves pass one by one.

    Args:
      checkpoint, dst, overwrite, progress: see `export_hf`.

    Raises:
      UnsupportedModel: weights are not quantised, or in a layout that the format cannot hold; or experts are routed.
      ModelNotFound, CheckpointError, StorageError, DoesNotFit: see `export_hf`.
    """
    plain, dst = PlainSource(checkpoint), Path(dst).absolute()
    source = plain.stored
    layouts = {leaf: stored_layout(name) for leaf, name in source.config.schemes if leaf != "embed"}
    packed = {leaf: layout for leaf, layout in layouts.items() if layout is not None}
    _check(source, packed)
    names = find_family(source.config.family).tensor_names
    specs = {renamed(spec.hf, names): spec for spec in canonical_specs(source.config)}
    plans = {name: _plans(name, spec, packed.get(spec.leaf), plain) for name, spec in specs.items()}
    tensors = {name: plan for own in plans.values() for name, plan in own.items()}
    total, done = sum(plan.nbytes for plan in tensors.values()), 0
    files = checked_files(source.checkpoint, FILES)
    settings = quantization_config(source.config, {name: packed.get(spec.leaf) for name, spec in specs.items()})
    files[CONFIG] = json_bytes(json.loads(files[CONFIG]) | {"quantization_config": settings})
    with staged(dst, needed=total, overwrite=overwrite, replaceable=is_export) as partial:
        start_folder(partial)
        writer = SafetensorsWriter(partial / SINGLE, tensors, METADATA)
        try:
            for name, spec in specs.items():
                for tensor, array in _tensors(name, spec, packed.get(spec.leaf), plain).items():
                    writer.write(tensor, np.ascontiguousarray(array))
                    done += array.nbytes
                if progress:
                    progress(done, total, spec.name)
        finally:
            writer.close()
        for name, data in files.items():
            write_file(partial / name, data)
    decoded = ("the embedding was decoded",) if dict(source.config.schemes).get("embed") else ()
    return Exported(dst, tuple(sorted([SINGLE, *files])), len(tensors), total, source.checkpoint.dtype, decoded)


def quantization_config(config: LlamaConfig, layouts: Mapping[str, Layout | None]) -> dict[str, Any]:
    """The entry of config.json about the weights.

    Args:
      layouts: of each tensor by its Hugging Face name; None of those that are not quantised.
    """
    modules: dict[Layout, list[str]] = {}
    for name, layout in layouts.items():
        if layout is not None:
            modules.setdefault(layout, []).append(name.removesuffix(".weight"))
    linear = (name.removesuffix(".weight") for name in layouts if name.endswith(("_proj.weight", "lm_head.weight")))
    ignored = [module for module in linear if not any(module in named for named in modules.values())]
    if config.tie_word_embeddings:
        ignored.append("lm_head")
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear"] if len(modules) == 1 else named,
                "weights": {
                    "num_bits": layout.bits,
                    "type": "int",
                    "symmetric": layout.symmetric,
                    "strategy": "group" if layout.group else "channel",
                    "group_size": layout.group,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for i, (layout, named) in enumerate(modules.items())
        },
    }


def _check(source: CheckpointSource, packed: Mapping[str, Layout]) -> None:
    if not packed:
        raise UnsupportedModel(
            f"{source.path} has no weights in few bits", hint="quantise it first, or export it with --to hf"
        )
    shapes = {spec.leaf: spec.shape for spec in canonical_specs(source.config) if spec.path[-1] == "weight"}
    if stacks := [leaf for leaf, shape in shapes.items() if len(shape) > 2]:  # plain ones have other names there too
        raise UnsupportedModel(
            f"{stacks[0]} is a stack of routed experts, which are not exported to {FORMAT}",
            hint="export decoded weights with --to hf",
        )
    names = dict(source.config.schemes)
    for leaf, layout in packed.items():
        rows, columns = shapes[leaf]
        if layout.kind == "fp8" or layout.offset == "min" or names[leaf] != layout.name:
            why = f"is stored as {names[leaf]}"
        elif columns % _WORD or (layout.offset == "zero" and rows % _WORD):
            why = f"has {rows} x {columns} numbers, which do not fill words of {_WORD}"
        else:
            continue
        raise UnsupportedModel(
            f"{leaf} {why}, which {FORMAT} does not hold",
            hint="quantise with --symmetric or --weights int4_g64_zero, or export decoded weights with --to hf",
        )


def _plans(name: str, spec: ParamSpec, layout: Layout | None, plain: PlainSource) -> dict[str, TensorPlan]:
    if layout is None or spec.path[-1] != "weight":
        return {name: TensorPlan(plain.dtype(spec).name, spec.shape)}
    (rows, columns), per_word = spec.shape, 32 // layout.bits
    groups = columns // (layout.group or columns)
    found = {
        f"{name}_packed": TensorPlan("int32", (rows, columns // per_word)),
        f"{name}_scale": TensorPlan(layout.scale_dtype, (rows, groups)),
        f"{name}_shape": TensorPlan("int64", (2,)),
    }
    if layout.offset == "zero":
        found[f"{name}_zero_point"] = TensorPlan("int32", (rows // per_word, groups))
    return found


def _tensors(name: str, spec: ParamSpec, layout: Layout | None, plain: PlainSource) -> dict[str, np.ndarray]:
    if layout is None or spec.path[-1] != "weight":
        return {name: plain.read(spec)}
    members = plain.members(spec)
    # Of each signed code the highest bit is turned, which adds half of the range; words take codes in the same order.
    turned = members[layout.name].view(np.uint8) ^ (0x88 if layout.kind == "int4" else 0x80)
    found = {
        f"{name}_packed": turned.view("<i4"),
        f"{name}_scale": members["scales"].reshape(spec.shape[0], -1),
        f"{name}_shape": np.asarray(spec.shape, np.int64),
    }
    if layout.offset == "zero":
        zeros = members["zeros"].reshape(spec.shape[0], -1)
        half = 1 << (layout.bits - 1)
        if zeros.min() < -half or zeros.max() >= half:
            raise UnsupportedModel(
                f"{spec.leaf} has zero points beyond its codes, which {FORMAT} does not hold",
                hint="export decoded weights with --to hf",
            )
        down: np.ndarray = (zeros.astype(np.int16) + half).astype(np.uint8).T
        if layout.kind == "int4":
            down = down[:, 0::2] | down[:, 1::2] << 4
        found[f"{name}_zero_point"] = np.ascontiguousarray(np.ascontiguousarray(down).view("<i4").T)
    return found
