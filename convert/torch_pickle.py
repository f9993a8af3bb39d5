"""Reading the pickles of `torch.save` as data.

A pickle is a program: it names functions and calls them. Python's own `Unpickler`, even with a `find_class` that allows
a few names, runs that program: it calls what was found, sets attributes, and trusts sizes and memo indices, which
cost memory before the first check. So this module interprets the few instructions that a state dict needs, on plain
values: nothing is imported, names from the file are looked up only in the tables below, and every other
instruction or name is an error. Instructions: `pickletools` of the standard library documents each.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_INSTRUCTIONS = 500_000
"""About 30 make a tensor; bounds time and the number of values."""
MAX_PICKLE_BYTES = 16 << 20
"""About 150 bytes describe a tensor."""
_MAX_INTEGER_BYTES = 16
_MAX_DIMS = 8
MAX_NAME = 4096

STORAGES: Mapping[str, tuple[str, int]] = {
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}
"""Class of torch to safetensors' name of its dtype and the bytes of an element. Few of them can be weights."""

_DICT = ("collections", "OrderedDict")
_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_OLD_TENSOR = ("torch._utils", "_rebuild_tensor")
_PARAMETER = ("torch._utils", "_rebuild_parameter")
_NAMES = (_DICT, _TENSOR, _OLD_TENSOR, _PARAMETER)


class PickleError(ValueError):
    """A fault of a pickle, worded as part of a sentence."""


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names; never looked up."""

    module: str
    name: str


@dataclass(frozen=True)
class Storage:
    """A run of numbers somewhere in the file.

    Attributes:
      kind: a key of `STORAGES`.
      key: what the file calls it.
      numel: how many numbers it has.
    """

    kind: str
    key: str
    numel: int


@dataclass(frozen=True)
class TensorView:
    """A tensor: a view of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def unpickle(data: bytes, start: int = 0) -> tuple[Any, int]:
    """Interprets one pickle.

    Args:
      data: bytes that hold it; more may follow.
      start: where it begins.

    Returns:
      Its value, made of None, bool, int, float, str, tuple, list, dict, `Name`, `Storage` and `TensorView`; and
      where it ends in `data`.

    Raises:
      PickleError: it is malformed, too large, or needs anything else.
    """
    machine = _Machine(data, start)
    try:
        return machine.run(), machine.at
    except (IndexError, KeyError, struct.error, UnicodeDecodeError) as e:
        raise PickleError(f"its pickle is malformed near byte {machine.at} ({type(e).__name__})") from e


