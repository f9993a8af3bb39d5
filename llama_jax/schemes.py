"""Storage of a weight: plain, by a layout of `llama_jax.quantized`, or by a scheme that another package registers.

A leaf of the parameter tree is a dict of members: {"weight"} of a plain one, and "bias" beside the weight if the
projection has one. A scheme has other members in place of "weight" (values and their scales, say), each with its own
dtype, shape and logical axes. The scheme of a leaf follows from the names of its members alone, so that a tree
says what it is; members that no scheme has are an error.

Every name of a layout is that of a scheme, e.g. "int4_g64_min", whose members are {"int4_g64_min", "scales", "minima"}.
The suffix "_ordered" names a scheme with one more member, the order in which columns are stored.

    def rows(dimensions):
        return dimensions[:-1]

    members = {"values": Member("int8"), "scale": Member("float32", rows, rows)}
    register_scheme(Scheme("int8_rows", members, encode, decode))
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.typing import DTypeLike

from llama_jax.errors import RequestError, UnsupportedModel
from llama_jax.quantized import CODES, Layout, codes, layout_named, stored_layout
from llama_jax.quantized.layout import OFFSETS, ORDER, stored_name
from llama_jax.quantized.nearest import encode
from llama_jax.sharding import Axes

Members = Mapping[str, Any]
"""The arrays of one leaf, by name."""


def _same[T](x: T) -> T:
    return x


@dataclass(frozen=True)
class Member:
    """One of the arrays that a scheme stores for a weight.

    Attributes:
      dtype: numpy name, one of `checkpoint.format.ITEMSIZES`; None means the compute dtype.
      shape: maps the weight's canonical shape ([out, in], or [expert, out, in]) to its shape, of at least one
        dimension.
      axes: maps the weight's logical axes to its own. Where all members begin with the weight's first axis, projections
        are fused: the dimension `out` then becomes several, in this member too.
    """

    dtype: str | None
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = _same
    axes: Callable[[Axes], Axes] = _same


@dataclass(frozen=True)
class Scheme:
    """A way to store weights. Its functions are pure, traceable, and independent of meshes.

    Attributes:
      name: as checkpoints record it.
      members: by name; no other scheme has exactly these names.
      encode: weight [..., in] in floating point -> its members.
      decode: members, dtype -> the weight, in that dtype or near it; of any shape that fusing may have made.
      product: x [..., in], members of a weight [*out, in], dtype -> [..., *out] in that dtype. By default a product
        with the decoded weight, accumulated in float32.
      lookup: members of a table [vocab, hidden], int32 tokens [batch, len], dtype -> [batch, len, hidden]. By default
        rows of the decoded table.
      layout: the layout of `llama_jax.quantized` that it stores weights in, if it is one of these; products with such
        weights, and with inputs in the order of a member `ORDER`, are the operation
        `llama_jax.kernels.quantized_matmul`.
    """

    name: str
    members: Mapping[str, Member]
    encode: Callable[[jax.Array], Members]
    decode: Callable[[Members, DTypeLike], jax.Array]
    product: Callable[[jax.Array, Members, DTypeLike], jax.Array] | None = None
    lookup: Callable[[Members, jax.Array, DTypeLike], jax.Array] | None = None
    layout: Layout | None = None

    def axes(self, weight: Axes) -> dict[str, Axes]:
        """Logical axes of each member of a weight with these."""
        return {name: member.axes(weight) for name, member in self.members.items()}


PLAIN = Scheme("plain", {"weight": Member(None)}, lambda weight: {"weight": weight}, lambda leaf, _: leaf["weight"])
_registered: dict[str, Scheme] = {PLAIN.name: PLAIN}


def register_scheme(scheme: Scheme) -> None:
    """Registers a scheme for the lifetime of this process.

    Raises:
      RequestError: another scheme has its name or the names of its members, or a member is called "bias".
    """
    if layouts := [name for name in (scheme.name, *scheme.members) if stored_layout(name)]:
        raise RequestError(
            f"the scheme {scheme.name!r} uses {layouts[0]!r}, the name of a layout of llama_jax.quantized",
            param="scheme",
            hint="choose another name",
        )
    for other in _registered.values():
        same_members = other.members.keys() == scheme.members.keys()
        if other is not scheme and (other.name == scheme.name or same_members):
            what = f"the members {sorted(scheme.members)}" if same_members else f"the name {scheme.name!r}"
            raise RequestError(
                f"{what} of a scheme belong to the scheme {other.name!r} already",
                param="scheme",
                hint="choose other names: a leaf's scheme is told by the names of its members",
            )
    if "bias" in scheme.members or not scheme.members:
        raise RequestError(
            f"the scheme {scheme.name!r} has the members {sorted(scheme.members)}",
            param="scheme",
            hint='name at least one, and none "bias", which stays beside a weight whatever its scheme',
        )
    _registered[scheme.name] = scheme


def scheme_named(name: str) -> Scheme:
    """The scheme of this name.

    Raises:
      UnsupportedModel: none is registered.
    """
    if (layout := stored_layout(name)) is not None:
        return quantised(layout, ordered=name != layout.name)
    if name not in _registered:
        raise UnsupportedModel(
            f"weights are stored by the scheme {name!r}, which is not known here",
            hint=f"import the package that registers it first; there are {', '.join(sorted(_registered))}, and layouts "
            f"of {', '.join(CODES)} such as int4_g64_min",
        )
    return _registered[name]


def scheme_of(members: Iterable[str]) -> Scheme:
    """The scheme of a leaf with these members, which may include "bias".

    Raises:
      RequestError: no scheme has exactly these.
    """
    names = set(members) - {"bias"}
    found = [layout for name in sorted(names) if (layout := layout_named(name)) is not None]
    layouts = [quantised(layout, ordered=ORDER in names) for layout in found]
    for scheme in (*layouts, *_registered.values()):
        if scheme.members.keys() == names:
            return scheme
    raise RequestError(
        f"a leaf of the parameters has the members {sorted(names)}, which no scheme has",
        param="params",
        hint="; ".join(f"{s.name}: {', '.join(s.members)}" for s in (*layouts, *_registered.values())),
    )


def leaf_axes(members: Iterable[str], weight: Axes) -> dict[str, Axes]:
    """Logical axes of each member of a leaf, given those of its weight; a bias lacks the last of these."""
    names = tuple(members)
    axes = scheme_of(names).axes(weight) | {"bias": weight[:-1]}
    return {name: axes[name] for name in names}


@functools.cache
def quantised(layout: Layout, *, ordered: bool = False) -> Scheme:
    """The scheme that stores weights in a layout; with `ordered`, with reordered columns and their order."""

    def packed(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], shape[-1] // layout.per_byte)

    def groups(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[:-1] if layout.group is None else (*shape[:-1], shape[-1] // layout.group)

    def by_group(axes: Axes) -> Axes:
        return axes[:-1] if layout.group is None else axes

    members = {
        layout.name: Member(CODES[layout.kind], packed),
        "scales": Member(layout.scale_dtype, groups, by_group),
    }
    if layout.offset is not None:
        dtype = layout.scale_dtype if layout.offset == "min" else "int8"
        members[OFFSETS[layout.offset]] = Member(dtype, groups, by_group)
    if ordered:
        members[ORDER] = Member("int32", lambda shape: (*shape[:-2], shape[-1]), lambda axes: (*axes[:-2], None))
        return Scheme(
            stored_name(layout, ordered=True),
            members,
            lambda weight: encode(layout, weight) | {ORDER: codes.as_they_are(weight.shape)},
            partial(codes.decode_ordered, layout),
            layout=layout,
        )
    return Scheme(
        layout.name,
        members,
        partial(encode, layout),
        partial(codes.decode, layout),
        lookup=partial(codes.lookup, layout),
        layout=layout,
    )
