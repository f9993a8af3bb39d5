"""Typed reading of a config.json: every value is checked, every complaint names its key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from llama_jax.errors import UnsupportedModel

MAX_INT = 2**31 - 1
MAX_FLOAT = 3.4e38
MISSING: Any = object()


def bad(key: str, value: object, wanted: str, file: str = "config.json") -> UnsupportedModel:
    """The error for a value that cannot be right."""
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return UnsupportedModel(f"{file}: {key} must be {wanted}, got {shown}", hint=f"check the model's {file}")


def not_supported(what: str, supported: str, file: str = "config.json") -> UnsupportedModel:
    """The error for something that this package does not compute."""
    return UnsupportedModel(f"{file}: {what} is not supported", hint=f"supported: {supported}")


@dataclass(frozen=True)
class Fields:
    """A JSON object and its place in config.json (or another file); a key that is null counts as absent.

    Every reader takes a key and what to return when it is absent (nothing: the key is required), and raises
    `UnsupportedModel` naming the key when the value has another type or is out of range.

    Attributes:
      values: the object.
      prefix: of its keys in messages.
      file: the file in messages.
      names: what that file calls a key (with its prefix), where it is not config.json and has other names.
    """

    values: Mapping[str, Any]
    prefix: str = ""
    file: str = "config.json"
    names: Mapping[str, str] = MappingProxyType({})

    def name(self, key: str) -> str:
        whole = f"{self.prefix}{key}"
        return self.names.get(whole, whole)

    def within(self, key: str, values: Mapping[str, Any]) -> Fields:
        """The fields of an object that is the value of a key."""
        return replace(self, values=values, prefix=f"{self.prefix}{key}.")

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def _read(self, key: str, default: Any, wanted: str) -> Any:
        value = self.get(key, default)
        if value is MISSING:
            raise UnsupportedModel(
                f"{self.file}: {self.name(key)} is missing, it must be {wanted}",
                hint=f"check the model's {self.file}",
            )
        return value

    def bad(self, key: str, value: object, wanted: str) -> UnsupportedModel:
        """The error for a value that cannot be right."""
        return bad(self.name(key), value, wanted, self.file)

    def not_supported(self, what: str, supported: str) -> UnsupportedModel:
        """The error for something that this package does not compute."""
        return not_supported(what, supported, self.file)

    def integer(self, key: str, default: Any = MISSING, *, low: int = 1, high: int = MAX_INT) -> Any:
        """An integer in [low, high]; an absent key gives `default` unchecked, so that it may be None."""
        wanted = f"an integer from {low} to {high}"
        value = self._read(key, default, wanted)
        if value is default:
            return value
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.bad(key, value, wanted)
        return value

    def number(self, key: str, default: Any = MISSING, *, positive: bool = True) -> Any:
        """A finite float, greater than 0 unless `positive` is false; integers are accepted."""
        wanted = "a finite number" + (" greater than 0" if positive else "")
        value = self._read(key, default, wanted)
        if value is default:
            return value
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.bad(key, value, wanted)
        # All of them are used as float32, so a larger one is infinite, however it is written.
        number = float(value) if abs(value) < MAX_FLOAT else math.inf
        if not math.isfinite(number) or (positive and number <= 0):
            raise self.bad(key, value, wanted)
        return number

    def boolean(self, key: str, default: bool, *, integers: bool = False) -> bool:
        """true or false; with `integers`, numbers count as in C (some published files have them)."""
        value = self.get(key, default)
        if isinstance(value, bool) or (integers and isinstance(value, int)):
            return bool(value)
        raise self.bad(key, value, "true or false")

    def string(self, key: str, default: Any = MISSING) -> Any:
        value = self._read(key, default, "a string")
        if value is not default and not isinstance(value, str):
            raise self.bad(key, value, "a string")
        return value

    def integers(self, key: str, *, low: int, high: int) -> list[int] | None:
        """A list of integers in [low, high], or None when absent; true and false count as 1 and 0."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            raise self.bad(key, value, "a list of integers")
        for item in value:
            if not isinstance(item, int) or not low <= item <= high:
                raise self.bad(key, item, f"a list of integers from {low} to {high}")
        return [int(item) for item in value]

    def token_id(self, key: str, default: int | None) -> int | None:
        """A token id; null means none, and so does -1, which old files write for it."""
        value = self.values.get(key, default)
        if value is None or (type(value) is int and value == -1):
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_INT:
            raise self.bad(key, value, "a token id, or null or -1 for none")
        return value

    def token_ids(self, key: str, default: int | None) -> tuple[int, ...]:
        """One token id, a list of them, or null."""
        value = self.values.get(key, default)
        ids = value if isinstance(value, (list, tuple)) else [value]
        read = (replace(self, values={key: item}).token_id(key, None) for item in ids)
        return tuple(item for item in read if item is not None)
