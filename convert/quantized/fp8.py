"""8-bit floats: blocks with their own scale, as DeepSeek stores them, and rows with their own, as FBGEMM does.

Sources: https://huggingface.co/docs/transformers/quantization/finegrained_fp8 (`weight` in float8_e4m3fn and
`weight_scale_inv`, the factor of each block of `weight_block_size`, or of the tensor where that is null; as
`weight_scale` in files of https://github.com/neuralmagic/AutoFP8), and
https://huggingface.co/docs/transformers/quantization/fbgemm_fp8 (`weight` and `weight_scale`, a factor for each row).
Stacked experts are stored as the model multiplies with them, with the same names plus `_scale_inv` or `_scale`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llama_jax.config.fields import Fields, bad
from llama_jax.convert.quantized import settings
from llama_jax.convert.quantized.codes import Codes
from llama_jax.convert.quantized.scheme import FLOATS, SAME, Bundle, Part, Scheme, cdiv, grouped
from llama_jax.quantized import Layout

_STACKED = r"\.experts\.(?:gate_up|down)_proj"
_AUTO_FP8 = "scale"
"""AutoFP8, with the same name of the method, quantised whole tensors and calls their factor `weight_scale`."""
_ACTIVATION = re.compile(r".+[._](activation_scale|input_scale|input_scale_ub)")


@dataclass(frozen=True)
class BlockFp8(Scheme):
    """See `scheme.Scheme`."""

    block: tuple[int, int] | None

    names = re.compile(rf"(.+(?:\.weight|{_STACKED}))_(scale_inv|{_AUTO_FP8})")
    activations = _ACTIVATION

    @classmethod
    def read(cls, f: Fields) -> BlockFp8:
        settings.one_of(f, "fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
        key = "weight_block_size"
        block = f.integers(key, low=1, high=2**20) if f.get(key) is not None else None
        if block is not None and len(block) != 2:
            raise bad(f.name(key), block, "two integers")
        if block is None and key not in f.values and f.get("activation_scheme") != "static":
            block = [128, 128]  # static scales of activations are AutoFP8's, which has no blocks
        ignored = settings.names(f, "modules_to_not_convert") + settings.names(f, "ignored_layers")
        return cls(frozenset(ignored), None if block is None else (block[0], block[1]))

    @property
    def label(self) -> str:
        return "fp8, per tensor" if self.block is None else f"fp8, blocks of {self.block[0]}x{self.block[1]}"

    def parts(self, bundle: Bundle, shape: tuple[int, ...]) -> Mapping[str, Part]:
        *experts, rows, cols = shape
        scale = _scale_of(bundle)
        scales: tuple[tuple[int, ...], ...]
        if self.block is None or scale == _AUTO_FP8:
            scales = ((*experts, 1, 1),) if experts else ((), (1,), (1, 1))
        else:
            scales = ((*experts, cdiv(rows, self.block[0]), cdiv(cols, self.block[1])),)
        return {
            SAME: Part(("F8_E4M3",), (shape,)),
            scale: Part((*FLOATS, "F8_E8M0"), scales, scale=True, nonzero=True),
        }

    def layout(self, bundle: Bundle, shape: tuple[int, ...]) -> Layout | None:
        whole = self.block is None or _scale_of(bundle) == _AUTO_FP8
        return grouped("fp8", None if whole or self.block is None else self.block[1], shape[-1])

    def codes(self, bundle: Bundle, tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> Codes:
        scale = _scale_of(bundle)
        block = shape if self.block is None or scale == _AUTO_FP8 else self.block
        grid = cdiv(shape[0], block[0]), cdiv(shape[1], block[1])
        return Codes(tensors[SAME], tensors[scale].reshape(grid), block)


def _scale_of(bundle: Bundle) -> str:
    return _AUTO_FP8 if _AUTO_FP8 in bundle.tensors else "scale_inv"


@dataclass(frozen=True)
class FbgemmFp8(Scheme):
    """See `scheme.Scheme`."""

    names = re.compile(rf"(.+(?:\.weight|{_STACKED}))_(scale)")
    activations = _ACTIVATION

    @classmethod
    def read(cls, f: Fields) -> FbgemmFp8:
        return cls(frozenset(settings.names(f, "modules_to_not_convert")))

    @property
    def label(self) -> str:
        return "fbgemm_fp8, per channel"

    def parts(self, bundle: Bundle, shape: tuple[int, ...]) -> Mapping[str, Part]:
        *experts, rows, cols = shape
        # Stacks of experts are stored [in, out], with a factor for each output all the same.
        scales = ((*experts, 1, cols), (*experts, cols, 1)) if experts else ((rows, 1), (rows,))
        return {
            SAME: Part(("F8_E4M3",), (shape,)),
            "scale": Part(FLOATS, scales, scale=True, nonzero=True),
        }

    def layout(self, bundle: Bundle, shape: tuple[int, ...]) -> Layout | None:
        return grouped("fp8", None, shape[-1])

    def codes(self, bundle: Bundle, tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> Codes:
        rows, cols = shape
        stacked = len(bundle.entry(SAME).shape) == 3
        scales = tensors["scale"].reshape((1, cols) if stacked else (rows, 1))
        return Codes(tensors[SAME], scales, (rows, 1) if stacked else (1, cols))
