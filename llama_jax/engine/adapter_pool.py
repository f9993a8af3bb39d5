"""Adapters that an engine holds in slots, by name; they come and go while it runs, and nothing is compiled again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llama_jax.adapters import About, Adapter
from llama_jax.adapters.attaching import low_rank_of
from llama_jax.errors import Overloaded, RequestError, did_you_mean
from llama_jax.model.adapters import ATTACHED, MORE_MEMBERS, empty_slots, fill_slot, slot_members
from llama_jax.model.loaded import Model
from llama_jax.params import Params, by_leaf, flatten, projection_names, unflatten
from llama_jax.sharding import on

LEAST_RANK = 16
"""Rank of the slots of an engine that begins without adapters, unless another is asked for."""


@dataclass
class AdapterSlots:
    """The slots of one replica (`model.adapters`), which its programs read at every step."""

    tree: Params


@dataclass(frozen=True)
class Held:
    """An adapter in a slot.

    Attributes:
      number: of this loading, which no other has: keys and values that it has made are found under it.
    """

    slot: int
    number: int


class AdapterPool:
    """The adapters of an engine. `prepare` may be called from any thread; `put` and `drop` only between steps.

    Attributes:
      slots: of each replica.
      rank: the largest that an adapter can have.
    """

    def __init__(
        self,
        models: Sequence[Model],
        adapters: Mapping[str, Adapter],
        *,
        count: int | None = None,
        rank: int | None = None,
    ):
        """Makes slots, and puts adapters into them.

        Args:
          models: the replicas.
          count: the most adapters at once; by default as many as are given. With it, every projection has slots, for
            adapters that are loaded later; else only those that one of the given has. The output projection has some
            only if one of the given changes it.
          rank: the largest of an adapter; by default that of those given, and at least 16 with a `count`.

        Raises:
          RequestError: an adapter cannot share a batch with others, or there are more than `count`.
        """
        self._models = models
        if any(ATTACHED in model.params for model in models):
            raise RequestError(
                "the model computes with one adapter already",
                param="adapters",
                hint="load the model without it, and give it a name among the others",
            )
        most = len(adapters) if count is None else count
        if len(adapters) > most or most < 1:
            raise RequestError(
                f"{len(adapters)} adapters for {most} slots", param="max_adapters", hint="give a slot for each of them"
            )
        for name, adapter in adapters.items():
            _check_mixes(name, adapter)
        ranks = [adapter.rank for adapter in adapters.values()]
        self.rank = max([*ranks, 1 if count is None else LEAST_RANK]) if rank is None else rank
        targets = {leaf.rpartition(".")[2] for adapter in adapters.values() for leaf in _changed(adapter)}
        if count is not None:
            targets |= {name.rpartition(".")[2] for name in projection_names(models[0].config)}
        self._targets = tuple(sorted(targets))
        members = {m for adapter in adapters.values() for m in _members(adapter)}
        self._more = tuple(m for m in MORE_MEMBERS if m in members)
        self.slots = [AdapterSlots(self._empty(model, most + 1)) for model in models]
        self._most, self._held, self._numbers = most, dict[str, Held](), itertools.count(1)
        if not adapters:  # compiles what later ones need
            self.put("none", self.prepare("none", self._nothing()), ())
            self.drop("none")
        for name, adapter in adapters.items():
            self.put(name, self.prepare(name, adapter), ())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order they were loaded."""
        return tuple(self._held)

    def of(self, name: str) -> Held:
        """The adapter of a name.

        Raises:
          RequestError: there is none.
        """
        if (held := self._held.get(name)) is None:
            known = ", ".join(self._held) or "none"
            raise RequestError(
                f"there is no adapter {name!r:.100}",
                param="adapter",
                hint=did_you_mean(name[:100], self._held) or f"there are {known}",
            )
        return held

    def prepare(self, name: str, adapter: Adapter) -> list[Params]:
        """The contents of a slot of each replica, on the host.

        Raises:
          RequestError: the adapter does not fit the slots, cannot share a batch with others, or has numbers that are
            NaN or infinite.
        """
        _check_mixes(name, adapter)
        if adapter.rank > self.rank:
            raise RequestError(
                f"the adapter {name!r:.100} has rank {adapter.rank}, the slots have {self.rank}",
                param="adapter",
                hint="start with a larger max_adapter_rank (--max-adapter-rank)",
            )
        if strange := _members(adapter) - set(self._more):
            what = "magnitudes (DoRA)" if "gain" in strange else "biases"
            raise RequestError(
                f"the adapter {name!r:.100} has {what}, for which the slots have no room",
                param="adapter",
                hint="give an adapter of this kind when the engine starts, or merge this one into its base",
            )
        prepared = []
        for model, slots in zip(self._models, self.slots, strict=True):
            with on(model.mesh):
                tree = low_rank_of(model.params, model.config, _padded(adapter, self.rank))
            known = {path.rpartition(".")[0] for path in flatten(slots.tree)}
            if others := sorted({path.rpartition(".")[0] for path in flatten(tree)} - known):
                raise RequestError(
                    f"the adapter {name!r:.100} changes {others[0]}, which has no slots",
                    param="adapter",
                    hint="give an adapter of this kind when the engine starts, or merge this one into its base"
                    if others[0] == "lm_head"
                    else "start with max_adapters (--max-adapters), which gives every projection slots",
                )
            prepared.append(slot_members(slots.tree, tree))
        return prepared

    def put(self, name: str, prepared: Sequence[Params], busy: Iterable[int]) -> None:
        """Puts a prepared adapter into a free slot.

        Args:
          busy: slots of unfinished requests, whose adapters may have been dropped.

        Raises:
          RequestError: there is one of this name.
          Overloaded: no slot is free.
        """
        if name in self._held or not name:
            raise RequestError(
                f"there is an adapter {name!r:.100} already" if name else "an adapter needs a name",
                param="adapter",
                hint="unload it first, or take another name",
            )
        taken = {*busy, *(held.slot for held in self._held.values())}
        if (slot := next((i for i in range(1, self._most + 1) if i not in taken), None)) is None:
            raise Overloaded(
                f"all {self._most} slots of adapters are in use",
                hint="unload an adapter, or start with a larger max_adapters (--max-adapters)",
            )
        for model, slots, tree in zip(self._models, self.slots, prepared, strict=True):
            with on(model.mesh):
                slots.tree = fill_slot(slots.tree, slot, tree)
        self._held[name] = Held(slot, next(self._numbers))

    def drop(self, name: str) -> None:
        """Forgets an adapter; requests that use it continue. Errors as for `of`."""
        self.of(name)
        del self._held[name]

    def _nothing(self) -> Adapter:
        """An adapter for every slot that changes nothing."""
        flat = {
            name: np.zeros(x.shape[1:] if name.endswith(".a") else x.shape[:0:-1], np.float32)
            for name, x in flatten(self.slots[0].tree).items()
            if name.endswith((".a", ".b"))
        }
        return Adapter(unflatten(flat), {}, About(tuple((name[:-2], 0.0) for name in flat if name.endswith(".a"))))

    def _empty(self, model: Model, slots: int) -> Params:
        with on(model.mesh):
            return empty_slots(
                model.config, slots=slots, rank=self.rank, targets=self._targets, dtype=model.dtype, more=self._more
            )


