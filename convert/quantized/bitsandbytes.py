"""bitsandbytes: nf4 and fp4 (QLoRA, arXiv:2305.14314), and int8 (LLM.int8(), arXiv:2208.07339).

Formats: https://huggingface.co/docs/bitsandbytes/reference/nn/linear4bit and `QuantState.as_dict` of
bitsandbytes/functional.py. In 4 bits the matrix is one run of numbers, two to a byte (the first in the high half), in
blocks of `blocksize` with a factor each: `weight.absmax`, float32, or again in 8 bits ("nested") with a table of 256
values, `weight.nested_quant_map`, and factors of its own. `weight.quant_map` says what each of the 16 codes stands for,
`weight.quant_state.bitsandbytes__<type>` is JSON in bytes. In 8 bits a row has one factor, `SCB`: code * SCB / 127.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llama_jax.config.fields import MISSING, Fields
from llama_jax.convert.quantized import settings
from llama_jax.convert.quantized.codes import Codes
from llama_jax.convert.quantized.scheme import DAMAGED, FLOATS, SAME, Bundle, Part, Scheme, cdiv, grouped
from llama_jax.errors import CheckpointError, UnsupportedModel
from llama_jax.quantized import Layout

_MAX_STATE_BYTES = 4096


@dataclass(frozen=True)
class _State:
    """The `quant_state` of one weight."""

    block: int
    nested_block: int
    nested_offset: float | None


@dataclass(frozen=True)
class Bitsandbytes4(Scheme):
    """See `scheme.Scheme`."""

    kind: str

    names = re.compile(
        r"(.+\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(?:nf4|fp4))"
    )

    @classmethod
    def read(cls, f: Fields) -> Bitsandbytes4:
        return cls(
            kind=settings.one_of(f, "bnb_4bit_quant_type", ("nf4", "fp4"), "fp4"),
            ignored=frozenset(settings.names(f, "llm_int8_skip_modules")),
        )

    @property
    def label(self) -> str:
        return f"bitsandbytes {self.kind}"

    def parts(self, bundle: Bundle, shape: tuple[int, ...]) -> Mapping[str, Part]:
        state_part = self._state_part(bundle)
        state = self._state(bundle, shape)
        count = int(np.prod(shape))
        blocks, nbytes = cdiv(count, state.block), cdiv(count, 2)
        parts = {
            # The bytes may be declared as another dtype, which some sharded trainers need.
            SAME: Part(("U8",), ((nbytes, 1), (1, nbytes))),
            state_part: Part(("U8",), (bundle.entry(state_part).shape,)),
            "quant_map": Part(("F32",), ((16,),), scale=True),
            "absmax": Part(("F32",), ((blocks,),), scale=True),
        }
        if state.nested_offset is not None:
            parts["absmax"] = Part(("U8",), ((blocks,),))
            parts["nested_absmax"] = Part(("F32",), ((cdiv(blocks, state.nested_block),),), scale=True)
            parts["nested_quant_map"] = Part(("F32",), ((256,),), scale=True)
        return parts

    def codes(self, bundle: Bundle, tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> Codes:
        rows, cols = shape
        state = self._state(bundle, shape)
        packed = tensors[SAME].reshape(-1)
        values = np.stack([packed >> 4, packed & np.uint8(15)], axis=-1).reshape(-1)[: rows * cols].reshape(shape)
        absmax = tensors["absmax"]
        if state.nested_offset is not None:
            factors = np.repeat(tensors["nested_absmax"], state.nested_block)[: absmax.size]
            absmax = tensors["nested_quant_map"][absmax] * factors + np.float32(state.nested_offset)
        if cols % state.block == 0:
            return Codes(values, absmax.reshape(rows, -1), (1, state.block), table=tensors["quant_map"])
        # Blocks that run on from one row into the next: a factor for every element.
        scales = np.repeat(absmax, state.block)[: rows * cols].reshape(shape)
        return Codes(values, scales, (1, 1), table=tensors["quant_map"])

    def _state_part(self, bundle: Bundle) -> str:
        part = f"quant_state.bitsandbytes__{self.kind}"
        if part not in bundle.tensors:
            raise bundle.lacks(part)
        return part

    def _state(self, bundle: Bundle, shape: tuple[int, ...]) -> _State:
        part = self._state_part(bundle)
        entry = bundle.entry(part)
        if entry.dtype != "U8" or len(entry.shape) != 1 or entry.nbytes > _MAX_STATE_BYTES:
            raise CheckpointError(f"{bundle.where(part)} is {entry.dtype}{list(entry.shape)}, no state", hint=DAMAGED)
        try:
            state = json.loads(bundle.read(part).tobytes())
            if not isinstance(state, dict) or tuple(state["shape"]) != shape or state["quant_type"] != self.kind:
                raise ValueError(f"it does not describe a {self.kind} weight of {list(shape)}")
            f = Fields(state)
            offset = state.get("nested_offset")
            nested = offset is not None
            return _State(
                block=f.integer("blocksize"),
                nested_block=f.integer("nested_blocksize", MISSING if nested else 1),
                nested_offset=f.number("nested_offset", positive=False) if nested else None,
            )
        except (ValueError, KeyError, TypeError, RecursionError, UnsupportedModel) as e:
            raise CheckpointError(f"{bundle.where(part)} is malformed ({e})", hint=DAMAGED) from e


@dataclass(frozen=True)
class Bitsandbytes8(Scheme):
    """See `scheme.Scheme`."""

    names = re.compile(r"(.+)\.(SCB|weight_format)")
    suffix = ".weight"

    @classmethod
    def read(cls, f: Fields) -> Bitsandbytes8:
        settings.one_of(f, "load_in_8bit", (True,), False)
        return cls(frozenset(settings.names(f, "llm_int8_skip_modules")))

    @property
    def label(self) -> str:
        return "bitsandbytes int8, per channel"

    def parts(self, bundle: Bundle, shape: tuple[int, ...]) -> Mapping[str, Part]:
        return {
            SAME: Part(("I8",), (shape,)),
            "SCB": Part(FLOATS, ((shape[0],),), scale=True),
            "weight_format": Part(("U8",), ((), (1,)), optional=True),
        }

    def layout(self, bundle: Bundle, shape: tuple[int, ...]) -> Layout | None:
        return grouped("int8", None, shape[1])

    def codes(self, bundle: Bundle, tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> Codes:
        if "weight_format" in tensors and tensors["weight_format"].item() != 0:
            raise UnsupportedModel(
                f"{bundle.where('weight_format')} is {tensors['weight_format'].item()}: the rows are stored in the "
                "order of a GPU's tensor cores",
                hint="save the model again with a newer bitsandbytes, which stores plain rows",
            )
        scales = tensors["SCB"].astype(np.float32).reshape(-1, 1) / np.float32(127)
        return Codes(tensors[SAME], scales, (1, shape[1]))
