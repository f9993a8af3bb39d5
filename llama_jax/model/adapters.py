"""Low-rank adapters in `forward`: one for all tokens, or several in slots, of which each token uses one, or none.

    slots = empty_slots(config, slots=8, rank=16, targets=("q_proj", "v_proj"))
    slots = put_adapter(slots, 1, adapter)          # compiled once, whatever adapter goes into whichever slot
    forward(params, config, tokens, adapters=slots, adapter_ids=jnp.array([[1], [0]]))

A tree of slots is shaped like the canonical parameters, with {"a" [slots, rank, in], "b" [slots, rank, out], "scale"
[slots]} in place of a projection's members; it works with both canonical and fused parameters. Slot 0 means no
adapter, whatever it contains. Any projection can have slots, also those of a shared expert and "lm_head" (of tied
embeddings too), but not routed experts.
The result of a projection is gain * (x W^T + bias + scale * x a^T b^T) + shift, where "gain" and "shift" [slots, out]
may be left out: a gain is DoRA's (arXiv:2402.09353), a shift what an adapter adds to biases.

One adapter for all tokens is a tree without the axis of slots under params["adapter"] (`llama_jax.adapters.attach`);
"embed" can then have low-rank members too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError
from llama_jax.params import PROJECTION_AXES, Params, by_leaf, canonical_specs, flatten, projection_names, unflatten
from llama_jax.sharding import Axes, constrain

MEMBERS = ("a", "b", "scale")
"""Members of every adapted projection."""
_NONE = {"gain": 1.0, "shift": 0.0}
MORE_MEMBERS = tuple(_NONE)
"""Members that it can have besides."""
ATTACHED = "adapter"
"""Where a parameter tree holds the adapter that all tokens use."""


@partial(jax.tree_util.register_dataclass, data_fields=["tree", "ids"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapter or the slots of one part of the model, and the slot that each token uses.

    Attributes:
      tree: shaped like that part of the parameters; empty without any.
      ids: int32 [batch, len], or [batch, 1] for whole rows; None if there are no slots and one adapter is of all
        tokens. Ids that are no slot are as 0.
    """

    tree: Params
    ids: jax.Array | None

    def of(self, name: str) -> Adapters:
        """Those of a part of this part."""
        tree = self.tree.get(name)
        return Adapters(tree, self.ids) if tree else NO_ADAPTERS

    def at(self, index: jax.Array | None) -> Adapters:
        """For the tokens `index` int32 [batch, n] of each row; for all with None."""
        if index is None or self.ids is None or self.ids.shape[1] == 1:
            return self
        return Adapters(self.tree, jnp.take_along_axis(self.ids, index, axis=1))

    def of_tokens(self, shape: tuple[int, ...]) -> Adapters:
        """For tokens [batch, len] that were put into one axis."""
        return self if self.ids is None else Adapters(self.tree, jnp.broadcast_to(self.ids, shape).reshape(-1))

    def own(self, member: str, none: float) -> jax.Array:
        """A member [slots, ...] of each token's slot, `none` for tokens without an adapter: [batch, len, ...]; without
        slots the member itself."""
        x = self.tree[member]
        if self.ids is None:
            return x
        used = ((self.ids > 0) & (self.ids < len(x)))[..., None]
        return jnp.where(used, x.at[self.ids].get(mode="clip"), none)

    @property
    def mixed(self) -> bool:
        """Whether these are slots of low-rank members alone."""
        return bool(self.tree) and self.ids is not None and self.tree.keys() == set(MEMBERS)

    @property
    def axes(self) -> dict[str, dict[str, Axes]]:
        """Logical axes of the tree of a block: of the members of each projection."""
        return {name: adapter_axes(name, members, slots=self.ids is not None) for name, members in self.tree.items()}


NO_ADAPTERS = Adapters({}, None)


def adapter_axes(projection: str, members: Iterable[str] = MEMBERS, *, slots: bool = True) -> dict[str, Axes]:
    """Logical axes of members of an adapted projection, or of its slots."""
    out, into = ("vocab", "embed") if projection == "lm_head" else PROJECTION_AXES[projection]
    b = (None, out) if slots else (out, None)
    axes: dict[str, Axes] = {"a": (None, into), "b": b, "scale": (), "gain": (out,), "shift": (out,)}
    return {name: (None, *axes[name]) if slots else axes[name] for name in members}


