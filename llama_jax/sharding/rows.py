"""Rows of arrays dealt out to devices, for computations in which no row depends on another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.errors import RequestError
from llama_jax.sharding.mesh import DeviceMesh, make_mesh

AXIS = "data"


@dataclass(frozen=True)
class RowSplit:
    """The devices that share the rows of arrays.

    Attributes:
      mesh: of one axis, "data", so that a model's rows of a batch are split over it too; None is one device, jax's
        default or wherever arrays are.
    """

    mesh: Mesh | None = None

    @classmethod
    def over(cls, mesh: DeviceMesh | None) -> RowSplit:
        """All devices of a mesh, whatever its axes.

        Raises:
          RequestError: some of them belong to another process, so that their results could not be read here.
        """
        if mesh is None or mesh.size == 1:
            return cls()
        devices = list(mesh.devices.flat)
        if others := {device.process_index for device in devices} - {jax.process_index()}:
            raise RequestError(
                f"the mesh has devices of {len(others)} other processes",
                param="mesh",
                hint="choose devices of this process, make_mesh(data=4, devices=jax.local_devices())",
            )
        return cls(make_mesh({AXIS: len(devices)}, devices=devices))

    @property
    def ways(self) -> int:
        """The number of devices."""
        return 1 if self.mesh is None else self.mesh.size

    def split(self, x: jax.Array | np.ndarray) -> jax.Array:
        """An equal number of the rows of x [rows, ...] on each device; rows of zeros are added where they are needed
        for that."""
        if self.mesh is None:
            return jnp.asarray(x)
        if missing := -len(x) % self.ways:
            pad = jnp.pad if isinstance(x, jax.Array) else np.pad
            x = pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)])
        return jax.device_put(x, NamedSharding(self.mesh, PartitionSpec(AXIS)))

    def copy[Tree](self, tree: Tree) -> Tree:
        """A tree of arrays, whole on each device."""
        if self.mesh is None:
            return tree
        copied: Any = jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))
        return copied


ONE_DEVICE = RowSplit()
