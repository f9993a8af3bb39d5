"""A whole model compiled for AMD GPUs that this machine does not have: does it fit, what do the devices exchange, which
kernels run, and how fast could it be.

Prefill and the decode step are the programs that `generate` runs, with parameters laid out and split as `load` does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.aot import Compilation, compile_for, device_mesh
from llama_jax.aot.programs import Program, decode_program, prefill_program
from llama_jax.config import LlamaConfig
from llama_jax.decode.buckets import batch_bucket, cache_bucket, pieces, prompt_bucket
from llama_jax.decode.chunks import chunk_length
from llama_jax.errors import DoesNotFit
from llama_jax.layout import split_config
from llama_jax.plan import Floor, default_workload
from llama_jax.plan.costs import cache_read_bytes, held_bytes, local_rows, read_bytes
from llama_jax.sharding import ways
from llama_jax.targets import Target, abstract_device


@dataclass(frozen=True)
class Phase:
    """Prefill or the decode step.

    Attributes:
      name: "prefill" or "decode".
      tokens: that one run puts into the cache, of all rows.
      floor: the least time of one run, for the arithmetic that XLA counts, for what one device has to read at least
        (the weights that this many tokens use, and the cache), and for what the devices exchange. A prediction
        from peak rates: launches, latencies and everything below the peak come on top.
    """

    name: str
    tokens: int
    compilation: Compilation
    floor: Floor


@dataclass(frozen=True)
class ModelCompilation:
    """A model compiled for a target.

    Attributes:
      mesh_shape: axis name to number of devices.
      batch: rows, filled up as `generate` does it; `capacity`: slots of the cache of each; `chunk`: prompt tokens of a
        row in one prefill.
    """

    target: Target
    mesh_shape: Mapping[str, int]
    dtype: str
    batch: int
    capacity: int
    chunk: int
    prefill: Phase
    decode: Phase

    @property
    def needed_bytes(self) -> int:
        """Memory of one device in the phase that needs more."""
        return max(phase.compilation.memory.total for phase in (self.prefill, self.decode))

    @property
    def fits(self) -> bool:
        """Whether a device has that much."""
        return self.needed_bytes <= self.target.memory


def compile_model(
    config: LlamaConfig,
    target: Target,
    mesh_shape: Mapping[str, int] | None = None,
    *,
    batch: int = 1,
    context: int | None = None,
    prompt: int | None = None,
    dtype: DTypeLike = "bfloat16",
    progress: Callable[[str], None] | None = None,
) -> ModelCompilation:
    """Compiles prefill and the decode step of a model.

    Args:
      mesh_shape: axis name to number of devices: "tensor" splits the model, "data" the batch.
      batch: rows.
      context: tokens of a row that the cache has to hold; by default 4096, or what the model can take if that is less.
      prompt: tokens of a row that prefill is compiled for, by default 512 or the context; long ones run in chunks, of
        which one is compiled.
      dtype: of parameters and cache.
      progress: called with a line of text before each program.

    Raises:
      RequestError: a number is not positive, the prompt is longer than the context, or the context than the model's.
      DoesNotFit: the weights alone are larger than a device's memory; nothing is compiled then.
      CompilerUnavailable: the compiler for AMD GPUs is missing, or the target is not AMD's.
    """
    say = progress or (lambda line: None)
    dtype = jnp.dtype(dtype)
    workload = default_workload(config, dtype.name, batch=batch, context=context, prompt=prompt)
    workload.check(config)
    mesh = device_mesh(target, mesh_shape or {})
    split = split_config(config, mesh)
    with abstract_device(target, mesh):
        rows, length = batch_bucket(batch), prompt_bucket(workload.prompt)
        capacity = cache_bucket(max(workload.context, length))
        chunk = chunk_length(split, target, dtype, batch=rows, prompt=length, capacity=capacity)
        cut = pieces(local_rows(rows, mesh), chunk, ways("mlp"))
    weights = held_bytes(split, dtype.itemsize, mesh)
    if weights > target.memory:
        raise DoesNotFit(
            f"the weights alone take {weights / 1e9:.1f} GB on each of {mesh.size} devices, and {target.name} has "
            f"{target.memory / 1e9:.1f} GB",
            hint="split the model over more devices (tensor=N), or choose a smaller dtype",
        )

    def compiled(program: Program, tokens: int, cache: int, *, overlapped: bool = False) -> Phase:
        c = compile_for(target, program.function, program.args, mesh=mesh, kwargs=program.static)
        read = read_bytes(split, dtype.itemsize, local_rows(tokens, mesh), mesh) + cache
        floor = Floor.of(target, dtype.name, read, c.flops, c.collectives, overlapped=overlapped)
        return Phase(program.name, tokens, c, floor)

    say(f"compiling prefill of {rows} x {chunk} tokens for {mesh.size} x {target.name}")
    program = prefill_program(config, mesh, batch=rows, capacity=capacity, chunk=chunk, dtype=dtype)
    prefill = compiled(program, rows * chunk, 0, overlapped=cut > 1)
    say(f"compiling a decode step of {rows} rows for {mesh.size} x {target.name}")
    program = decode_program(config, mesh, batch=rows, capacity=capacity, dtype=dtype)
    decode = compiled(program, rows, cache_read_bytes(split, dtype.itemsize, rows, capacity, mesh))
    return ModelCompilation(
        target=target,
        mesh_shape=dict(mesh.shape) if mesh_shape else {},
        dtype=dtype.name,
        batch=rows,
        capacity=capacity,
        chunk=chunk,
        prefill=prefill,
        decode=decode,
    )
