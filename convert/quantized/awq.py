"""AWQ (arXiv:2306.00978) in the "gemm" layout of AutoAWQ (https://github.com/casper-hansen/AutoAWQ), the usual one.

A linear layer with weight [out, in] becomes `qweight` [in, out / 8], `qzeros` [groups, out / 8] and `scales`
[groups, out]. Each int32 holds eight neighbouring outputs, in the order 0, 2, 4, 6, 1, 3, 5, 7 from its lowest bits on.
The value is (code - zero) * scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llama_jax.config.fields import Fields
from llama_jax.convert.quantized import settings
from llama_jax.convert.quantized.codes import Codes
from llama_jax.convert.quantized.scheme import FLOATS, Bundle, Part, Scheme, cdiv, grouped, unsupported
from llama_jax.quantized import Layout

_POSITION = (0, 4, 1, 5, 2, 6, 3, 7)
"""Position of each of eight neighbouring outputs in its word."""
_BITS = 4


@dataclass(frozen=True)
class Awq(Scheme):
    """See `scheme.Scheme`."""

    group: int | None

    names = re.compile(r"(.+)\.(qweight|qzeros|scales)")
    suffix = ".weight"

    @classmethod
    def read(cls, f: Fields) -> Awq:
        settings.one_of(f, "bits", (_BITS,), _BITS)
        version = f.string("version", None) or f.string("format", "gemm")
        settings.one_of(Fields({"version": version.lower()}, f.prefix), "version", ("gemm",), "gemm")
        settings.one_of(f, "zero_point", (True,), True)
        return cls(
            group=settings.group_size(f, default=128),
            ignored=frozenset(settings.names(f, "modules_to_not_convert")),
        )

    @property
    def label(self) -> str:
        return f"awq int{_BITS}, {'per channel' if self.group is None else f'groups of {self.group}'}"

    def parts(self, bundle: Bundle, shape: tuple[int, ...]) -> Mapping[str, Part]:
        rows, cols = shape
        if rows % 8:
            raise unsupported("bits", _BITS, f"a multiple of 8 outputs; {bundle.weight} is {list(shape)}")
        groups = cdiv(cols, self.group or cols)
        return {
            "qweight": Part(("I32",), ((cols, rows // 8),)),
            "qzeros": Part(("I32",), ((groups, rows // 8),)),
            "scales": Part(FLOATS, ((groups, rows),), scale=True),
        }

    def layout(self, bundle: Bundle, shape: tuple[int, ...]) -> Layout | None:
        return grouped("int4", self.group, shape[1], "zero", bundle.entry("scales").dtype)

    def codes(self, bundle: Bundle, tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> Codes:
        return Codes(
            _in_order(tensors["qweight"]),
            tensors["scales"].T,
            (1, self.group or shape[1]),
            _in_order(tensors["qzeros"]),
        )


def _in_order(words: np.ndarray) -> np.ndarray:
    """[n, out / 8] int32 to [out, n] uint8."""
    turned = np.ascontiguousarray(words.T).view(np.uint32)
    out = np.empty((turned.shape[0], 8, turned.shape[1]), np.uint8)
    for i, position in enumerate(_POSITION):
        out[:, i] = turned >> np.uint32(_BITS * position) & np.uint32(2**_BITS - 1)
    return out.reshape(-1, turned.shape[1])
