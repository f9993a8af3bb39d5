"""Several copies of a model behind one door: a core for each part of the mesh that computes its own rows."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.engine.compiled import Compiled
from llama_jax.engine.core import Core, Drawn
from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.snapshot import Snapshot
from llama_jax.model.loaded import Model
from llama_jax.params import Params
from llama_jax.plan.step_costs import Peak
from llama_jax.sharding import RuledMesh, ruled


def replicas(model: Model) -> list[Model]:
    """The model once for each part of its mesh among which rows are split; where they are not, the model itself.

    Weights stay where they are: each replica's are made of the parts that its devices hold already.
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
    """Arrays of a larger mesh as a part of its devices holds them; others are copied to each device."""
    devices = set(mesh.devices.flat)

    def part(x: jax.Array) -> jax.Array:
        if not isinstance(x.sharding, NamedSharding):
            return jax.device_put(x, NamedSharding(mesh.automatic, PartitionSpec()))
        held = [shard.data for shard in x.addressable_shards if shard.device in devices]
        return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(mesh.automatic, x.sharding.spec), held)

    return jax.tree.map(part, tree)


class Replicas:
    """Cores that share the work, each with rows and pages of its own. Not safe for threads.

    Each replica runs its steps while the host looks after the others. A request's continuations go to one replica,
    where they share the pages of the prompt.

    Attributes:
      cores: the replicas.
    """

    def __init__(
        self,
        models: list[Model],
        settings: EngineSettings,
        adapters: Params | None,
        *,
        drafts: list[Model] | None = None,
        peak: Peak | None = None,
    ):
        """Replicas without sequences, each with these settings; `drafts`: the draft model of each; `peak`: of each
        device."""
        count = len(models)
        self.cores = [
            Core(
                model,
                settings,
                adapters=adapters if count == 1 else _on(adapters, ruled(model.mesh)),
                draft=None if drafts is None else drafts[i],
                numbers=itertools.count(i, count),
                peak=peak,
            )
            for i, model in enumerate(models)
        ]

    def compile_all(self) -> Iterator[Compiled]:
        """Compiles what is missing, one replica after the other; yields news of each program when it is done."""
        began, done, total = time.monotonic(), 0, sum(len(core.programs.missing) for core in self.cores)
        for core in self.cores:
            for news in core.compile_all():
                done += 1
                here = done - news.done + news.total  # behind this replica
                left_s = news.left_s + (time.monotonic() - began + news.left_s) * (total - here) / here
                yield replace(news, done=done, total=total, left_s=left_s)

    @property
    def settings(self) -> EngineSettings:
        """Of each replica."""
        return self.cores[0].settings

    @property
    def next(self) -> Core:
        """The replica that has least to do."""
        return min(self.cores, key=lambda core: core.unfinished)

    def of(self, number: int) -> Core:
        """The replica that runs a sequence."""
        return self.cores[number % len(self.cores)]

    def step(self) -> list[Drawn]:
        """A step of each replica that has something to do."""
        return [drawn for core in self.cores if not core.idle for drawn in core.step()]

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return all(core.idle for core in self.cores)

    def snapshot(self) -> Snapshot:
        """All of them in numbers."""
        return Snapshot.of([core.snapshot() for core in self.cores])
