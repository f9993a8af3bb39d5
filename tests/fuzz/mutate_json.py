"""Mutations that keep JSON valid (nearly always), so that what stands behind the parser is reached."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

type Mutator = Callable[[bytes, random.Random], bytes]
"""Makes another input out of one; gives bytes that it cannot take apart back with some of them changed."""

DIGITS = 4300
"""Of the longest integer that Python turns into text and back."""

NUMBERS: tuple[Any, ...] = (
    *(0, 1, 2, 3, 7, 8, 31, 32, 255, 256, 4096, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**40, 2**53),
    *(2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**400, 10**DIGITS - 1, -1, -2, -(2**31), -(2**63)),
    *(0.0, -0.0, 0.5, 1.0, 2.5, 5e-324, 1e-30, 1e30, 9e299, 1e308, -1e308),
    *(float("inf"), float("-inf"), float("nan")),
)
_PATHS = ("..", "../x", "/etc/passwd", "a/../../b", "x" * 300)
STRINGS = ("", " ", "\0", "\n", "\ud800", "\U0010ffff", "%s{0}", "0", *_PATHS)
OTHERS = (
    *("null", "true", "false", "[]", "{}", "[[]]", "[null]", json.dumps([0] * 40)),
    *('{"": {}}', '{"a": [1, {"b": null}]}'),
)
"""Other values, as text, so that every use is a new object."""
MAX_NODES = 50_000
"""Beyond that a mutation would take longer than the reader."""
_DEEP = (b"[" * 20_000, b'{"":' * 20_000)
_RAW = (*_DEEP, b"9" * 5000, b"1e999", b"-", b"nul", b'"', b"\xff", b"\xef\xbb\xbf", b"\\ud800")


def json_mutator(seeds: Iterable[bytes]) -> Mutator:
    """A mutator that knows the keys and values of the seeds."""
    keys, values = {"": None}, {}
    for seed in seeds:
        for node in _nodes(json.loads(seed)):
            if isinstance(node, dict):
                keys |= dict.fromkeys(node)
            values[json.dumps(node)[:2000]] = node
    words, pieces = tuple(keys), tuple(values.values())

    def mutate(data: bytes, rng: random.Random) -> bytes:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return damaged(data, rng)
        for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
            value = mutate_value(value, rng, words, pieces)
        text = to_bytes(value, rng)
        if rng.random() < 0.05:
            text = _with_second_key(text, rng, words)
        return damaged(text, rng) if rng.random() < 0.05 else text

    return mutate


def to_bytes(value: Any, rng: random.Random) -> bytes:
    """JSON text, lone surrogates as escapes or as bytes that are not UTF-8."""
    try:
        return json.dumps(value, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return b"{}"


def mutate_value(value: Any, rng: random.Random, words: tuple[str, ...] = ("",), pieces: tuple[Any, ...] = ()) -> Any:
    """Changes one node, drawn from all; the value is changed in place where it is a container."""
    places = list(_places(value))
    if not 0 < len(places) < MAX_NODES or rng.random() < 0.01:
        return hostile(value, rng, pieces)
    parent, key = rng.choice(places)
    action = rng.random()
    if action < 0.6:
        parent[key] = hostile(parent[key], rng, pieces)
    elif action < 0.7:
        del parent[key]
    elif isinstance(parent, dict):
        if action < 0.85:
            parent[rng.choice(words)] = hostile(parent[key], rng, pieces)
        else:
            parent[rng.choice((*words, *STRINGS))] = parent.pop(key)
    elif action < 0.8:
        parent[key:key] = [parent[key]] * min(rng.choice((1, 2, 50, 1000)), MAX_NODES // len(places))
    else:
        other = rng.randrange(len(parent))
        parent[key], parent[other] = parent[other], parent[key]
    return value


def hostile(old: Any, rng: random.Random, pieces: tuple[Any, ...] = ()) -> Any:
    """Something else to stand at the place of `old`."""
    draw = rng.random()
    if isinstance(old, int | float) and abs(old) < 2**70 and draw < 0.3:
        return rng.choice((old + 1, old - 1, -old, float(old), str(old), [old]))
    if isinstance(old, str) and draw < 0.3:
        return rng.choice((old + "x", old[:-1], old.upper(), [old], "../" + old, "/" + old, old * 2))
    if pieces and draw < 0.5:
        return json.loads(json.dumps(rng.choice(pieces)))
    values = rng.choice((NUMBERS, STRINGS, OTHERS))
    return json.loads(rng.choice(OTHERS)) if values is OTHERS else rng.choice(values)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Plain bytes changed: cut, inserted, flipped, doubled."""
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice((1, 2, 4, 8, 64)))
    action = rng.randrange(5)
    if action == 0:
        return data[:at]
    if action == 1:
        return data[:at] + rng.choice(_RAW) + data[at:]
    if action == 2:
        return data[:at] + data[end:]
    if action == 3:
        return data[:at] + rng.randbytes(end - at) + data[end:]
    return data[:end] + data[at:]


def _with_second_key(text: bytes, rng: random.Random, words: tuple[str, ...]) -> bytes:
    """The same with one more member in some object, which may be there already."""
    places = [i for i, char in enumerate(text) if char == ord("{") and text[i + 1 : i + 2] == b'"']
    if not places:
        return text
    at = rng.choice(places) + 1
    return text[:at] + json.dumps({rng.choice(words): hostile(None, rng)})[1:-1].encode() + b", " + text[at:]


def _nodes(value: Any) -> Iterator[Any]:
    yield value
    for parent, key in _places(value):
        yield parent[key]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every node below the root as its container and its key or index."""
    stack = [value]
    while stack:
        node = stack.pop()
        if isinstance(node, dict | list):
            for key in list(node) if isinstance(node, dict) else range(len(node)):
                yield node, key
                stack.append(node[key])
