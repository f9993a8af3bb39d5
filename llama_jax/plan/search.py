"""Plans: one for a mesh, with the largest batch and context that fit it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError
from llama_jax.layout import check
from llama_jax.plan.backends import Backends
from llama_jax.plan.device_memory import MEMORY_FRACTION
from llama_jax.plan.memory import DeviceShare, Needs, needs_of, programs
from llama_jax.plan.roofline import Floor, decode_floor, prefill_floor
from llama_jax.plan.verdict import Verdict
from llama_jax.plan.workload import Calls, Workload, default_workload
from llama_jax.sharding import AnyMesh, ruled
from llama_jax.targets import Target

_MOST_ROWS = 1 << 20


@dataclass(frozen=True)
class Plan:
    """The cost of a workload on a mesh of devices.

    Attributes:
      mesh: what was given; sizes: of its axes by name, empty for one device.
      shapes: of the programs.
      prefill_backends, decode_backends: that attention and experts would run with.
      needs: bytes of each device; verdict: whether they fit.
      largest_batch, largest_context: the most rows with this context, and tokens with this batch, that fit: 0 where not
        even one row, or the prompt with one token more, fits. None where memory is unknown.
      prefill, decode: the least times of all prompts, and of a step at the whole context.
    """

    target: Target
    mesh: AnyMesh
    sizes: Mapping[str, int]
    workload: Workload
    shapes: Calls
    prefill_backends: Backends
    decode_backends: Backends
    needs: Needs
    verdict: Verdict
    largest_batch: int | None
    largest_context: int | None
    prefill: Floor
    decode: Floor

    @property
    def devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def usable(self) -> int | None:
        """Bytes of a device that jax may use; None where the table has no memory for the target."""
        return self.verdict.usable

    @property
    def fits(self) -> bool | None:
        """None where memory is unknown."""
        return self.verdict.fits

    @property
    def tokens_per_s(self) -> float | None:
        """Predicted upper bound for all rows together."""
        return None if self.decode.seconds is None else self.workload.batch / self.decode.seconds

    @property
    def first_token_s(self) -> float | None:
        """Predicted lower bound on the time until every row has its first token."""
        return self.prefill.seconds


def make_plan(
    config: LlamaConfig,
    target: Target,
    mesh: AnyMesh = None,
    workload: Workload | None = None,
    *,
    memory_fraction: float = MEMORY_FRACTION,
    latency_s: float = 0.0,
) -> Plan:
    """The plan of a workload.

    Args:
      mesh: one device by default; sizes of axes, e.g. {"tensor": 8}, or these with rules (`sharding.RuledMesh`).
      workload: by default one row of 4096 tokens, or as many as the model can take.
      memory_fraction: of each device's memory that jax may use.
      latency_s: seconds that each collective takes besides what its bytes take, if they have been measured.

    Raises:
      RequestError: the workload does not go with the model, or nothing of the model divides by "tensor".
    """
    workload = workload or default_workload(config, "bfloat16")
    workload.check(config)
    check(config, mesh)
    if target.vendor == "cpu" and workload.dtype != "float32":
        raise RequestError(
            f"plans for a CPU are for float32, not {workload.dtype}, of which XLA makes float32 copies there",
            param="dtype",
            hint="choose float32, or a GPU as the target",
        )
    if not 0 < memory_fraction <= 1:
        raise RequestError(
            f"a fraction of {memory_fraction} of the memory is not between 0 and 1",
            param="memory_fraction",
            hint=f"jax's own default is {MEMORY_FRACTION}",
        )
    share = DeviceShare(config, target, mesh, workload.itemsize, workload.kv_dtype)
    shapes, *chosen = programs(share, workload)

    def verdict(other: Workload) -> Verdict:
        return Verdict.of(target, needs_of(share, other).phases, memory_fraction)

    def fits(other: Workload) -> bool:
        return verdict(other).fits is True

    largest_batch = largest_context = None
    if verdict(workload).usable is not None:
        largest_batch = _largest_batch(lambda n: fits(replace(workload, batch=n)))
        largest_context = _largest(workload.prompt, config.context_length, lambda n: fits(replace(workload, context=n)))
    return Plan(
        target=target,
        mesh=mesh,
        sizes=dict(ruled(mesh).shape),
        workload=workload,
        shapes=shapes,
        prefill_backends=chosen[0],
        decode_backends=chosen[1],
        needs=needs_of(share, workload),
        verdict=verdict(workload),
        largest_batch=largest_batch,
        largest_context=largest_context,
        prefill=prefill_floor(share.config, target, mesh, workload, latency_s=latency_s),
        decode=decode_floor(share.config, target, mesh, workload, latency_s=latency_s),
    )


def _largest_batch(fits: Callable[[int], bool]) -> int:
    """Batches are padded to powers of two, so no others need to be tried."""
    rows = 0
    while rows < _MOST_ROWS and fits(2 * rows or 1):
        rows = 2 * rows or 1
    return rows


def _largest(least: int, most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from `least` to `most` that fits, where a larger one never fits if a smaller one does not; 0
    if none does."""
    if not fits(least):
        return 0
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least
