"""GGUF models in several files, as llama.cpp's gguf-split writes them: NAME-00001-of-00003.gguf and so on.

The first file holds all metadata and some tensors, the others hold tensors. Each says in `split.no` (from 0 on) and
`split.count` which it is (https://github.com/ggml-org/llama.cpp/tree/master/tools/gguf-split).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoint.source import SourceTensor
from llama_jax.convert.gguf_file import GgufFile, Tensor
from llama_jax.convert.weight_file import closed_on_error
from llama_jax.errors import CheckpointError

MAX_PARTS = 65_535
_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_HINT = "the parts belong together and keep their names: give them their own again, or get the missing ones"


class GgufParts:
    """An open GGUF model of one file or several.

    Attributes:
      path: the first file.
      metadata: of the first file.
      tensors: of all files.

    Raises:
      CheckpointError: a file is missing, damaged, or not the part that its name says; names it.
      UnsupportedModel: see `GgufFile`.
    """

    def __init__(self, path: Path):
        self.path = first_part(path)
        if not self.path.exists() and path.exists():
            raise CheckpointError(f"{self.path} is missing, the first part of the model of {path.name}", hint=_HINT)
        self._files: list[GgufFile] = []
        self._where: dict[str, GgufFile] = {}
        with closed_on_error(self.close):
            first = self._open(self.path)
            self.metadata = first.metadata
            count = _split(first, "count", 1)
            if count > 1:
                self._check_name(first, count)
                self._open_others(count)
                self._check_total(first)
        self.tensors: Mapping[str, Tensor] = {name: file.tensors[name] for name, file in self._where.items()}

    def close(self) -> None:
        """Closes all files."""
        for file in self._files:
            file.close()

    def dtype(self, name: str) -> np.dtype:
        """See `GgufFile.dtype`."""
        return self._where[name].dtype(name)

    def stored(self, name: str) -> SourceTensor:
        """The file that holds a tensor, and the tensor's place in it."""
        tensor = self.tensors[name]
        return SourceTensor(name, self._where[name].path, tensor.offset, tensor.nbytes)

    def read_into(self, name: str, out: np.ndarray) -> None:
        """See `GgufFile.read_into`."""
        self._where[name].read_into(name, out)

    def read(self, name: str) -> np.ndarray:
        """See `GgufFile.read`."""
        return self._where[name].read(name)

    def read_raw(self, name: str) -> np.ndarray:
        """See `GgufFile.read_raw`."""
        return self._where[name].read_raw(name)

    def check_decodable(self) -> None:
        """See `GgufFile.check_decodable`."""
        for file in self._files:
            file.check_decodable()

    def label(self) -> str | None:
        """The quantised types of matrices, most of the weights first; None if there are none."""
        sizes: Counter[str] = Counter()
        for file in self._files:
            for name, tensor in file.tensors.items():
                if len(tensor.shape) > 1:
                    sizes[file.type_name(name)] += math.prod(tensor.shape)
        kinds = [kind for kind, _ in sizes.most_common()]
        return f"GGUF {', '.join(kinds)}" if set(kinds) - {"F32", "F16", "BF16"} else None

    def _open(self, path: Path) -> GgufFile:
        file = GgufFile(path)
        self._files.append(file)
        for name in file.tensors:
            if name in self._where:
                raise CheckpointError(f"tensor {name} stands both in {self._where[name].path} and {path}", hint=_HINT)
            self._where[name] = file
        return file

    def _check_name(self, first: GgufFile, count: int) -> None:
        """Raises CheckpointError unless the name of the first part says what its metadata says."""
        named, number = _NAME.fullmatch(self.path.name), _split(first, "no", 0) + 1
        if named is not None and int(named[2]) == number == 1 and int(named[3]) == count:
            return
        which = f"the first of {count} parts" if number == 1 else f"part {number} of {count}"
        right = f"gguf-split names it NAME-{number:05}-of-{count:05}.gguf"
        raise CheckpointError(
            f"{self.path} is {which} of a GGUF model by its metadata, but not by its name",
            hint=right if number == 1 else f"{right}; rename all parts so, and give NAME-00001-of-{count:05}.gguf",
        )

    def _open_others(self, count: int) -> None:
        paths = parts_by_name(self.path)[1:]
        if missing := [path for path in paths if not path.is_file()]:
            more = f", and {len(missing) - 1} more of {count} parts" if len(missing) > 1 else ""
            raise CheckpointError(f"{missing[0]} is missing{more}", hint=_HINT)
        for number, path in enumerate(paths, 2):
            file = self._open(path)
            own = _split(file, "no", -1) + 1, _split(file, "count", -1)
            if own != (number, count):
                says = f"but part {own[0]} of {own[1]}" if min(own) > 0 else "which names no part"
                raise CheckpointError(f"{path} is not part {number} of {count} by its metadata, {says}", hint=_HINT)

    def _check_total(self, first: GgufFile) -> None:
        total = first.metadata.get("split.tensors.count")
        if total is not None and total != len(self._where):
            raise CheckpointError(
                f"{self.path}: the parts hold {len(self._where)} tensors, the metadata says {total}", hint=_HINT
            )


def _split(file: GgufFile, key: str, default: int) -> int:
    value: Any = file.metadata.get(f"split.{key}", default)
    if type(value) is not int or not -1 <= value <= MAX_PARTS:
        raise CheckpointError(f"{file.path}: split.{key} is {value!r:.40}", hint=_HINT)
    return value


def parts_by_name(path: Path) -> list[Path]:
    """All files of the model that a file is a part of by its name, the first part first; itself, if it is whole."""
    found = _NAME.fullmatch(path.name)
    if found is None:
        return [path]
    return [path.with_name(f"{found[1]}-{n:05}-of-{found[3]}.gguf") for n in range(1, max(1, int(found[3])) + 1)]


def first_part(path: Path) -> Path:
    """The file to open for a file of a model: the first part, whichever part is named."""
    return parts_by_name(path)[0]


def models_of(files: Iterable[Path]) -> list[Path]:
    """One path for each model among GGUF files: parts of one model count once."""
    return sorted({first_part(path) for path in files})
