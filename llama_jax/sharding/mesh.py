"""Making a mesh, and having programs traced for it."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from llama_jax.errors import NoDevice
from llama_jax.sharding.axes import MESH_AXES, checked_sizes, parse_mesh
from llama_jax.targets import of_device


def make_mesh(axes: str | Mapping[str, int] = "", *, devices: Sequence[jax.Device] | None = None, **sizes: int) -> Mesh:
    """A mesh of some or all devices: `make_mesh(tensor=8)`, `make_mesh("data=2,tensor=4")`.

    On NVIDIA GPUs NCCL_GRAPH_MIXING_SUPPORT becomes 0 in this process's environment, unless it is set already.

    Args:
      axes, sizes: sizes by axis of `MESH_AXES`, in either way; axes that are not named are left out.
      devices: by default those of jax, of which the first are taken if the mesh is smaller.

    Raises:
      RequestError: an axis is unknown or not supported yet, or a size is not positive.
      NoDevice: there are fewer devices than the mesh has places.
    """
    named = parse_mesh(axes) if axes and isinstance(axes, str) else dict(axes or {})
    sizes = checked_sizes(named | sizes)
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
        return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))
    return Mesh(np.asarray(there[:wanted]).reshape(shape), names)


def _prepare_nccl(device: jax.Device) -> None:
    """NCCL reads its variables when it first connects GPUs. By default it guards every sum in a graph against sums that
    run beside the graph, with two events that cost 2 µs; XLA runs one program at a time on a device, and waits for its
    sums before the next. RCCL knows the variable as well; there nothing has been measured."""
    if of_device(device).vendor == "nvidia":
        os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "0")


def automatic_mesh(mesh: Mesh) -> Mesh:
    """The same devices and axes, with axes that the compiler shards over by itself.

    `jax.make_mesh` gives axes of the explicit kind, under which every operation of a model would have to name the
    sharding of its result (https://docs.jax.dev/en/latest/notebooks/explicit-sharding.html).
    """
    return Mesh(mesh.devices, mesh.axis_names)


def on(mesh: Mesh | None) -> AbstractContextManager[object]:
    """Everything that is traced inside is sharded over `mesh` by the rules; None changes nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(automatic_mesh(mesh))
