"""Tables of which backend and tiles an operation gets on a target: shipped ones, and the user's own from tuning.

The shipped ones are in `llama_jax/kernels/table`: a JSON file an architecture ("gfx942.json"), and one a vendor for
architectures without their own file ("amd.json"). A file holds, for each operation, rules in the order in which
they are tried:

    {"arch": "gfx942", "rules": {"flash_attention": [
      {"dtype": "bfloat16", "shape": "d128*", "backend": "pallas_triton", "tiles": {"block_q": 128, ...},
       "measured": false, "source": "..."}]}}

`dtype` and `shape` are patterns of `fnmatch` over what the operation says of its arguments (default "*"). Without
`tiles` a backend uses its own rule for the target.
"""

from __future__ import annotations

import fnmatch
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from llama_jax.errors import KernelError
from llama_jax.kernels.registry import OPERATIONS
from llama_jax.targets import Target


@dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
      backend: the one to take.
      source: where the choice comes from, for people.
      measured: whether it was measured on such a device.
      dtype, shape: patterns of what it applies to.
      tiles: what to pass as `tiles`, by name; empty for the backend's own choice.
    """

    backend: str
    source: str
    measured: bool = False
    dtype: str = "*"
    shape: str = "*"
    tiles: tuple[tuple[str, int], ...] = ()

    def applies(self, dtype: str, shape: str) -> bool:
        return fnmatch.fnmatchcase(dtype, self.dtype) and fnmatch.fnmatchcase(shape, self.shape)

    def to_json(self) -> dict[str, Any]:
        """The rule as it is written in a file."""
        data: dict[str, Any] = {"dtype": self.dtype, "shape": self.shape, "backend": self.backend}
        if self.tiles:
            data["tiles"] = dict(self.tiles)
        return data | {"measured": self.measured, "source": self.source}


Table = Mapping[str, tuple[Rule, ...]]
"""Operation to its rules."""


def parse(text: str, name: str) -> Table:
    """A table from the text of its file.

    Args:
      name: of the file, for messages.

    Raises:
      KernelError: the text is not such a table; the message says where.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise _broken(name, str(error)) from error
    rules = data.get("rules") if isinstance(data, dict) else None
    if not isinstance(rules, dict):
        raise _broken(name, "it holds no object 'rules'")
    if unknown := sorted(set(rules) - set(OPERATIONS)):
        raise _broken(name, f"there is no operation {unknown[0]!r}")
    return {
        op: tuple(_rule(item, f"{name}, {op}, rule {i}") for i, item in enumerate(_items(rules[op], name, op)))
        for op in rules
    }


def _items(value: Any, name: str, op: str) -> list[Any]:
    if not isinstance(value, list):
        raise _broken(name, f"the rules of {op!r} are not a list")
    return value


def _rule(item: Any, where: str) -> Rule:
    wanted = {"backend": str, "source": str, "measured": bool, "dtype": str, "shape": str, "tiles": dict}
    if not isinstance(item, dict) or not {"backend", "source", "measured"} <= set(item) <= set(wanted):
        raise _broken(where, "a rule has backend, source, measured, and may have dtype, shape, tiles")
    for key, value in item.items():
        if not isinstance(value, wanted[key]):
            raise _broken(where, f"{key!r} is {value!r}")
    tiles = item.get("tiles", {})
    if not all(type(number) is int for number in tiles.values()):
        raise _broken(where, f"tiles are not integers: {tiles!r}")
    return Rule(**{**item, "tiles": tuple(sorted(tiles.items()))})


def _broken(where: str, problem: str) -> KernelError:
    return KernelError(f"table of kernels {where}: {problem}", hint="remove the file; `llama-jax tune` makes it again")


@functools.cache
def shipped(name: str) -> Table:
    """The table of that name that comes with the package: an architecture or a vendor; empty if there is none."""
    file = resources.files("llama_jax.kernels.table").joinpath(f"{name}.json")
    return parse(file.read_text(encoding="utf-8"), f"{name}.json") if file.is_file() else {}


def shipped_rules(operation: str, target: Target) -> tuple[Rule, ...]:
    """The shipped rules of an operation: those of the architecture, else of the vendor, else none."""
    return shipped(target.arch).get(operation) or shipped(target.vendor).get(operation, ())