def _padded(adapter: Adapter, rank: int) -> Adapter:
    """The adapter with the rank of the slots, so that one program prepares all."""

    def pad(path: str, x: Any) -> Any:
        axis = {"a": 0, "b": 1}.get(path.rpartition(".")[2])
        if axis is None or x.shape[axis] == rank:
            return x
        width = [(0, rank - x.shape[axis]) if i == axis else (0, 0) for i in range(x.ndim)]
        return np.pad(np.asarray(x), width)

    return replace(adapter, low_rank=unflatten({path: pad(path, x) for path, x in flatten(adapter.low_rank).items()}))


def _changed(adapter: Adapter) -> set[str]:
    """The leaves that an adapter changes."""
    return {*adapter.leaves, *by_leaf(adapter.whole)}


def _members(adapter: Adapter) -> set[str]:
    """Members besides those of every low-rank weight that slots need for an adapter."""
    found = {member for members in adapter.leaves.values() for member in members}
    more = {"gain"} if "magnitude" in found else set()
    return more | ({"shift"} if found & {"magnitude", "b_bias"} or flatten(adapter.whole) else set())


def _check_mixes(name: str, adapter: Adapter) -> None:
    """Raises RequestError for an adapter of which not every part can differ from row to row."""
    whole = [path for path in flatten(adapter.whole) if not path.endswith(".bias")]
    low_rank = [leaf for leaf in adapter.leaves if leaf == "embed" or ".moe.experts." in leaf]
    if found := [*whole, *low_rank]:
        raise RequestError(
            f"the adapter {name!r:.100} changes {found[0].removesuffix('.weight')}, which cannot differ within a batch",
            param="adapter",
            hint="load the model with this adapter alone (adapter=FOLDER, --adapter FOLDER), or merge it into its base "
            "(llama-jax merge-lora)",
        )