def empty_slots(
    config: LlamaConfig,
    *,
    slots: int,
    rank: int,
    targets: Sequence[str] | None = None,
    dtype: DTypeLike | None = None,
    more: Sequence[str] = (),
) -> Params:
    """Empty slots, in memory; with a mesh in use (`sharding.on`), laid out like the projections.

    Args:
      config: the model's, on a mesh as `load` gives it.
      slots: their number, with slot 0.
      rank: the largest that an adapter can have.
      targets: the projections that have slots: "q_proj" (of all layers), "layers.0.attn.q_proj" or "lm_head". Default:
        all of `params.projection_names`.
      dtype: of `a` and `b`; the config's by default. The model's own is best, since they are cast to it.
      more: members besides: "gain", "shift".

    Raises:
      RequestError: there is no such projection, or no room for an adapter.
    """
    dtype = jnp.dtype(dtype or config.dtype)
    for name, value, least in (("slots", slots, 2), ("rank", rank, 1)):
        if value < least:
            raise RequestError(f"{name}={value} of adapters", param=name, hint=f"give at least {least}; slot 0 is none")
    projections = _targeted(config, targets)

    def make() -> Params:
        made = {}
        for name, (out, into) in projections.items():
            axes = adapter_axes(name.rpartition(".")[2], (*MEMBERS, *more))
            made[f"{name}.a"] = constrain(jnp.zeros((slots, rank, into), dtype), axes["a"])
            made[f"{name}.b"] = constrain(jnp.zeros((slots, rank, out), dtype), axes["b"])
            made[f"{name}.scale"] = constrain(jnp.zeros((slots,), jnp.float32), axes["scale"])
            for member in more:
                made[f"{name}.{member}"] = constrain(jnp.full((slots, out), _NONE[member], jnp.float32), axes[member])
        return unflatten(made)

    return jax.jit(make)()


def put_adapter(slots: Params, slot: int, adapter: Mapping[str, Any]) -> Params:
    """Puts one adapter into a slot, replacing its contents. All shapes stay the same, so nothing that uses the slots
    is recompiled.

    Args:
      slots: from `empty_slots`. Their arrays are donated: use the returned ones from here on.
      slot: 1 or higher.
      adapter: as for `slot_members`.

    Raises:
      RequestError: there is no such slot; or as for `slot_members`.
    """
    return fill_slot(slots, slot, slot_members(slots, adapter))


def slot_members(slots: Params, adapter: Mapping[str, Any]) -> Params:
    """The contents of a slot with an adapter, numpy arrays of the slots' shapes and dtypes.

    Args:
      slots: from `empty_slots`; only shapes and dtypes are read.
      adapter: a tree shaped like the canonical parameters, with {"a" [r, in], "b" [out, r], "scale" scalar} in place of
        projections, and "gain" and "shift" [out] if the slots have them; r may be smaller than the slots' rank, and may
        differ. Projections that it lacks get none. On a mesh that repeats key/value heads, give it through
        `fuse.repeat_kv_heads` first.

    Raises:
      RequestError: a projection has no slots, a shape does not fit, or a number is NaN or infinite; names it.
    """
    into = flatten(slots)
    full = {name: np.full(x.shape[1:], _NONE.get(name.rpartition(".")[2], 0), x.dtype) for name, x in into.items()}
    for name, members in by_leaf(adapter).items():
        if not members.keys() >= set(MEMBERS) or any(f"{name}.{member}" not in into for member in members):
            raise RequestError(
                f"the adapter holds {name}, which has no slots, or not {{'a', 'b', 'scale'}}",
                param="adapter",
                hint="make slots with these targets (`empty_slots`); names are canonical, also if the model is fused",
            )
        arrays = {member: np.asarray(x) for member, x in members.items()}
        a, b = arrays["a"], arrays["b"]
        most, width = full[f"{name}.a"].shape
        out = full[f"{name}.b"].shape[1]
        rank = len(a) if a.ndim else 0
        wanted: dict[str, tuple[int, ...]] = dict.fromkeys(members, (out,))
        wanted |= {"a": (rank, width), "b": (out, rank), "scale": ()}
        found = {member: x.shape for member, x in arrays.items()}
        if found != wanted or not 0 < rank <= most:
            raise RequestError(
                f"the adapter of {name} has the shapes {found}; its slots take a [r, {width}], b [{out}, r] and a "
                f"scalar, with r up to {most}, and of other members [{out}]",
                param="adapter",
                hint="make slots of a higher rank, or load an adapter that was made for this model",
            )
        with np.errstate(over="ignore"):  # what overflows is refused below
            full[f"{name}.a"][:rank], full[f"{name}.b"][:rank] = a, b.T
            for member in members.keys() - {"a", "b"}:
                full[f"{name}.{member}"][...] = arrays[member]
    check_finite(full)
    return unflatten(full)


