"""Names: the axes of a mesh, and rules from logical axes to them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from llama_jax.errors import RequestError

MESH_AXES = ("data", "fsdp", "sequence", "expert", "tensor")
"""Axes that a mesh can have, in the order of its dimensions: "tensor", which sends most, runs over neighbours."""

Axes = tuple[str | None, ...]
"""The logical name of each dimension of an array."""

type MeshAxes = str | tuple[str, ...]
"""The axis of a mesh that a dimension is split over; or several, the first of which cuts it into the largest parts."""


class Rules(Mapping[str, tuple[str, ...]]):
    """Logical axis to the axes of the mesh that it is split over; logical axes that are not listed are never split.

    A dimension is split over all of these axes (those that the mesh lacks count as one device) or, where the product of
    their sizes does not divide it, over none: never over a part of them.

    Args:
      rules: e.g. {"batch": "data", "mlp": ("fsdp", "tensor")}.

    Raises:
      RequestError: an axis of the mesh occurs twice in one rule.
    """

    def __init__(self, rules: Mapping[str, MeshAxes]) -> None:
        self._over = {name: (over,) if isinstance(over, str) else tuple(over) for name, over in rules.items()}
        for name, over in self._over.items():
            if len(set(over)) < len(over):
                raise RequestError(
                    f"the rule for {name} names an axis twice: {over}", param="rules", hint="name each axis once"
                )

    def __getitem__(self, name: str) -> tuple[str, ...]:
        return self._over[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._over)

    def __len__(self) -> int:
        return len(self._over)

    def __hash__(self) -> int:
        return hash(frozenset(self._over.items()))

    def __repr__(self) -> str:
        return f"Rules({self._over})"


RULES = Rules(
    {
        "batch": "data",
        "q_heads": "tensor",
        "kv_heads": "tensor",
        "mlp": "tensor",
        "vocab": "tensor",
    }
)
"""Tensor parallelism as in Megatron-LM (arXiv:1909.08053): heads, hidden units of every MLP (of each expert too) and
the vocabulary over "tensor"; rows of a batch over "data". Experts are not dealt out: each device holds a part of the
width of all of them, so that a step reads as much on one device as on another, whichever experts it needs. "length" and
"embed" of activations stay whole."""


def parse_mesh(text: str) -> dict[str, int]:
    """The sizes in a text such as "data=2,tensor=4".

    Raises:
      RequestError: it is not a list of name=size with the names of `MESH_AXES`, each once, and positive sizes.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        if not equals or not re.fullmatch(r"0*[1-9][0-9]{0,8}", number):
            raise _bad(text, f"{part.strip()!r} is not NAME=SIZE with a positive size")
        if name not in MESH_AXES:
            raise _bad(text, f"{name!r} is not an axis; there are {', '.join(MESH_AXES)}")
        if name in sizes:
            raise _bad(text, f"{name!r} occurs twice")
        sizes[name] = int(number)
    return sizes


def requested_axes(mesh: str | None, tp: int | None) -> dict[str, int] | None:
    """The mesh that the options `--mesh` and `--tp` request, or None.

    Raises:
      RequestError: both are given, or one is malformed.
    """
    if mesh == "auto":
        raise RequestError(
            "no mesh is chosen here: --mesh auto is for commands that run the model on this machine",
            param="mesh",
            hint="`llama-jax plan MODEL --mesh auto` says what it would be; give its numbers here",
        )
    if mesh is not None and tp is not None:
        raise RequestError(
            f"--tp {tp} and --mesh {mesh} were both given",
            param="mesh",
            hint=f"--tp N is short for --mesh tensor=N: put tensor={tp} into --mesh",
        )
    if tp is not None:
        return checked_sizes({"tensor": tp})
    return None if mesh is None else checked_sizes(parse_mesh(mesh))


def checked_sizes(sizes: Mapping[str, int], rules: Rules = RULES) -> dict[str, int]:
    """Checks that the rules split something over every axis of more than one device, and returns the sizes.

    Raises:
      RequestError: a size is not positive, an axis is unknown, or nothing is split over it.
    """
    for name, size in sizes.items():
        if name not in MESH_AXES:
            raise RequestError(
                f"{name!r} is not an axis of a mesh", param="mesh", hint=f"there are {', '.join(MESH_AXES)}"
            )
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise RequestError(
                f"axis {name} of the mesh must have a positive size; got {size!r}", param="mesh", hint="e.g. tensor=2"
            )
    refuse_unused(sizes, rules)
    return dict(sizes)


def refuse_unused(sizes: Mapping[str, int], rules: Rules) -> None:
    """Refuses a mesh with more than one device along an axis that no rule names.

    Raises:
      RequestError: naming the axis.
    """
    used = dict.fromkeys(axis for over in rules.values() for axis in over)
    for name, size in sizes.items():
        if size > 1 and name not in used:
            raise RequestError(
                f"nothing is split over the axis {name!r} by these rules, so {name}={size} would waste devices",
                param="mesh",
                hint=f"use {' and '.join(used)}, or rules of your own (`make_mesh(rules=...)`)",
            )


def _bad(text: str, why: str) -> RequestError:
    return RequestError(f"mesh {text!r}: {why}", param="mesh", hint="write it as data=2,tensor=4")
