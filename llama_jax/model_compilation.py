"""A whole model compiled for AMD GPUs that this machine does not have: does it fit, what do the devices exchange, which
kernels run, and how fast could it be.

Prefill and the decode step are the programs that `generate` runs, with parameters laid out and split as `load` does it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from llama_jax.config import LlamaConfig
from llama_jax.costs import share_used
from llama_jax.decode import cache_bucket, chunk_length, decode_step, first_token, prefill_chunk, prompt_bucket
from llama_jax.errors import DoesNotFit, RequestError
from llama_jax.fuse import fuse_params
from llama_jax.params import Params, param_specs, unflatten
from llama_jax.sampling import SamplingParams, make_sampler
from llama_jax.sharding import param_sharding
from llama_jax.targets import Compilation, Target, abstract_device, compile_for, device_mesh


@dataclass(frozen=True)
class Phase:
    """Prefill or the decode step.

    Attributes:
      name: "prefill" or "decode".
      tokens: that one run puts into the cache, of all rows.
      read_bytes: what one device has to read at least: the weights that so many tokens use, and the cache.
      compute_s, memory_s, links_s: the least time for the arithmetic that XLA counts, for `read_bytes`, and for what
        the devices send one another, at the target's peak rates; None where amount or rate is not known.
    """

    name: str
    tokens: int
    compilation: Compilation
    read_bytes: int
    compute_s: float | None
    memory_s: float | None
    links_s: float | None

    @property
    def floor_s(self) -> float | None:
        """Least seconds of one run: arithmetic and reading overlap, exchange with other devices does not. A prediction
        from peak rates: launches, latencies and everything below the peak come on top."""
        if self.compute_s is None or self.memory_s is None or self.links_s is None:
            return None
        return max(self.compute_s, self.memory_s) + self.links_s


@dataclass(frozen=True)
class ModelCompilation:
    """A model compiled for a target.

    Attributes:
      mesh_shape: axis name to number of devices.
      batch: rows; `capacity`: slots of the cache of each; `chunk`: prompt tokens of a row in one prefill.
      fused: whether parameters are in the layout of `llama_jax.fuse`, as where each device has them whole.
    """

    target: Target
    mesh_shape: Mapping[str, int]
    dtype: str
    batch: int
    capacity: int
    chunk: int
    fused: bool
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
      mesh_shape: axis name to number of devices; the axis "tensor" splits the model, any other repeats it.
      batch: rows.
      context: tokens of a row that the cache has to hold; by default 4096, or what the model can take if that is less.
      prompt: tokens of a row that prefill is compiled for, by default 512 or the context; long ones run in chunks, of
        which one is compiled.
      dtype: of parameters and cache.
      progress: called with a line of text before each program.

    Raises:
      RequestError: the prompt is longer than the context, or the context than the model's.
      DoesNotFit: the weights alone are larger than a device's memory; nothing is compiled then.
      CompilerUnavailable: the compiler for AMD GPUs is missing, or the target is not AMD's.
    """
    say = progress or (lambda line: None)
    dtype = jnp.dtype(dtype)
    context = min(4096, config.context_length) if context is None else context
    prompt = min(512, context) if prompt is None else prompt
    if context > config.context_length:
        raise RequestError(
            f"a context of {context} tokens is longer than the model's, {config.context_length}",
            param="context",
            hint=f"choose at most {config.context_length}",
        )
    if prompt > context:
        raise RequestError(
            f"a prompt of {prompt} tokens does not fit a context of {context}",
            param="prompt",
            hint="choose a longer one",
        )
    mesh = device_mesh(target, mesh_shape or {})
    params = _params(config, mesh, dtype)
    fused = all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    if fused:
        params = _on(mesh, jax.eval_shape(partial(fuse_params, config=config), params))
    weights = sum(map(_shard_bytes, jax.tree.leaves(params)))
    if weights > target.memory:
        raise DoesNotFit(
            f"the weights alone take {weights / 1e9:.1f} GB on each of {mesh.size} devices, and {target.name} has "
            f"{target.memory / 1e9:.1f} GB",
            hint="split the model over more devices (tensor=N), or choose a smaller dtype",
        )
    length, capacity = prompt_bucket(prompt), cache_bucket(max(context, prompt_bucket(prompt)))
    chunk = chunk_length(config, batch, length, capacity)

    say(f"compiling prefill of {batch} x {chunk} tokens for {mesh.size} x {target.name}")
    tokens = jax.ShapeDtypeStruct((batch, chunk), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    static: dict[str, Any] = {"config": config, "capacity": capacity, "dtype": dtype}
    static |= {"page_size": None, "prompt_logprobs": None}
    prefill_args = (params, None, tokens, tokens, tokens, lengths)
    prefill = compile_for(target, prefill_chunk, prefill_args, mesh=mesh, kwargs=static)
    with abstract_device(target):
        logits, cache, _ = jax.eval_shape(partial(prefill_chunk, **static), *prefill_args)
    # The cache stays where prefill has put it.
    cache = jax.tree.map(_with_sharding, cache, prefill.compiled.output_shardings[1])

    say(f"compiling a decode step of {batch} rows for {mesh.size} x {target.name}")
    options, sampler = make_sampler([SamplingParams(seed=0)] * batch, [[]] * batch, config.vocab_size)
    start = partial(first_token, options=options, room=capacity)
    with abstract_device(target):
        state, _ = jax.eval_shape(start, logits, cache, sampler, lengths, lengths)
    state = _on(mesh, state, cache=cache)
    decode = compile_for(
        target,
        decode_step,
        (params, state),
        mesh=mesh,
        kwargs={"config": config, "options": options},
        static_argnames=("config", "options"),
        donate_argnames=("state",),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, state),
    )
    cache_bytes = sum(map(_shard_bytes, jax.tree.leaves(cache)))
    phase = partial(_phase, config=config, mesh=mesh, dtype=dtype, target=target)
    return ModelCompilation(
        target=target,
        mesh_shape=dict(mesh.shape) if mesh_shape else {},
        dtype=dtype.name,
        batch=batch,
        capacity=capacity,
        chunk=chunk,
        fused=fused,
        prefill=phase("prefill", batch * chunk, prefill, 0),
        decode=phase("decode", batch, decode, cache_bytes),
    )


