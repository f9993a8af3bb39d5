"""Where training keeps its arrays on a mesh: axes "data", "fsdp" and "tensor".

Rows of a batch are split over "data" and "fsdp". Each device keeps a part of every weight, of its gradient and of the
optimiser's state, split over "fsdp" along the axis that "tensor" leaves whole; XLA gathers a weight where it is used,
and sends each device the sum of its own part of the gradient ("ZeRO", arXiv:1910.02054, stage 3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from jax.sharding import NamedSharding

from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError
from llama_jax.layout import split_config
from llama_jax.sharding import RULES, AnyMesh, DeviceMesh, RuledMesh, Rules, make_mesh, ruled
from llama_jax.training.batch import Batch

COMPUTED = Rules({**RULES, "batch": ("data", "fsdp")})
"""How what is computed is split."""
KEPT = Rules({**COMPUTED, "embed": "fsdp"})
"""How weights, gradients and the optimiser's state are kept."""


def training_mesh(axes: str | Mapping[str, int]) -> RuledMesh:
    """A mesh of some of "data", "fsdp" and "tensor", as `sharding.make_mesh` takes them, with the rules of training."""
    return make_mesh(axes, rules=COMPUTED)


def kept(mesh: DeviceMesh) -> RuledMesh:
    """The mesh under the rules by which weights are kept."""
    return RuledMesh(ruled(mesh).mesh, KEPT)


def check_mesh(config: LlamaConfig, mesh: AnyMesh, rows: int) -> None:
    """Refuses a mesh that would hold key/value heads more than once, since copies of what is trained would part, or on
    which every device would compute all rows.

    Args:
      rows: of a part of a batch.

    Raises:
      RequestError: with the numbers.
    """
    if rows % (ways := ruled(mesh).ways("batch")):
        raise RequestError(
            f"{rows} rows that are computed together cannot be split over {ways} devices",
            param="rows.rows",
            hint=f"choose rows.rows and rows.parts so that their quotient is a multiple of {ways} (data x fsdp)",
        )
    if split_config(config, mesh) != config:
        raise RequestError(
            f"{ruled(mesh).ways('kv_heads')} devices of the axis tensor for {config.num_kv_heads} key/value heads",
            param="mesh",
            hint="choose tensor=N that divides the key/value heads; fsdp=N splits weights too, at any number of heads",
        )


def place_batch(batch: Batch, parts: int, mesh: DeviceMesh | None) -> Batch:
    """Rows [batch, len] on the devices as [parts, batch // parts, len], each part split over the devices.

    Rows that are one text each lose their segments, so that kernels which know none can be chosen.
    """
    arrays = jax.tree.map(lambda x: x.reshape(parts, -1, x.shape[-1]), batch)
    if batch.segments is not None and not batch.segments.any():
        arrays = dataclasses.replace(arrays, segments=None)
    if mesh is None:
        return jax.device_put(arrays)
    by = ruled(mesh)
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(by.automatic, by.spec((None, "batch"), x.shape))), arrays
    )
