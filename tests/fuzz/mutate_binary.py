"""Mutations of safetensors and GGUF files that know where their numbers and texts stand."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fuzz.mutate_json import NUMBERS, STRINGS, Mutator, damaged, json_mutator

_LENGTHS = tuple(n for n in NUMBERS if isinstance(n, int) and 0 <= n < 2**64)


def safetensors_mutator(seeds: Iterable[bytes]) -> Mutator:
    """Changes the JSON header and corrects its length, or lies about the length, or changes the data."""
    mutate_header = json_mutator([_header(seed)[0] for seed in seeds])

    def mutate(data: bytes, rng: random.Random) -> bytes:
        if len(data) < 8 or rng.random() < 0.05:
            return damaged(data, rng)
        header, rest = _header(data)
        draw = rng.random()
        if draw < 0.9:
            header = mutate_header(header, rng)
        length = len(header) if draw < 0.95 else rng.choice((*_LENGTHS, len(header) + 1, len(header) - 1))
        if rng.random() < 0.1:
            rest = rng.choice((b"", rest[:-1], rest + b"\0", rest * 2))
        return struct.pack("<Q", length % 2**64) + header + rest

    return mutate


def _header(data: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


@dataclass
class _Atom:
    """A number, or a text with its length before it; `fmt` is a struct format or "text"."""

    fmt: str
    value: int | float | bytes
    length: int | None = None
    """Lengths of texts that the file states wrongly."""

    def pack(self) -> bytes:
        if isinstance(self.value, bytes):
            return struct.pack("<Q", len(self.value) if self.length is None else self.length) + self.value
        if self.fmt in ("<f", "<d"):
            return struct.pack(self.fmt, self.value)
        size = struct.calcsize(self.fmt)
        return (int(self.value) % (1 << 8 * size)).to_bytes(size, "little")


type _Record = list[_Atom]

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_KINDS = (*range(14), 30, 41, 255)
_FLOATS = (0.0, -1.0, 1.0, 0.5, 1e-30, 1e30, float("inf"), float("-inf"), float("nan"))
_MOST_ITEMS = 200


class _Cut(Exception):
    """The file is not what a GGUF file is."""


class _Reader:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise _Cut
        self.at += n
        return self.data[self.at - n : self.at]

    def atom(self, fmt: str) -> _Atom:
        if fmt == "text":
            return _Atom(fmt, self.take(struct.unpack("<Q", self.take(8))[0]))
        return _Atom(fmt, struct.unpack(fmt, self.take(struct.calcsize(fmt)))[0])

    def value(self, kind: int, depth: int = 0) -> _Record:
        if kind == 8:
            return [self.atom("text")]
        if kind == 9:
            item, count = self.atom("<I"), self.atom("<Q")
            if depth > 3 or int(count.value) > len(self.data):
                raise _Cut
            items = [a for _ in range(int(count.value)) for a in self.value(int(item.value), depth + 1)]
            return [item, count, *items]
        if kind not in _SCALARS:
            raise _Cut
        return [self.atom(_SCALARS[kind])]


@dataclass
class _File:
    """A GGUF file taken apart: header numbers, metadata, tensor infos, and everything behind them."""

    version: _Atom
    counts: list[_Atom]
    metadata: list[_Record]
    tensors: list[_Record]
    data: bytes

    @classmethod
    def parse(cls, raw: bytes) -> _File:
        reader = _Reader(raw)
        if reader.take(4) != b"GGUF":
            raise _Cut
        version, counts = reader.atom("<I"), [reader.atom("<Q"), reader.atom("<Q")]
        n_tensors, n_keys = (int(c.value) for c in counts)
        metadata, tensors = [], []
        for _ in range(n_keys):
            key, kind = reader.atom("text"), reader.atom("<I")
            metadata.append([key, kind, *reader.value(int(kind.value))])
        for _ in range(n_tensors):
            name, dims = reader.atom("text"), reader.atom("<I")
            numbers = [reader.atom("<Q") for _ in range(int(dims.value))]
            tensors.append([name, dims, *numbers, reader.atom("<I"), reader.atom("<Q")])
        return cls(version, counts, metadata, tensors, raw[-(-reader.at // 32) * 32 :])

    def pack(self) -> bytes:
        head = b"GGUF" + self.version.pack() + b"".join(c.pack() for c in self.counts)
        head += b"".join(a.pack() for record in (*self.metadata, *self.tensors) for a in record)
        return head + bytes(-len(head) % 32) + self.data


def gguf_mutator(seeds: Sequence[bytes]) -> Mutator:
    """Changes numbers, texts, types and whole records; counts and padding stay right, unless they are what changes."""
    files = [_File.parse(seed) for seed in seeds]
    texts = tuple({a.value for f in files for r in (*f.metadata, *f.tensors) for a in r if isinstance(a.value, bytes)})
    texts += tuple(s.encode("utf-8", "surrogatepass") for s in STRINGS)
    texts = tuple(sorted(texts))
    donors = [record for f in files for record in f.metadata]

    def mutate(data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.05:
            return damaged(data, rng)
        try:
            file = _File.parse(data)
        except (_Cut, MemoryError, RecursionError):
            return damaged(data, rng)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            _mutate_file(file, rng, texts, donors)
        return file.pack()

    return mutate


def _mutate_file(file: _File, rng: random.Random, texts: tuple[bytes, ...], donors: list[_Record]) -> None:
    draw = rng.random()
    records = rng.choice([r for r in (file.metadata, file.metadata, file.tensors) if r] or [[]])
    if draw < 0.05:
        _mutate_number(rng.choice((file.version, *file.counts)), rng)
    elif draw < 0.1:
        file.data = rng.choice((b"", file.data[:-1], file.data[: len(file.data) // 2], file.data + b"\0"))
    elif draw < 0.2 or not records:
        new = rng.choice(donors)
        file.metadata.insert(rng.randrange(len(file.metadata) + 1), [_Atom(a.fmt, a.value) for a in new])
        file.counts[1].value = len(file.metadata)
    elif draw < 0.3:
        record = records.pop(rng.randrange(len(records)))
        if rng.random() < 0.3:
            records += [[_Atom(a.fmt, a.value, a.length) for a in record] for _ in range(2)]
        file.counts[0].value, file.counts[1].value = len(file.tensors), len(file.metadata)
    else:
        record = rng.choice(records)
        # The first atoms of a record say what it is, the last ones belong to long arrays.
        at = rng.randrange(min(len(record), rng.choice((2, 6, _MOST_ITEMS))))
        if isinstance(record[at].value, bytes):
            _mutate_text(record[at], rng, texts)
        elif at == 1 and records is file.metadata and rng.random() < 0.5:
            _retype(record, rng, texts)
        else:
            _mutate_number(record[at], rng)


def _mutate_number(atom: _Atom, rng: random.Random) -> None:
    if atom.fmt in ("<f", "<d"):
        atom.value = rng.choice((*_FLOATS, -float(atom.value)))
        return
    old = int(atom.value)
    atom.value = rng.choice((*_LENGTHS, *_KINDS, old + 1, old - 1, old * 2, old // 2, old ^ (1 << rng.randrange(64))))


def _mutate_text(atom: _Atom, rng: random.Random, texts: tuple[bytes, ...]) -> None:
    draw, old = rng.random(), bytes(atom.value)  # type: ignore[arg-type]
    if draw < 0.15:
        atom.length = rng.choice((*_LENGTHS, len(old) + 1, max(0, len(old) - 1)))
    elif draw < 0.6:
        atom.value = rng.choice(texts)
    else:
        atom.value = damaged(old, rng)


def _retype(record: _Record, rng: random.Random, texts: tuple[bytes, ...]) -> None:
    """Gives a metadata key a sound value of another type."""
    kind = rng.choice((*_SCALARS, 8, 9))
    if kind == 8:
        value = [_Atom("text", rng.choice(texts))]
    elif kind == 9:
        item, n = rng.choice((*_SCALARS, 8)), rng.choice((0, 1, 3, 8))
        value = [_Atom("<I", item), _Atom("<Q", n), *(_any(item, rng, texts) for _ in range(n))]
    else:
        value = [_any(kind, rng, texts)]
    record[1:] = [_Atom("<I", kind), *value]


def _any(kind: int, rng: random.Random, texts: tuple[bytes, ...]) -> _Atom:
    if kind == 8:
        return _Atom("text", rng.choice(texts))
    fmt = _SCALARS[kind]
    return _Atom(fmt, rng.choice(_FLOATS) if fmt in ("<f", "<d") else rng.choice(_LENGTHS))