def _params(config: LlamaConfig, mesh: jax.sharding.Mesh, dtype: jnp.dtype) -> Params:
    sharding = param_sharding(config, mesh)
    return unflatten({s.name: jax.ShapeDtypeStruct(s.shape, dtype, sharding=sharding(s)) for s in param_specs(config)})


def _on(mesh: jax.sharding.Mesh, tree: Any, **parts: Any) -> Any:
    """A tree of shapes, whole on every device; `parts` take the place of fields of it."""
    whole = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda leaf: _with_sharding(leaf, whole), tree)
    return dataclasses.replace(placed, **parts) if parts else placed


def _with_sharding(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    assert leaf.sharding is not None
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _phase(
    name: str,
    tokens: int,
    compilation: Compilation,
    cache_bytes: int,
    *,
    config: LlamaConfig,
    mesh: jax.sharding.Mesh,
    dtype: jnp.dtype,
    target: Target,
) -> Phase:
    sharding = param_sharding(config, mesh)
    weights = sum(
        math.prod(sharding(s).shard_shape(s.shape)) * share_used(s, config, tokens) for s in param_specs(config)
    )
    read_bytes = round(weights * dtype.itemsize) + cache_bytes
    traffic = sum(collective.traffic for collective in compilation.collectives)
    return Phase(
        name,
        tokens,
        compilation,
        read_bytes,
        compute_s=_seconds(compilation.flops, target.rates.of(dtype.name)),
        memory_s=_seconds(read_bytes, target.bandwidth),
        links_s=_seconds(traffic, target.links.ring_bandwidth(compilation.devices)),
    )


def _seconds(amount: float | None, rate: float) -> float | None:
    if amount == 0:
        return 0.0
    return amount / rate if amount and rate else None
