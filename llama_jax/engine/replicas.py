"""Data parallelism: several replicas of a model behind one interface, a core for each part of the mesh."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.engine.adapter_pool import AdapterSlots
from llama_jax.engine.compiled import Compiled
from llama_jax.engine.core import Core, Drawn
from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.snapshot import Snapshot
from llama_jax.model.loaded import Model
from llama_jax.plan.step_costs import Peak
from llama_jax.sharding import RuledMesh, ruled


def replicas(model: Model) -> list[Model]:
    """One model for each part of the mesh over which rows are split; the model itself if they are not.

    Weights are not copied: each replica uses the shards that its devices already hold.
    """
    if model.mesh is None or ruled(model.mesh).ways("batch") == 1:
        return [model]
    whole = ruled(model.mesh)
    names = tuple(whole.shape)
    split = [names.index(name) for name in whole.over("batch")]
    made = []
    for place in np.ndindex(*(whole.devices.shape[axis] for axis in split)):
        devices = whole.devices
        for axis, at in zip(split, place, strict=True):
            devices = np.take(devices, [at], axis=axis)
        mesh = RuledMesh(Mesh(devices, names), whole.rules)
        made.append(replace(model, params=_on(model.params, mesh), mesh=mesh))
    return made


def _on(tree: Any, mesh: RuledMesh) -> Any:
    """Arrays of a larger mesh restricted to some of its devices; other arrays are copied to each device."""
    devices = set(mesh.devices.flat)

    def part(x: jax.Array) -> jax.Array:
        if not isinstance(x.sharding, NamedSharding):
            return jax.device_put(x, NamedSharding(mesh.automatic, PartitionSpec()))
        held = [shard.data for shard in x.addressable_shards if shard.device in devices]
        return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(mesh.automatic, x.sharding.spec), held)

    return jax.tree.map(part, tree)


class Replicas:
    """Cores that share the work, each with its own rows and pages. Not thread-safe.

    Each replica runs its steps while the host serves the others. A request's continuations go to one replica,
    where they share the pages of the prompt.

    Attributes:
      cores: the replicas.
    """

    def __init__(
        self,
        models: list[Model],
        settings: EngineSettings,
        adapters: Sequence[AdapterSlots] | None,
        *,
        drafts: list[Model] | None = None,
        peak: Peak | None = None,
    ):
        """Makes replicas without sequences, each with these settings; `adapters`: the slots of each; `drafts`: the
        draft model of each; `peak`: peak rates of each device."""
        count = len(models)
        self.cores = [
            Core(
                model,
                settings,
                adapters=None if adapters is None else adapters[i],
                draft=None if drafts is None else drafts[i],
                numbers=itertools.count(i, count),
                peak=peak,
            )
            for i, model in enumerate(models)
        ]

    def compile_all(self, *, early: bool = False) -> Iterator[Compiled]:
        """Compiles missing programs, one replica after the other (`Programs.compile_all`); yields progress as each is
        done."""
        total = sum(len(core.programs.awaited(early=early)) for core in self.cores)
        began, done = time.monotonic(), 0
        for core in self.cores:
            for news in core.compile_all(early=early):
                done += 1
                here = done - news.done + news.total  # after this replica
                left_s = news.left_s + (time.monotonic() - began + news.left_s) * (total - here) / here
                yield replace(news, done=done, total=total, left_s=left_s)

    @property
    def settings(self) -> EngineSettings:
        """Settings of each replica."""
        return self.cores[0].settings

    @property
    def next(self) -> Core:
        """The least busy replica."""
        return min(self.cores, key=lambda core: core.unfinished)

    def of(self, number: int) -> Core:
        """The replica that runs a sequence."""
        return self.cores[number % len(self.cores)]

    def step(self) -> list[Drawn]:
        """Runs a step of each replica that has work."""
        return [drawn for core in self.cores if not core.idle for drawn in core.step()]

    @property
    def idle(self) -> bool:
        """Whether there is no work left."""
        return all(core.idle for core in self.cores)

    def snapshot(self) -> Snapshot:
        """The state and counters of all replicas together."""
        return Snapshot.of([core.snapshot() for core in self.cores])
