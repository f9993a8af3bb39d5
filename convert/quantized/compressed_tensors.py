"""compressed-tensors, the format of llm-compressor and vLLM (https://github.com/vllm-project/compressed-tensors).

One `config_groups` entry says for the modules that its `targets` match how their weights are quantised. Stored are
`weight` in int8 or float8 (formats `int-quantized`, `float-quantized`, `naive-quantized`) or `weight_packed` with
integers of `num_bits` in int32 words (`pack-quantized`), and `weight_scale`, in floats, per tensor, row ("channel"),
group of columns, or block. The value is (code - weight_zero_point) * weight_scale. In `mxfp4-pack-quantized`
`weight_packed` has two four-bit floats a byte, the first in the low half, and `weight_scale` exponents of 2, plus 127.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.config.fields import Fields, bad
from llama_jax.convert.quantized import settings
from llama_jax.convert.quantized.codes import E2M1, Codes, packed_words, unpack
from llama_jax.convert.quantized.scheme import FLOATS, SAME, Bundle, Part, Scheme, cdiv, grouped, unsupported
from llama_jax.errors import CheckpointError
from llama_jax.quantized import Layout

_MXFP4 = "mxfp4-pack-quantized"
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", _MXFP4)
_STRATEGIES = ("tensor", "channel", "group", "block")


@dataclass(frozen=True)
class Weights:
    """The quantisation of the weights of one config group."""

    targets: tuple[str, ...]
    packed: bool
    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group: int
    block: tuple[int, int]

    @property
    def label(self) -> str:
        where = {"group": f"groups of {self.group}", "block": f"blocks of {self.block[0]}x{self.block[1]}"}
        return (
            f"{'fp' if self.kind == 'float' else 'int'}{self.bits}, {where.get(self.strategy, f'per {self.strategy}')}"
            f"{'' if self.symmetric else ', asymmetric'}"
        )

    def block_of(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        rows, cols = shape[-2:]
        return {"tensor": (rows, cols), "channel": (1, cols), "group": (1, self.group), "block": self.block}[
            self.strategy
        ]


@dataclass(frozen=True)
class CompressedTensors(Scheme):
    """See `scheme.Scheme`."""

    groups: tuple[Weights, ...]

    names = re.compile(r"(.+\.weight)_(packed|scale|zero_point|shape|g_idx)")
    # Scales of activations and of the cache: nothing here is quantised while it is computed.
    activations = re.compile(r".+\.((input|output|[qkv])_(scale|zero_point|global_scale))")

    @classmethod
    def read(cls, f: Fields) -> CompressedTensors:
        """Reads `quantization_config`; raises UnsupportedModel naming what is not supported."""
        settings.absent(f, "transform_config")
        sparsity = f.get("sparsity_config")
        if isinstance(sparsity, Mapping) and sparsity and sparsity.get("format") != "dense":
            raise unsupported(f.name("sparsity_config.format"), sparsity.get("format"), "dense")
        if f.get("quantization_status", "compressed") not in ("compressed", "frozen"):
            raise unsupported(f.name("quantization_status"), f.get("quantization_status"), "compressed")
        groups = f.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise bad(f.name("config_groups"), groups, "an object with an entry at least")
        read = [_group(f, name, group) for name, group in groups.items()]
        ignored = (name for name in settings.names(f, "ignore") if not name.startswith("re:"))
        return cls(frozenset(ignored), tuple(g for g in read if g is not None))

    @property
    def label(self) -> str:
        kinds = dict.fromkeys(group.label for group in self.groups)
        return f"compressed-tensors {'; '.join(kinds) or 'without quantised weights'}"

    def parts(self, bundle: Bundle, shape: tuple[int, ...]) -> Mapping[str, Part]:
        group, (rows, cols) = self._group_of(bundle), shape
        block = group.block_of(shape)
        if group.strategy == "group" and cols % group.group:
            raise unsupported("group_size", group.group, f"divisors of {cols}, the columns of {bundle.weight}")
        scales = cdiv(rows, block[0]), cdiv(cols, block[1])
        shapes = {"tensor": ((1,), (), scales), "channel": (scales, (rows,))}.get(group.strategy, (scales,))
        fp8 = group.kind == "float"
        if fp8 and group.packed:
            return {
                "packed": Part(("U8",), ((rows, cols // 2),)),
                "scale": Part(("U8", "F8_E8M0"), (scales,), scale=True),
            }
        parts = {"scale": Part(FLOATS, shapes, scale=True, nonzero=fp8)}
        if group.packed:
            # Of 3, 5, 6 and 7 bits some versions put as many into a word as it holds whole, others a stream of bits.
            parts["packed"] = Part(("I32",), tuple((rows, words) for words in packed_words(group.bits, cols)))
            parts["shape"] = Part(("I64", "I32"), ((2,),))
            # Older versions did not pack the zero points.
            packed = tuple((words, scales[1]) for words in packed_words(group.bits, rows))
            zeros = Part(("I32", "I8"), (*packed, *shapes))
        else:
            parts[SAME] = Part(("F8_E4M3",) if fp8 else ("I8",), ((rows, cols),))
            zeros = Part(("F8_E4M3",) if fp8 else ("I8",), shapes)
        # Older versions also stored zero points that are 0.
        parts["zero_point"] = dataclasses.replace(zeros, optional=group.symmetric)
        if group.strategy == "group":
            parts["g_idx"] = Part(("I32",), ((cols,),), optional=True)
        return parts

    def layout(self, bundle: Bundle, shape: tuple[int, ...]) -> Layout | None:
        group, shifted = self._group_of(bundle), "zero_point" in bundle.tensors
        columns = {"group": group.group, "block": group.block[1]}.get(group.strategy)
        if not bundle.even("g_idx", group.group):
            return None
        scales = bundle.entry("scale").dtype
        if group.kind == "float" and group.packed:
            return grouped("int8", columns, shape[-1], None, "BF16")
        if group.kind == "float":
            return None if shifted else grouped("fp8", columns, shape[-1], None, scales)
        kind = "int4" if group.packed and group.bits <= 4 else "int8"
        return grouped(kind, columns, shape[-1], "zero" if shifted else None, scales)

    def order(self, bundle: Bundle) -> np.ndarray | None:
        return bundle.order("g_idx")

    def codes(self, bundle: Bundle, tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> Codes:
        group, (rows, cols) = self._group_of(bundle), shape
        block = group.block_of(shape)
        grid = cdiv(rows, block[0]), cdiv(cols, block[1])
        zeros = tensors.get("zero_point")
        if group.packed and group.kind == "float":
            # Codes and their numbers doubled, scales halved: whole numbers, as a layout holds them.
            values = E2M1[unpack(tensors["packed"].view(np.int32), group.bits, cols)]
            return Codes(values, tensors["scale"].view(ml_dtypes.float8_e8m0fnu).astype(np.float32) / 2, block)
        if group.packed:
            if tuple(tensors["shape"].tolist()) != shape:
                raise CheckpointError(
                    f"{bundle.where('shape')} says {tensors['shape'].tolist()}, config.json asks for {list(shape)}",
                    hint="config.json and the weights do not belong together",
                )
            values = unpack(tensors["packed"], group.bits, cols)
            # Stored is the signed number plus half the range; a zero point is stored likewise, packed down the rows.
            half = np.full((1, 1), 2 ** (group.bits - 1), np.float32)
            if zeros is None:
                zeros = half
            elif zeros.dtype == np.int8:
                zeros = zeros.reshape(grid) + half
            else:
                zeros = unpack(zeros.T, group.bits, rows).T
        else:
            values = tensors[SAME]
            zeros = None if zeros is None else zeros.reshape(grid)
        return Codes(values, tensors["scale"].reshape(grid), block, zeros, _columns(bundle, tensors, grid[1]))

    def _group_of(self, bundle: Bundle) -> Weights:
        """The group whose targets name the module; where there is only one group, that."""
        module = bundle.weight.removesuffix(".weight")
        if len(self.groups) == 1:
            return self.groups[0]
        names = (module, *(name.rsplit(".", 1)[0] for _, name in bundle.tensors.values()))
        for matches in (_by_name, _by_pattern, _by_class):
            for group in self.groups:
                if any(matches(target, name) for target in group.targets for name in names):
                    return group
        raise CheckpointError(
            f"{bundle.path}: {module} is quantised, but no group of config.json's quantization_config names it",
            hint="config.json and the weights do not belong together",
        )


def _by_name(target: str, module: str) -> bool:
    return target == module


def _by_pattern(target: str, module: str) -> bool:
    text = target.removeprefix("re:")
    return text != target and settings.pattern("targets", text).match(module) is not None


def _by_class(target: str, module: str) -> bool:
    return target == ("Embedding" if module.endswith("embed_tokens") else "Linear")


def _columns(bundle: Bundle, tensors: Mapping[str, np.ndarray], groups: int) -> np.ndarray | None:
    """The group of each column where columns were reordered; -1 everywhere says that they were not."""
    index = tensors.get("g_idx")
    if index is None or (index == -1).all():
        return None
    bundle.check_groups("g_idx", index, groups)
    return index


def _group(f: Fields, name: str, value: Any) -> Weights | None:
    key = f"config_groups.{name}"
    if not isinstance(value, Mapping):
        raise unsupported(f.name(key), value)
    group = Fields(value, f"{f.name(key)}.")
    weights = group.get("weights")
    if weights is None:
        return None
    if not isinstance(weights, Mapping):
        raise bad(group.name("weights"), weights, "an object")
    w = Fields(weights, group.name("weights."))
    stored = group.get("format") or f.get("format", "")
    stored = settings.one_of(Fields({"format": stored}, f.prefix), "format", _FORMATS, "")
    kind = settings.one_of(w, "type", ("int", "float"), "int")
    bits = w.integer("num_bits", 8, high=8)
    packed = stored in ("pack-quantized", _MXFP4)
    floats = {_MXFP4: 4, "float-quantized": 8, "naive-quantized": 8}  # and their bits
    if (floats.get(stored) != bits) if kind == "float" else stored in (_MXFP4, "float-quantized"):
        raise unsupported(w.name("num_bits"), bits, f"{kind} weights in another format than {stored}")
    settings.absent(w, "dynamic")
    group_size = settings.group_size(w)
    strategy = settings.one_of(w, "strategy", _STRATEGIES, "group" if group_size else "tensor")
    block = w.get("block_structure", [1, 1])
    block = block.split("x") if isinstance(block, str) else block
    try:
        block_rows, block_cols = (int(n) for n in block)
    except (TypeError, ValueError) as e:
        raise bad(w.name("block_structure"), block, "two integers") from e
    if min(block_rows, block_cols) < 1:
        raise bad(w.name("block_structure"), block, "two positive integers")
    if strategy == "group" and group_size is None:
        strategy = "channel"
    if stored == _MXFP4 and (strategy, group_size) != ("group", 32):
        raise unsupported(w.name("group_size"), group_size, f"groups of 32 in {stored}")
    return Weights(
        targets=settings.names(group, "targets"),
        packed=packed,
        bits=bits,
        kind=kind,
        symmetric=w.boolean("symmetric", True),
        strategy=strategy,
        group=group_size or 1,
        block=(block_rows, block_cols),
    )
