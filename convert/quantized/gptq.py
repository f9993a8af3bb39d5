"""GPTQ (arXiv:2210.17323) as AutoGPTQ and GPTQModel store it (https://github.com/ModelCloud/GPTQModel).

A linear layer with weight [out, in] becomes `qweight` [in * bits / 32, out] and `qzeros` [groups, out * bits / 32],
both streams of bits in int32 words, `scales` [groups, out] and `g_idx` [in], the group of each input. The value is
(code - zero) * scale. Version 1 of the format, the usual one, stores every zero less 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llama_jax.config.fields import Fields
from llama_jax.convert.quantized import settings
from llama_jax.convert.quantized.codes import Codes, unpack
from llama_jax.convert.quantized.scheme import FLOATS, Bundle, Part, Scheme, cdiv, grouped, unsupported
from llama_jax.errors import CheckpointError
from llama_jax.quantized import Layout


@dataclass(frozen=True)
class Gptq(Scheme):
    """See `scheme.Scheme`."""

    bits: int
    group: int | None
    desc_act: bool
    symmetric: bool
    version: int

    names = re.compile(r"(.+)\.(qweight|qzeros|scales|g_idx)")
    suffix = ".weight"

    @classmethod
    def read(cls, f: Fields) -> Gptq:
        bits = settings.one_of(f, "bits", (2, 3, 4, 8), None)
        key = "checkpoint_format" if f.get("checkpoint_format") is not None else "format"
        stored = settings.one_of(f, key, ("gptq", "gptq_v2"), "gptq")
        dynamic = f.get("dynamic")
        if isinstance(dynamic, Mapping):  # patterns of modules; a minus before one leaves them unquantised
            dynamic = {k: v for k, v in dynamic.items() if not k.startswith("-:")}
        if dynamic:
            raise unsupported(f.name("dynamic"), dynamic, "the same parameters for every module")
        return cls(
            bits=bits,
            group=settings.group_size(f, default=128),
            desc_act=f.boolean("desc_act", False),
            symmetric=f.boolean("sym", False),
            version=2 if stored == "gptq_v2" else 1,
            ignored=frozenset(settings.names(f, "modules_to_not_convert")),
        )

    @property
    def label(self) -> str:
        groups = "per channel" if self.group is None else f"groups of {self.group}"
        return f"gptq int{self.bits}, {groups}{', act order' if self.desc_act else ''}"

    def parts(self, bundle: Bundle, shape: tuple[int, ...]) -> Mapping[str, Part]:
        rows, cols = shape
        if rows * self.bits % 32 or cols * self.bits % 32:
            raise unsupported("bits", self.bits, f"sizes that fill 32-bit words; {bundle.weight} is {list(shape)}")
        groups = cdiv(cols, self.group or cols)
        return {
            "qweight": Part(("I32",), ((cols * self.bits // 32, rows),)),
            "qzeros": Part(("I32",), ((groups, rows * self.bits // 32),)),
            "scales": Part(FLOATS, ((groups, rows),), scale=True),
            "g_idx": Part(("I32",), ((cols,),), optional=not self.desc_act),
        }

    def layout(self, bundle: Bundle, shape: tuple[int, ...]) -> Layout | None:
        if not bundle.even("g_idx", self.group or shape[1]):
            return None
        kind = "int8" if self.bits == 8 else "int4"
        return grouped(kind, self.group, shape[1], "zero", bundle.entry("scales").dtype)

    def order(self, bundle: Bundle) -> np.ndarray | None:
        return bundle.order("g_idx")

    def codes(self, bundle: Bundle, tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> Codes:
        rows, cols = shape
        scales = tensors["scales"].T
        groups = tensors.get("g_idx")
        if groups is not None:
            bundle.check_groups("g_idx", groups, scales.shape[1])
        values, zeros = unpack(tensors["qweight"].T, self.bits, cols), self._zeros(tensors["qzeros"], rows)
        middle = 2 ** (self.bits - 1)
        if self.symmetric and (zeros != middle).any():
            other = "gptq" if self.version == 2 else "gptq_v2"
            raise CheckpointError(
                f"{bundle.where('qzeros')} holds zeros from {zeros.min()} to {zeros.max()}, where symmetric codes have "
                f"{middle}",
                hint=f'if the file is of the other version, set "checkpoint_format": "{other}" in its config.json',
            )
        return Codes(values, scales, (1, self.group or cols), zeros.T, groups)

    def _zeros(self, words: np.ndarray, rows: int) -> np.ndarray:
        """[groups, rows] uint8."""
        largest = 2**self.bits - 1
        if self.version == 1 and 32 % self.bits == 0:
            # GPTQModel takes 1 from every number of a word by one subtraction, so that a zero of 0 borrows from its
            # neighbour; one addition undoes it. Where no zero is 0 the words are the same either way.
            return unpack(words.view(np.uint32) + np.uint32(0xFFFFFFFF // largest), self.bits, rows)
        zeros = unpack(words, self.bits, rows)
        return zeros if self.version == 2 else (zeros + np.uint8(1)) & np.uint8(largest)
