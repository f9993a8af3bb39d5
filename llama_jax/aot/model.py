"""A whole model compiled for AMD GPUs that this machine lacks: whether it fits, what the devices exchange, which
kernels run, and how fast it could be.

Prefill and the decode step are the programs that `generate` runs, with parameters laid out and split as `load` does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.aot import Compilation, compile_for, device_mesh
from llama_jax.aot.programs import Program, decode_program, prefill_program
from llama_jax.config import LlamaConfig
from llama_jax.decode.buckets import batch_bucket, pieces
from llama_jax.errors import DoesNotFit
from llama_jax.layout import split_config
from llama_jax.plan import MEMORY_FRACTION, Floor, Plan, Verdict, default_workload, make_plan, remedies, ways_to_fit
from llama_jax.plan.costs import cache_read_bytes, local_rows, prefill_flops, read_bytes, step_flops
from llama_jax.sharding import ways
from llama_jax.targets import Target, abstract_device


@dataclass(frozen=True)
class Phase:
    """Prefill or the decode step.

    Attributes:
      name: "prefill" or "decode".
      tokens: that one run puts into the cache, of all rows; capacity: slots of a row's cache in it.
      floor: the least time of one run, for the arithmetic of one device and what it has to read at least (the weights
        that this many tokens use, and the cache), both counted from shapes (`plan.costs`), and for what the devices
        exchange. A prediction from peak rates: launches, latencies and everything below the peak come on top.
    """

    name: str
    tokens: int
    capacity: int
    compilation: Compilation
    floor: Floor


@dataclass(frozen=True)
class ModelCompilation:
    """A model compiled for a target.

    Attributes:
      plan: of the same workload: its shapes are those that were compiled, for prefill with the cache that a text begins
        with, for decode with the one that holds all of it.
      batch: rows, filled up as `generate` does it; `chunk`: prompt tokens of a row in one prefill.
    """

    plan: Plan
    batch: int
    chunk: int
    prefill: Phase
    decode: Phase

    @property
    def target(self) -> Target:
        return self.plan.target

    @property
    def verdict(self) -> Verdict:
        """Whether it fits: prefill and decode as XLA reports them; loading and growing, which are no programs of one
        shape, as they are planned."""
        compiled = {phase.name: phase.compilation.memory.total for phase in (self.prefill, self.decode)}
        return replace(self.plan.verdict, phases={**self.plan.needs.phases, **compiled})

    @property
    def fits(self) -> bool | None:
        """Whether every phase fits; None where the table has no memory for the target."""
        return self.verdict.fits


def compile_model(
    config: LlamaConfig,
    target: Target,
    mesh_shape: Mapping[str, int] | None = None,
    *,
    batch: int = 1,
    context: int | None = None,
    prompt: int | None = None,
    dtype: DTypeLike = "bfloat16",
    kv_dtype: str | None = None,
    memory_fraction: float = MEMORY_FRACTION,
    progress: Callable[[str], None] | None = None,
) -> ModelCompilation:
    """Compiles prefill and the decode step of a model.

    Args:
      mesh_shape: axis name to number of devices: "tensor" splits the model, "data" the batch.
      batch: rows.
      context: tokens of a text, prompt and answer; by default 4096, or what the model can take if that is less.
      prompt: tokens of a row that prefill is compiled for, by default 512 or the context; long ones run in chunks, of
        which one is compiled.
      dtype: of parameters and, without `kv_dtype`, of the cache.
      memory_fraction: of each device's memory that jax may use.
      progress: called with a line of text before each program.

    Raises:
      RequestError: a number is not positive, the prompt is longer than the context, or the context than the model's.
      DoesNotFit: the weights alone are larger than a device's memory; nothing is compiled then.
      CompilerUnavailable: the compiler for AMD GPUs is missing, or the target is not AMD's.
    """
    say = progress or (lambda line: None)
    dtype = jnp.dtype(dtype)
    workload = default_workload(config, dtype.name, batch=batch, context=context, prompt=prompt, kv_dtype=kv_dtype)
    workload.check(config)
    mesh = device_mesh(target, mesh_shape or {})
    plan = make_plan(config, target, dict(mesh_shape or {}), workload, memory_fraction=memory_fraction)
    split = split_config(config, mesh)
    with abstract_device(target, mesh):
        rows, chunk = batch_bucket(batch), plan.shapes.chunk
        cut = pieces(local_rows(rows, mesh), chunk, ways("mlp"))
    if plan.needs.weights > target.memory:
        raise DoesNotFit(
            f"the weights alone take {plan.needs.weights / 1e9:.1f} GB on each of {mesh.size} devices, and "
            f"{target.name} has {target.memory / 1e9:.1f} GB",
            hint=ways_to_fit(remedies(config, plan)),
        )

    def compiled(
        program: Program, tokens: int, capacity: int, cache: int, flops: float, *, overlapped: bool = False
    ) -> Phase:
        c = compile_for(target, program.function, program.args, mesh=mesh, kwargs=program.static)
        read = read_bytes(split, dtype.itemsize, local_rows(tokens, mesh), mesh) + cache
        floor = Floor.of(target, dtype.name, read, flops, c.collectives, overlapped=overlapped)
        return Phase(program.name, tokens, capacity, c, floor)

    first, last = plan.shapes.capacities[0], plan.shapes.capacities[-1]
    say(f"compiling prefill of {rows} x {chunk} tokens for {mesh.size} x {target.name}")
    dtypes: dict[str, Any] = {"dtype": dtype, "kv_dtype": kv_dtype}
    with abstract_device(target, mesh):
        program = prefill_program(config, mesh, batch=rows, capacity=first, chunk=chunk, **dtypes)
    flops = prefill_flops(split, rows, chunk, mesh)
    prefill = compiled(program, rows * chunk, first, 0, flops, overlapped=cut > 1)
    say(f"compiling a decode step of {rows} rows for {mesh.size} x {target.name}")
    with abstract_device(target, mesh):
        program = decode_program(config, mesh, batch=rows, capacity=last, **dtypes)
    seen = min(last, workload.context)
    read = cache_read_bytes(split, dtype.itemsize, rows, seen, mesh, kv_dtype)
    decode = compiled(program, rows, last, read, step_flops(split, rows, seen, mesh))
    return ModelCompilation(plan=plan, batch=rows, chunk=chunk, prefill=prefill, decode=decode)
