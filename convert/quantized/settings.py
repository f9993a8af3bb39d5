"""Settings shared by the quantisation configs of several methods: lists of modules, and values that must be neutral."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from llama_jax.config.fields import Fields, bad
from llama_jax.convert.quantized.scheme import unsupported

MAX_PATTERN = 500
MAX_REPEATS = 4


def names(f: Fields, key: str) -> tuple[str, ...]:
    """A list of names of modules; empty where the key is absent."""
    value = f.get(key, [])
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise bad(f.name(key), value, "a list of strings")
    return tuple(value)


def one_of(f: Fields, key: str, allowed: Collection[Any], default: Any) -> Any:
    """One of a few allowed values.

    Raises:
      UnsupportedModel: it is another one; names key and value.
    """
    value = f.get(key, default)
    if isinstance(value, (list, Mapping)) or type(value) not in {type(a) for a in allowed} or value not in allowed:
        raise unsupported(f.name(key), value, ", ".join(map(str, allowed)))
    return value


def absent(f: Fields, *keys: str) -> None:
    """Refuses keys that would change the weights, unless they are null, false or empty."""
    for key in keys:
        if value := f.get(key):
            raise unsupported(f.name(key), value)


def group_size(f: Fields, default: Any = None) -> int | None:
    """Columns that share a scale; None for whole rows, which files write as -1."""
    value = f.get("group_size", default)
    if value is None or (type(value) is int and value == -1):
        return None
    return f.integer("group_size", default)


def pattern(key: str, text: str) -> re.Pattern[str]:
    """Compiles a pattern out of a config.json.

    Such a file may come from anybody, and a pattern with repetitions inside repetitions can keep `re` busy for ever.

    Raises:
      UnsupportedModel: it is malformed, long, or repeats a group; names it.
    """
    simple = re.sub(r"(\.\*)+", ".*", text)
    repeats = len(re.findall(r"(?<!\\)[*+{]", simple))
    if len(text) > MAX_PATTERN or repeats > MAX_REPEATS or re.search(r"(?<!\\)\)[*+?{]|\\[1-9]", simple):
        raise unsupported(key, text, f"patterns without repeated groups, with at most {MAX_REPEATS} repetitions")
    try:
        return re.compile(simple)
    except re.error as e:
        raise unsupported(key, text, "valid regular expressions") from e
