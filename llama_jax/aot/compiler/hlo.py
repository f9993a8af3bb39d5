"""Collectives of a compiled program, read from the text of its HLO.

Format: https://openxla.org/xla/operation_semantics, and what `compiled.as_text()` of jaxlib 0.11.2 writes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from llama_jax.targets import Collective

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_WIDTH = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class _Call:
    """A computation that another one runs: how often, and whether that is known."""

    name: str
    times: int = 1
    known: bool = True


def collectives(text: str, devices: int) -> tuple[Collective, ...]:
    """The collectives of an HLO module, those that move most first.

    Branches of a conditional are counted as if each of them ran.

    Args:
      devices: of the whole program, for collectives that do not name their groups.
    """
    entry, found, calls = _read(text, devices)
    totals: Counter[tuple[str, int, int]] = Counter()
    unknown = set()
    for name, times, known in _runs(entry, calls):
        for key in found.get(name, ()):
            totals[key] += times
            if not known:
                unknown.add(key)
    result = [Collective(k, n, count, size, (k, n, size) in unknown) for (k, n, size), count in totals.items()]
    return tuple(sorted(result, key=lambda c: (-c.traffic, c.kind)))


def _read(text: str, devices: int) -> tuple[str, dict[str, list[tuple[str, int, int]]], dict[str, list[_Call]]]:
    """Name of the entry computation, and of each computation its collectives and what it calls."""
    entry = name = ""
    found: dict[str, list[tuple[str, int, int]]] = {}
    calls: dict[str, list[_Call]] = {}
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            entry = name if header[1] else entry
        elif name and (instruction := _INSTRUCTION.match(line)):
            shape, opcode, rest = instruction.groups()
            if (kind := opcode.removesuffix("-start")) in KINDS:
                group = _group_size(rest, devices)
                found.setdefault(name, []).append((kind, group, _payload(kind, opcode, shape, group)))
            calls.setdefault(name, []).extend(_called(opcode, rest))
    return entry, found, calls


def _runs(
    name: str, calls: dict[str, list[_Call]], times: int = 1, known: bool = True
) -> Iterator[tuple[str, int, bool]]:
    yield name, times, known
    for call in calls.get(name, ()):
        yield from _runs(call.name, calls, times * call.times, known and call.known)


def _called(opcode: str, rest: str) -> Iterator[_Call]:
    """Computations that an instruction runs, except those of fusions and reductions, which hold no collectives."""
    if opcode == "while":
        trips = _TRIPS.search(rest)
        for role in ("body", "condition"):
            for name in re.findall(rf"{role}=%?([\w.\-]+)", rest):
                yield _Call(name, int(trips[1]) if trips else 1, trips is not None)
    elif opcode in ("call", "async-start"):
        yield from (_Call(name) for name in re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", rest))
    elif opcode == "conditional":
        names = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)
        if branches := re.search(r"branch_computations=\{([^}]*)\}", rest):
            names += re.findall(r"%?([\w.\-]+)", branches[1])
        yield from map(_Call, names)


def _payload(kind: str, opcode: str, shape: str, group: int) -> int:
    sizes = [_bytes(dtype, dims) for dtype, dims in _ARRAY.findall(shape)]
    if opcode.endswith("-start") and kind == "collective-permute":
        sizes = sizes[:1]  # operand, result, counters
    elif opcode.endswith("-start") and (kind == "all-gather" or shape.startswith("((")):
        sizes = sizes[len(sizes) // 2 :]  # operands, then results
    return sum(sizes) * (group if kind == "reduce-scatter" else 1)


def _bytes(dtype: str, dims: str) -> int:
    digits = re.search(r"\d+", dtype)
    bits = _WIDTH.get(dtype, int(digits[0]) if digits else 0)
    return -(-math.prod(int(d) for d in dims.split(",") if d) * bits // 8)


def _group_size(rest: str, devices: int) -> int:
    """Devices of one group, from any of the forms of `replica_groups`."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        return len(set(re.findall(r"\d+", pairs[1]))) or devices
    if lists := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(lists[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]) if axis in sizes)
    return devices
