"""Names: the axes of a mesh, and the table of rules from logical axes to them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from llama_jax.errors import RequestError

MESH_AXES = ("data", "fsdp", "sequence", "expert", "tensor")
"""Axes that a mesh can have, in the order of its dimensions: "tensor", which sends most, runs over neighbours."""

SUPPORTED = ("data", "tensor")
"""Those that loading and generating split over; the others are kept for what is not here yet."""

Axes = tuple[str | None, ...]
"""The logical name of each dimension of an array."""

Rules = Mapping[str, str]
"""Logical axis to mesh axis; logical axes that are not listed are never split."""

RULES: Rules = MappingProxyType(
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
            raise _bad(text, f"{name!r} is no axis; there are {', '.join(MESH_AXES)}")
        if name in sizes:
            raise _bad(text, f"{name!r} occurs twice")
        sizes[name] = int(number)
    return sizes


def requested_axes(mesh: str | None, tp: int | None) -> dict[str, int] | None:
    """What the options `--mesh` and `--tp` ask for, or None.

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


def checked_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes, once it is sure that something is split over every axis of more than one device.

    Raises:
      RequestError: a size is not positive, an axis is unknown, or nothing is split over it yet.
    """
    for name, size in sizes.items():
        if name not in MESH_AXES:
            raise RequestError(f"{name!r} is no axis of a mesh", param="mesh", hint=f"there are {', '.join(MESH_AXES)}")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise RequestError(
                f"axis {name} of the mesh must have a positive size; got {size!r}", param="mesh", hint="e.g. tensor=2"
            )
        if size > 1 and name not in SUPPORTED:
            raise RequestError(
                f"nothing is split over the axis {name!r} yet, so {name}={size} would waste devices",
                param="mesh",
                hint=f"use {' and '.join(SUPPORTED)}",
            )
    return dict(sizes)


def _bad(text: str, why: str) -> RequestError:
    return RequestError(f"mesh {text!r}: {why}", param="mesh", hint="write it as data=2,tensor=4")
