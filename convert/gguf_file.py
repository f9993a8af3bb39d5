"""Reading GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3, little-endian.

Every length is checked against the file's size before it is used, so a damaged file ends in an error and never in a
long loop or a large allocation. Data is read with `pread` and not mapped, since truncating a mapped file kills the
process. The quantised formats themselves are decoded by the `gguf` package of llama.cpp.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llama_jax.checkpoint.source import BFLOAT16
from llama_jax.checkpoint.wrong_file import AGAIN, GGUF
from llama_jax.convert.weight_file import closed_on_error, read_at, refuse_other
from llama_jax.errors import CheckpointError, UnsupportedModel

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
MAX_HEADER_BYTES = 64 << 20
"""Four times what the largest vocabularies take. As Python's values a header needs up to ten times its size."""
_MAX_NAME = 65_535
_MAX_DIMS = 4
_BLOCK_ELEMENTS = 2 << 20
"""Numbers that are decoded at a time; the decoders need about ten times the memory of their result."""
_PLAIN = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: BFLOAT16}
"""GGML types that are kept as they are: F32, F16, BF16."""
_REQUANTISE = "quantise the model again from its original weights, or use a GGUF file of another type, e.g. Q4_K_M"
_REPACKED = "llama.cpp makes this order itself now while it loads {0}: use the model's {0} file"
_REMOVED = {
    4: ("Q4_2", _REQUANTISE),
    5: ("Q4_3", _REQUANTISE),
    **{i: (f"Q4_0_{shape}", _REPACKED.format("Q4_0")) for i, shape in ((31, "4_4"), (32, "4_8"), (33, "8_8"))},
    **{i: (f"IQ4_NL_{shape}", _REPACKED.format("IQ4_NL")) for i, shape in ((36, "4_4"), (37, "4_8"), (38, "8_8"))},
}
"""Types that llama.cpp has removed (`enum ggml_type` of ggml/include/ggml.h): number to name and what to do."""
_MAX_KIND = 1023
"""No type of llama.cpp or of its forks has a larger number."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
      shape: outermost dimension first, the reverse of the file's order.
      kind: number of the GGML type.
      offset: where its data begins in the file, in bytes.
      nbytes: size of its data in the file.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int


class GgufFile:
    """An open GGUF file.

    Attributes:
      metadata: key to value; float32 values are the shortest decimal number that rounds to them (1e-05, not
        9.999999747378752e-06), arrays are lists.
      tensors: name to tensor.

    Raises:
      CheckpointError: the file cannot be opened or is malformed.
      UnsupportedModel: a version, byte order or tensor type that is not supported.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as e:
            raise CheckpointError(
                f"cannot open {path}: {e.strerror}", hint="check that it is there and readable"
            ) from e
        with closed_on_error(self.close):
            self._size = os.fstat(self._file.fileno()).st_size
            self.metadata, self.tensors = self._parse()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def dtype(self, name: str) -> np.dtype:
        """Dtype that `read` gives: the tensor's own, or float32 for quantised ones."""
        return _PLAIN.get(self.tensors[name].kind, np.dtype(np.float32))

    def type_name(self, name: str) -> str:
        """GGML's name of a tensor's type."""
        import gguf

        return gguf.GGMLQuantizationType(self.tensors[name].kind).name

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor; see `read_into`."""
        out = np.empty(self.tensors[name].shape, self.dtype(name))
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Fills an array of the tensor's size and `dtype`, decoding quantised ones block by block.

        Raises:
          CheckpointError: the file ends too early.
          UnsupportedModel: a quantised type that the gguf package cannot decode.
        """
        tensor = self.tensors[name]
        if tensor.kind in _PLAIN:
            self._fill(out.reshape(-1).view(np.uint8), tensor.offset, name)
            return
        rows = out.reshape(-1, tensor.shape[-1])
        row_bytes = tensor.nbytes // len(rows)
        step = max(1, _BLOCK_ELEMENTS // tensor.shape[-1])
        for start in range(0, len(rows), step):
            raw = np.empty((min(step, len(rows) - start), row_bytes), np.uint8)
            self._fill(raw.reshape(-1), tensor.offset + start * row_bytes, name)
            rows[start : start + len(raw)] = self._decode(raw, tensor.kind, name)

    def read_raw(self, name: str) -> np.ndarray:
        """The bytes of a quantised tensor: uint8 [rows, bytes of a row].

        Raises:
          CheckpointError: the file ends too early.
        """
        tensor = self.tensors[name]
        rows = math.prod(tensor.shape[:-1])
        raw = np.empty((rows, tensor.nbytes // rows), np.uint8)
        self._fill(raw.reshape(-1), tensor.offset, name)
        return raw

    def check_decodable(self) -> None:
        """Raises UnsupportedModel if one of the tensors has a type that the gguf package cannot decode."""
        import gguf

        names = {tensor.kind: name for name, tensor in self.tensors.items() if tensor.kind not in _PLAIN}
        for kind, name in names.items():
            _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
            self._decode(np.zeros((1, size), np.uint8), kind, name)

    def _decode(self, raw: np.ndarray, number: int, name: str) -> np.ndarray:
        import gguf

        kind = gguf.GGMLQuantizationType(number)
        try:
            with np.errstate(all="ignore"):  # scales of a damaged file; who wants finite weights asks for them
                return gguf.dequantize(raw, kind)
        except NotImplementedError as e:
            raise UnsupportedModel(
                f"{self.path}: tensor {name} has type {kind.name}, which cannot be decoded",
                hint="use a GGUF file of another quantisation, e.g. Q8_0 or Q4_K_M",
            ) from e

    def _fill(self, out: np.ndarray, offset: int, name: str) -> None:
        read_at(self._file.fileno(), memoryview(out), offset, self.path, f"tensor {name}")

    def _bad(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what} (near byte {self._file.tell()} of {self._size})", hint=AGAIN)

    def _take(self, n: int) -> bytes:
        if n > self._size - self._file.tell():
            raise self._bad(f"{n} bytes are announced, which the file does not have")
        if n > MAX_HEADER_BYTES - self._file.tell():
            raise self._bad(f"metadata and list of tensors have more than {MAX_HEADER_BYTES:,} bytes")
        data = self._file.read(n)
        if len(data) != n:
            raise self._bad("the file ends too early")
        return data

    def _number(self, fmt: str) -> Any:
        return struct.unpack(fmt, self._take(struct.calcsize(fmt)))[0]

    def _text(self, limit: int | None = None) -> str:
        length = self._number("<Q")
        if limit is not None and length > limit:
            raise self._bad(f"a name has {length} bytes")
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError as e:
            raise self._bad("a text is not valid UTF-8") from e

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            item, count = self._number("<I"), self._number("<Q")
            if depth >= 2:
                raise self._bad("arrays are nested too deeply")
            if item in _SCALARS:
                data = np.frombuffer(self._take(count * struct.calcsize(_SCALARS[item])), _SCALARS[item])
                return [_shortest(x) for x in data] if item == _FLOAT32 else data.tolist()
            # Every string and every inner array takes eight bytes at least.
            if count > (self._size - self._file.tell()) // 8:
                raise self._bad(f"an array of {count} values is announced")
            return [self._value(item, depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._bad(f"a value has the unknown type {kind}")
        value = self._number(_SCALARS[kind])
        return _shortest(np.float32(value)) if kind == _FLOAT32 else value

    def _parse(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self._size < 24 or self._take(4) != GGUF:
            refuse_other(self.path, GGUF)
            raise self._bad("this is not a GGUF file")
        version = self._number("<I")
        if version not in (2, 3):
            order = " or byte order" if version & 0xFFFF == 0 else ""
            raise UnsupportedModel(
                f"{self.path}: GGUF version {version}{order}", hint="supported: 2 and 3, little-endian"
            )
        tensor_count, key_count = self._number("<Q"), self._number("<Q")
        metadata: dict[str, Any] = {}
        for _ in self._counted(key_count, 13):
            key = self._text(_MAX_NAME)
            if key in metadata:
                raise self._bad(f"key {key!r} stands twice")
            metadata[key] = self._value(self._number("<I"))
        infos = {}
        for _ in self._counted(tensor_count, 24):
            name = self._text(_MAX_NAME)
            if name in infos:
                raise self._bad(f"tensor {name!r} stands twice")
            dims = self._number("<I")
            if not 1 <= dims <= _MAX_DIMS:
                raise self._bad(f"tensor {name} has {dims} dimensions")
            shape = tuple(self._number("<Q") for _ in range(dims))[::-1]
            infos[name] = (shape, self._number("<I"), self._number("<Q"))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._bad(f"alignment {alignment!r} is not a power of two")
        data = -(-self._file.tell() // alignment) * alignment
        tensors = {name: self._tensor(name, *info, data) for name, info in infos.items()}
        end, before = data, ""
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            if tensor.offset < end:
                raise CheckpointError(f"{self.path}: tensors {before} and {name} overlap", hint=AGAIN)
            end, before = tensor.offset + tensor.nbytes, name
        return metadata, tensors

    def _counted(self, count: int, smallest: int) -> Iterator[int]:
        if count > self._size // smallest:
            raise self._bad(f"{count} entries are announced")
        return iter(range(count))

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int, data: int) -> Tensor:
        if kind in _PLAIN:
            block, size = 1, _PLAIN[kind].itemsize
        else:
            import gguf

            try:
                block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
            except (ValueError, KeyError) as e:
                raise self._unknown_kind(name, kind) from e
        if 0 in shape or shape[-1] % block:
            raise CheckpointError(
                f"{self.path}: tensor {name} has shape {list(shape)}, its rows do not divide into blocks of {block}",
                hint=AGAIN,
            )
        nbytes = math.prod(shape) // block * size
        if data + offset + nbytes > self._size:
            raise CheckpointError(
                f"{self.path}: tensor {name} ends at byte {data + offset + nbytes}, the file at {self._size}: "
                "it is truncated",
                hint=AGAIN,
            )
        return Tensor(shape, kind, data + offset, nbytes)

    def _unknown_kind(self, name: str, kind: int) -> UnsupportedModel | CheckpointError:
        if kind in _REMOVED:
            called, hint = _REMOVED[kind]
            what = f"has the GGML type {called} ({kind}), which llama.cpp has removed"
            return UnsupportedModel(f"{self.path}: tensor {name} {what}", hint=hint)
        if kind > _MAX_KIND:
            return CheckpointError(f"{self.path}: tensor {name} has the type {kind}, which no GGML has", hint=AGAIN)
        return UnsupportedModel(
            f"{self.path}: tensor {name} has the unknown type {kind}: the installed gguf package does not have it",
            hint="it is of a newer llama.cpp or of a fork: upgrade the gguf package, or use a file of another type, "
            "e.g. Q8_0 or Q4_K_M",
        )


def _shortest(value: np.float32) -> float:
    """The float64 of the shortest decimal number that rounds to this float32."""
    return float(str(value))
