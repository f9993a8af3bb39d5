"""Mutations of files of torch.save: the members of the zip archive, and the instructions of the pickle in it."""

from __future__ import annotations

import io
import pickletools
import random
import struct
import zipfile
from collections.abc import Iterable

from fuzz.mutate_json import NUMBERS, STRINGS, Mutator, damaged

_PICKLE = "data.pkl"
_SPECIAL = (
    *(
        b"(",
        b")",
        b"t",
        b"l",
        b"d",
        b"u",
        b"s",
        b"0",
        b"1",
        b"2",
        b"Q",
        b"R",
        b"b",
        b".",
        b"N",
        b"\x88",
        b"\x81",
        b"\x85",
    ),
    *(b"cposix\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n", b"\x93"),
    *(
        b"P0\n",
        b"h\xff",
        b"q\xff",
        b"r\xff\xff\xff\xff",
        b"j\xff\xff\xff\xff",
        b"\x94",
        b"\x80\xff",
        b"\x95" + b"\xff" * 8,
    ),
    *(b"\x8b\xff\xff\xff\xff", b"\x8b\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"\x8d" + b"\xff" * 8, b"I99\n", b"F1\n"),
    *(b"(" * 3000, b"]" * 3000, b"2" * 3000, b"\x82\x01"),
)


def torch_mutator(seeds: Iterable[bytes]) -> Mutator:
    """Takes archives apart, and files of the old format, which are pickles one after another."""
    pieces = [piece for seed in seeds for piece in _instructions(_pickle_of(seed))] or [b"N"]

    def mutate(data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.1:
            return damaged(data, rng)
        try:
            members = _members(data)
        except Exception:  # zipfile raises many types
            return _mutate_pickle(data, rng, pieces)
        for name in list(members):
            if name.endswith(_PICKLE) and rng.random() < 0.8:
                members[name] = _mutate_pickle(members[name], rng, pieces)
        if rng.random() < 0.2 and members:
            _mutate_members(members, rng)
        return _archive(members, zipfile.ZIP_DEFLATED if rng.random() < 0.03 else zipfile.ZIP_STORED)

    return mutate


def _pickle_of(data: bytes) -> bytes:
    try:
        return next((raw for name, raw in _members(data).items() if name.endswith(_PICKLE)), b"")
    except Exception:
        return data


def _members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        if sum(info.file_size for info in infos) > 4 << 20:
            raise ValueError("more than the mutations are for")
        return {info.filename: archive.read(info) for info in infos}


def _archive(members: dict[str, bytes], compression: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, raw in members.items():
            archive.writestr(zipfile.ZipInfo(name), raw, compression)
    return out.getvalue()


def _mutate_members(members: dict[str, bytes], rng: random.Random) -> None:
    name = rng.choice(list(members))
    raw = members.pop(name)
    draw = rng.random()
    if draw < 0.3:
        members[rng.choice((*(s for s in STRINGS if s.isprintable() and s), name + "x", name[:-1] or "y"))] = raw
    elif draw < 0.6:
        members[name] = raw[: len(raw) // 2]
    elif draw < 0.8:
        members[name] = raw + bytes(rng.choice((1, 8, 1000)))


def _instructions(data: bytes) -> list[bytes]:
    """The instructions of all pickles in a row, as far as they can be read; the rest is one piece."""
    pieces, start = [], 0
    while start < len(data):
        try:
            places = [start + (at or 0) for _, _, at in pickletools.genops(data[start:])]
        except Exception:
            break
        end = places[-1] + 1  # STOP, one byte
        pieces += [data[a:b] for a, b in zip(places, (*places[1:], end), strict=True)]
        start = end
    return [*pieces, data[start:]]


def _mutate_pickle(data: bytes, rng: random.Random, pieces: list[bytes]) -> bytes:
    own = _instructions(data)
    if len(own) < 2:
        return damaged(data, rng)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(own))
        draw = rng.random()
        if draw < 0.5:
            own[at] = _changed(own[at], rng)
        elif draw < 0.6:
            own[at] = rng.choice(pieces)
        elif draw < 0.7:
            own.insert(at, rng.choice((rng.choice(pieces), rng.choice(_SPECIAL))))
        elif draw < 0.8:
            del own[at : at + rng.choice((1, 1, 2, 8))]
        elif draw < 0.9:
            own[at:at] = own[at : at + rng.choice((1, 5, 20, 60))]
        else:
            other = rng.randrange(len(own))
            own[at], own[other] = own[other], own[at]
        if not own:
            break
    return b"".join(own)


def _changed(piece: bytes, rng: random.Random) -> bytes:
    """An instruction with another argument."""
    code = piece[:1]
    if code in (b"K", b"M", b"J", b"\x8a"):
        number = rng.choice([n for n in NUMBERS if isinstance(n, int) and abs(n) < 10**500])
        raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(raw) % 256]) + raw[:255]
    if code == b"X":
        raw = rng.choice((*STRINGS, "torch", "storage", "cpu", "0")).encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(raw)) + raw
    if code == b"c":
        return rng.choice([s for s in _SPECIAL if s[:1] == b"c"] + [b"ctorch\nHalfStorage\n", b"ctorch\nx\n"])
    if code in (b"h", b"q") and len(piece) == 2:
        return code + bytes([rng.randrange(256)])
    return rng.choice(_SPECIAL)