def check_finite(members: Mapping[str, Any]) -> None:
    """Checks an adapter's numbers, by name, in the dtypes that they are computed in. One product has the slots of all
    tokens, and zero times NaN is NaN: an unsound adapter would change tokens without it. Traced arrays are not known,
    and pass.

    Raises:
      RequestError: one is NaN or infinite; names its array.
    """
    for name, x in members.items():
        if not isinstance(x, jax.core.Tracer) and not np.isfinite(np.asarray(x, np.float32)).all():
            raise RequestError(
                f"the adapter's {name} has numbers that are NaN or infinite in {x.dtype}",
                param="adapter",
                hint="use an earlier state of the adapter if its training has diverged; if its numbers are too large "
                "for float16, load the model in bfloat16 or float32",
            )


def fill_slot(slots: Params, slot: int, members: Params) -> Params:
    """Puts what `slot_members` returned into a slot; the arrays of `slots` are donated.

    Raises:
      RequestError: there is no such slot.
    """
    number = jax.tree.leaves(slots)[0].shape[0]
    if not 0 < slot < number:
        raise RequestError(f"slot {slot} of {number}", param="slot", hint=f"give 1 to {number - 1}; slot 0 is none")
    return _put(slots, members, slot)


@partial(jax.jit, donate_argnums=0)
def _put(slots: Params, adapter: Params, slot: jax.Array) -> Params:
    return jax.tree.map(lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, slot, 0), slots, adapter)


def adapters_of(
    params: Params, adapters: Params | None, ids: jax.Array | None, config: LlamaConfig, batch: int, length: int
) -> Adapters:
    """The adapter that `params` hold, or the slots that are given; errors as for `checked`.

    Raises:
      RequestError: there are both.
    """
    attached = params.get(ATTACHED)
    if attached is None:
        return checked(adapters, ids, config, batch, length)
    if adapters is not None:
        raise RequestError(
            "the parameters have an adapter for all tokens, and adapters in slots were given besides",
            param="adapters",
            hint="put it into a slot too, or load the model without it",
        )
    return Adapters(attached, None)


def checked(adapters: Params | None, ids: jax.Array | None, config: LlamaConfig, batch: int, length: int) -> Adapters:
    """Checks that each adapter of a forward pass will be used and that all shapes fit, and returns them.

    Raises:
      RequestError: names what does not fit.
    """
    if (adapters is None) != (ids is None):
        raise RequestError(
            "adapters and adapter_ids go together",
            param="adapter_ids",
            hint="give slots, and int32 ids [batch, len] or [batch, 1] of the slot of each token; 0 is none",
        )
    if adapters is None or ids is None:
        return NO_ADAPTERS
    if ids.shape not in ((batch, length), (batch, 1)) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise RequestError(
            f"adapter_ids are {ids.dtype}{list(ids.shape)}",
            param="adapter_ids",
            hint=f"give integers [{batch}, {length}], or [{batch}, 1] for whole rows",
        )
    shapes = _targeted(config, None) | _targeted(config, ("lm_head",))
    given = by_leaf(adapters)
    slots = {x.shape[0] for members in given.values() for x in members.values() if x.ndim}
    for name, members in given.items():
        for member in members:
            if name not in shapes or member not in (*MEMBERS, *MORE_MEMBERS):
                raise RequestError(
                    f"adapters hold {name}.{member}, which belongs to no projection",
                    param="adapters",
                    hint='give {"a", "b", "scale"} under the names of projection_names(config), canonical also if '
                    "fused",
                )
    for name, members in given.items():
        out, into = shapes[name]
        found = {member: x.shape for member, x in members.items()}
        rank = found["a"][1] if len(found.get("a", ())) == 3 else 0
        number = min(slots, default=0)
        wanted = {"a": (number, rank, into), "b": (number, rank, out), "scale": (number,)}
        wanted |= {member: (number, out) for member in MORE_MEMBERS if member in members}
        if found != wanted or len(slots) != 1:
            raise RequestError(
                f"the adapters of {name} have the shapes {found}",
                param="adapters",
                hint=f"give a [slots, rank, {into}], b [slots, rank, {out}], scale [slots], of one number of slots",
            )
    return Adapters(adapters, ids)


def _targeted(config: LlamaConfig, targets: Sequence[str] | None) -> dict[str, tuple[int, int]]:
    """out and in of the targeted projections, by dotted name."""
    shapes = {spec.leaf: spec.shape for spec in canonical_specs(config) if spec.path[-1] == "weight"}
    shapes.setdefault("lm_head", shapes["embed"])
    names = (*projection_names(config), "lm_head")
    known = {*names, *(name.rpartition(".")[2] for name in names)}
    if targets is not None and (not targets or not known >= set(targets)):
        raise RequestError(
            f"adapters for {sorted(set(targets) - known) or 'no projection'}",
            param="targets",
            hint=f"give some of {', '.join(sorted({name.rpartition('.')[2] for name in names}))}, or dotted names",
        )
    return {
        name: (shapes[name][0], shapes[name][1])
        for name in names
        if (name != "lm_head" if targets is None else name in targets or name.rpartition(".")[2] in targets)
    }
