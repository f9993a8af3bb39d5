"""The mesh of devices that this machine need not have: `--devices`, `--tp` and `--mesh` of `plan` and `compile`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

from llama_jax.cli.options import Decorator, is_auto
from llama_jax.errors import RequestError

if TYPE_CHECKING:
    from llama_jax.config import LlamaConfig
    from llama_jax.plan import Workload
    from llama_jax.targets import Target

devices_option: Decorator = click.option(
    "--devices", type=click.IntRange(1), metavar="N", help="Number of devices. [default: those of the mesh]"
)


def mesh_sizes(
    config: LlamaConfig,
    target: Target,
    workload: Workload,
    mesh: str | None,
    tp: int | None,
    devices: int | None,
    fraction: float,
) -> dict[str, int]:
    """Sizes of the mesh's axes: as requested, with further devices as "data"; else the smallest that fits."""
    from llama_jax.plan import smallest_mesh
    from llama_jax.sharding import requested_axes

    auto = is_auto(mesh, tp)
    asked = None if auto else requested_axes(mesh, tp)
    if asked is None:
        if auto or devices is not None:
            return smallest_mesh(config, target, workload, devices=devices, memory_fraction=fraction)
        return {}
    in_mesh = math.prod(asked.values())
    if devices is not None and devices % in_mesh:
        raise RequestError(
            f"a mesh of {in_mesh} devices does not divide {devices}",
            param="devices",
            hint=f"choose a multiple of {in_mesh}",
        )
    if devices is not None and devices > in_mesh:
        asked = {"data": asked.get("data", 1) * devices // in_mesh} | {k: n for k, n in asked.items() if k != "data"}
    return {axis: n for axis, n in asked.items() if n > 1}
