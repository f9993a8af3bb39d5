"""Meshes: making them, and the part of an array that each device holds under the rules."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from llama_jax.errors import NoDevice, RequestError
from llama_jax.sharding.axes import MESH_AXES, RULES, Axes, MeshAxes, Rules, checked_sizes, parse_mesh
from llama_jax.targets import of_device


@dataclass(frozen=True)
class RuledMesh:
    """A mesh with its own rules. It is accepted wherever a mesh is; a plain mesh means one with `RULES`.

    It alone decides how arrays are split, so programs, parameters, explanations and costs cannot differ.

    Attributes:
      mesh: of devices, or of sizes only, by axis: counting needs no devices.
      rules: of logical axes to axes of the mesh.
    """

    mesh: Mesh | AbstractMesh | Mapping[str, int]
    rules: Rules = RULES

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", self.rules if isinstance(self.rules, Rules) else Rules(self.rules))

    @property
    def shape(self) -> Mapping[str, int]:
        """Sizes by axis, as `jax.sharding.Mesh.shape`."""
        return self.mesh if isinstance(self.mesh, Mapping) else self.mesh.shape

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.shape.values())

    @property
    def devices(self) -> np.ndarray:
        """The devices of a mesh that has some."""
        assert isinstance(self.mesh, Mesh)
        return self.mesh.devices

    @property
    def automatic(self) -> Mesh | AbstractMesh:
        """The mesh for jax, with axes that the compiler shards over by itself; an abstract one of sizes alone.

        `jax.make_mesh` gives axes of the explicit kind, under which every operation of a model would have to name the
        sharding of its result (https://docs.jax.dev/en/latest/notebooks/explicit-sharding.html).
        """
        if isinstance(self.mesh, Mesh):
            return Mesh(self.mesh.devices, self.mesh.axis_names)
        kinds = (AxisType.Auto,) * len(self.shape)
        return AbstractMesh(tuple(self.shape.values()), tuple(self.shape), axis_types=kinds)

    def over(self, axis: str | None, size: int | None = None) -> tuple[str, ...]:
        """The axes of more than one device that a dimension is split over; none where it stays whole.

        Args:
          axis: logical name of the dimension; one without a name is never split.
          size: of the dimension, which has to divide by the product of the axes' sizes; None is one that divides.
        """
        axes = tuple(a for a in self.rules.get(axis or "", ()) if self.shape.get(a, 1) > 1)
        return axes if size is None or size % self._product(axes) == 0 else ()

    def ways(self, axis: str | None, size: int | None = None) -> int:
        """The number of parts that a dimension is split into; arguments as for `over`."""
        return self._product(self.over(axis, size))

    def share(self, axis: str | None, size: int) -> int:
        """The size of each device's part of a dimension of this name and size."""
        return size // self.ways(axis, size)

    def spec(self, axes: Axes, shape: Sequence[int], what: str = "") -> PartitionSpec:
        """The partition of an array; a dimension that does not divide stays whole.

        Args:
          axes: logical names of the dimensions; trailing ones may be left out.
          shape: of the array; for a dimension that may be split only between units, the number of units.
          what: the array's name, for the error.

        Raises:
          RequestError: the rules split two dimensions over the same axis of the mesh.
        """
        over = [self.over(axis, size) for axis, size in zip(axes, shape, strict=False)]
        used = [axis for names in over for axis in names]
        if len(used) > len(set(used)):
            raise RequestError(
                f"the rules split two dimensions of {what or tuple(shape)} over one axis of the mesh: {over}",
                param="rules",
                hint="give each of its logical axes, " + ", ".join(a for a in axes if a) + ", an axis of its own",
            )
        return PartitionSpec(*map(spec_entry, over))

    def _product(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.shape[axis] for axis in axes)


type DeviceMesh = Mesh | RuledMesh
"""Devices to compute on."""

type AnyMesh = DeviceMesh | AbstractMesh | Mapping[str, int] | None
"""Devices, or the sizes of a mesh's axes by name; None is one device."""


def ruled(mesh: AnyMesh) -> RuledMesh:
    """The mesh with its rules."""
    return mesh if isinstance(mesh, RuledMesh) else RuledMesh({} if mesh is None else mesh)


def spec_entry(over: tuple[str, ...]) -> MeshAxes | None:
    """Axes of a mesh as `jax.sharding.PartitionSpec` and jax's collectives take them; None for none."""
    return over if len(over) > 1 else over[0] if over else None


@overload
def make_mesh(
    axes: str | Mapping[str, int] = "", *, devices: Sequence[jax.Device] | None = None, rules: None = None, **sizes: int
) -> Mesh: ...
@overload
def make_mesh(
    axes: str | Mapping[str, int] = "",
    *,
    devices: Sequence[jax.Device] | None = None,
    rules: Mapping[str, MeshAxes],
    **sizes: int,
) -> RuledMesh: ...
def make_mesh(
    axes: str | Mapping[str, int] = "",
    *,
    devices: Sequence[jax.Device] | None = None,
    rules: Mapping[str, MeshAxes] | None = None,
    **sizes: int,
) -> DeviceMesh:
    """A mesh of some or all devices: `make_mesh(tensor=8)`, `make_mesh("data=2,tensor=4")`.

    On NVIDIA GPUs NCCL_GRAPH_MIXING_SUPPORT becomes 0 in this process's environment, unless it is set already.

    Args:
      axes, sizes: sizes by axis of `MESH_AXES`, in either way; axes that are not named are left out.
      devices: by default those of jax; the first ones if the mesh is smaller.
      rules: what is split over which axes, instead of `RULES`; they stay with the mesh.

    Raises:
      RequestError: an axis is unknown, no rule names it, or a size is not positive.
      NoDevice: there are fewer devices than the mesh has places.
    """
    named = parse_mesh(axes) if axes and isinstance(axes, str) else dict(axes or {})
    by = RULES if rules is None else Rules(rules)
    sizes = checked_sizes(named | sizes, by)
    names = tuple(name for name in MESH_AXES if name in sizes) or ("tensor",)
    shape = tuple(sizes.get(name, 1) for name in names)
    there = list(jax.devices() if devices is None else devices)
    wanted = math.prod(shape)
    if wanted > len(there):
        text = ", ".join(f"{name}={size}" for name, size in zip(names, shape, strict=True))
        have = f"there {'is' if len(there) == 1 else 'are'} {len(there)} ({', '.join({d.device_kind for d in there})})"
        raise NoDevice(
            f"a mesh of {text} needs {wanted} devices; {have}",
            hint="choose smaller sizes; `llama-jax doctor` lists the devices",
        )
    _prepare_nccl(there[0])
    if devices is None and wanted == len(there):
        # All of them: jax knows which are neighbours.
        mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))
    else:
        mesh = Mesh(np.asarray(there[:wanted]).reshape(shape), names)
    return mesh if rules is None else RuledMesh(mesh, by)


def _prepare_nccl(device: jax.Device) -> None:
    """NCCL reads its variables when it first connects GPUs. By default it guards every collective in a graph against
    those outside the graph, with two events that cost 2 µs; XLA runs one program at a time on a device, and waits for
    its collectives before the next. RCCL has the variable as well; nothing has been measured there."""
    if of_device(device).vendor == "nvidia":
        os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "0")


def automatic_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The same devices, axes and rules, with axes of jax's automatic kind, over which the compiler shards by itself.

    Raises:
      RequestError: the mesh has sizes and no devices.
    """
    automatic = ruled(mesh).automatic
    if not isinstance(automatic, Mesh):
        raise RequestError(f"{automatic} has no devices", param="mesh", hint="make a mesh with `make_mesh`")
    return RuledMesh(automatic, mesh.rules) if isinstance(mesh, RuledMesh) else automatic