class _Machine:
    """The stack, the marks and the memo of one run."""

    def __init__(self, data: bytes, start: int):
        self.data, self.at = data, start
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(MAX_INSTRUCTIONS):
            code = self.take(1)
            if code == b".":
                if len(self.stack) != 1 or self.marked:
                    raise PickleError("its pickle ends with values left over")
                return self.stack[0]
            run = _INSTRUCTIONS.get(code)
            if run is None:
                raise PickleError(f"its pickle has the instruction 0x{code.hex()}, which no state dict needs")
            run(self)
        raise PickleError(f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions")

    def take(self, n: int) -> bytes:
        end = self.at + n
        if end > len(self.data):
            raise PickleError(f"its pickle announces {n} bytes at byte {self.at}, where it ends")
        taken, self.at = self.data[self.at : end], end
        return taken

    def number(self, fmt: str) -> Any:
        return struct.unpack(fmt, self.take(struct.calcsize(fmt)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + MAX_NAME)
        if end < 0:
            raise PickleError("its pickle holds a name without an end")
        return self.take(end + 1 - self.at)[:-1].decode("utf-8")

    def integer(self, n: int) -> int:
        if not 0 <= n <= _MAX_INTEGER_BYTES:
            raise PickleError(f"its pickle holds an integer of {n} bytes")
        return int.from_bytes(self.take(n), "little", signed=True)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.marked.pop()
        return values

    def pop(self, n: int) -> tuple[Any, ...]:
        if n > len(self.stack):
            raise IndexError
        values = tuple(self.stack[len(self.stack) - n :])
        del self.stack[len(self.stack) - n :]
        return values

    def append(self, values: list[Any] | tuple[Any, ...]) -> None:
        if not isinstance(self.stack[-1], list):
            raise PickleError("its pickle appends to something that is not a list")
        self.stack[-1].extend(values)

    def set_items(self, values: list[Any] | tuple[Any, ...]) -> None:
        if not isinstance(self.stack[-1], dict) or len(values) % 2:
            raise PickleError("its pickle sets an item of something that is not a dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # No tuples: the hash of one that holds another twice, and so on, takes time that doubles with each.
            if type(key) not in (str, int):
                raise PickleError(f"its pickle has a {type(key).__name__} as the key of a dict")
            self.stack[-1][key] = value

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("its pickle has a name that is not a string")
        if (module, name) not in _NAMES and not (module == "torch" and name in STORAGES):
            raise PickleError(f"its pickle names {module:.100}.{name:.100}, which no state dict needs; nothing was run")
        self.push(Name(module, name))

    def call(self) -> None:
        function, args = self.pop(2)
        if not isinstance(function, Name) or not isinstance(args, tuple):
            raise PickleError("its pickle calls something that is not a function")
        which = (function.module, function.name)
        if which == _DICT and not args:
            self.push({})
        elif which in (_TENSOR, _OLD_TENSOR) and len(args) >= 4:
            self.push(_view(*args[:4]))
        elif which == _PARAMETER and args and isinstance(args[0], TensorView):
            self.push(args[0])
        else:
            raise PickleError(f"its pickle calls {function.module}.{function.name} in a way that torch does not")

    def build(self) -> None:
        """Attributes of an object. A state dict has versions of its modules there, which say nothing about tensors."""
        target, _ = self.pop(2)
        if not isinstance(target, dict):
            raise PickleError(f"its pickle sets attributes of a {type(target).__name__}")
        self.push(target)

    def storage(self) -> None:
        (value,) = self.pop(1)
        match value:
            case ("storage", Name(module="torch", name=kind), str(key), str(), int(numel), *rest) if (
                kind in STORAGES and numel >= 0 and rest in ([], [None])
            ):
                self.push(Storage(kind, key, numel))
            case _:
                raise PickleError("its pickle refers to a storage in a way that torch does not")


def _view(storage: Any, offset: Any, shape: Any, strides: Any) -> TensorView:
    sizes = (offset, *shape, *strides) if isinstance(shape, tuple) and isinstance(strides, tuple) else (None,)
    if (
        not isinstance(storage, Storage)
        or not all(type(n) is int and 0 <= n < 2**63 for n in sizes)
        or len(shape) != len(strides)
        or len(shape) > _MAX_DIMS
    ):
        raise PickleError("its pickle describes a tensor with sizes that cannot be")
    return TensorView(storage, offset, shape, strides)


def _constant(value: Any) -> Callable[[_Machine], None]:
    return lambda m: m.push(value)


def _text(fmt: str) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.take(m.number(fmt)).decode("utf-8"))


def _integer(fmt: str) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.number(fmt))


def _tuple(n: int) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.pop(n))


def _put(index: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
    return lambda m: m.memo.__setitem__(index(m), m.stack[-1])


def _get(fmt: str) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.memo[m.number(fmt)])


_INSTRUCTIONS: Mapping[bytes, Callable[[_Machine], None]] = {
    b"\x80": lambda m: m.number("<B"),  # PROTO
    b"\x95": lambda m: m.number("<Q"),  # FRAME
    b"N": _constant(None),
    b"\x88": _constant(True),
    b"\x89": _constant(False),
    b")": _constant(()),
    b"]": lambda m: m.push([]),
    b"}": lambda m: m.push({}),
    b"K": _integer("<B"),
    b"M": _integer("<H"),
    b"J": _integer("<i"),
    b"G": _integer(">d"),
    b"\x8a": lambda m: m.push(m.integer(m.number("<B"))),  # LONG1
    b"\x8b": lambda m: m.push(m.integer(m.number("<i"))),  # LONG4
    b"X": _text("<I"),
    b"\x8c": _text("<B"),
    b"\x8d": _text("<Q"),
    b"U": _text("<B"),  # SHORT_BINSTRING and BINSTRING, from Python 2
    b"T": _text("<I"),
    b"(": _Machine.mark,
    b"t": lambda m: m.push(tuple(m.since_mark())),
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"a": lambda m: m.append(m.pop(1)),
    b"e": lambda m: m.append(m.since_mark()),
    b"s": lambda m: m.set_items(m.pop(2)),
    b"u": lambda m: m.set_items(m.since_mark()),
    b"q": _put(lambda m: m.number("<B")),
    b"r": _put(lambda m: m.number("<I")),
    b"\x94": _put(lambda m: len(m.memo)),
    b"h": _get("<B"),
    b"j": _get("<I"),
    b"c": lambda m: m.name(m.line(), m.line()),
    b"\x93": lambda m: m.name(*m.pop(2)),
    b"R": _Machine.call,
    b"b": _Machine.build,
    b"Q": _Machine.storage,
}
