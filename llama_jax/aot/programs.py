"""The programs that `generate` runs, as functions with the shapes of their arguments: to compile them, or to count
their costs, without a model.

    program = decode_program(config, mesh, batch=8, capacity=4096, dtype="bfloat16")
    with on(mesh):
        compiled = program.lower().compile()
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from llama_jax.cache import DENSE_AXES, DenseCache, NewCache, stored_dtype
from llama_jax.config import LlamaConfig
from llama_jax.decode.loop import decode_step, idle_state
from llama_jax.decode.prefill import prefill_chunk
from llama_jax.layout import param_sharding, split_config
from llama_jax.model.fuse import fuse_params
from llama_jax.params import PROJECTION_AXES, Params, abstract_params, flatten, param_specs, unflatten
from llama_jax.sampling import SamplingParams, make_sampler
from llama_jax.schemes import leaf_axes
from llama_jax.sharding import AnyMesh, Axes, ruled

_tracing = threading.RLock()
"""Tracing and lowering are Python. Threads that trace at once only slow one another, and no program would reach XLA,
which compiles without the GIL, before all are traced: 16 threads took 31 s on an H200's host until the first did."""


@dataclass(frozen=True)
class Program:
    """A jitted function with everything needed to compile it.

    Attributes:
      args: trees of `jax.ShapeDtypeStruct`, with shardings where there is a mesh.
      static: keyword arguments that the program is made for.
    """

    name: str
    function: Any
    args: tuple[Any, ...]
    static: Mapping[str, Any]

    def lower(self) -> jax.stages.Lowered:
        """For the devices of its arguments' mesh, or the default device; one program of the process at a time. On a
        mesh: inside of `sharding.on(mesh)`."""
        with _tracing:
            return self.function.lower(*self.args, **self.static)


_decode_step = partial(jax.jit, static_argnames=("config", "profile"), donate_argnames=("state",))(decode_step)


def prefill_program(
    config: LlamaConfig,
    mesh: AnyMesh = None,
    *,
    batch: int,
    capacity: int,
    chunk: int,
    dtype: DTypeLike,
    kv_dtype: str | None = None,
) -> Program:
    """The first `chunk` tokens of the prompts of `batch` rows, into a new cache of `capacity` slots a row.

    Args:
      config: of the model; on a mesh, key/value heads are repeated as `load` does it.
      dtype: of parameters and, without `kv_dtype`, of the cache.
    """
    config = split_config(config, mesh)
    tokens = _array((batch, chunk), jnp.int32, ("batch",), mesh)
    lengths = _array((batch,), jnp.int32, ("batch",), mesh)
    cache = NewCache(batch, capacity, stored_dtype(kv_dtype, dtype))
    args = (fused_parameters(config, mesh, dtype), cache, tokens, tokens, lengths)
    return Program("prefill", prefill_chunk, args, {"config": config})


def decode_program(
    config: LlamaConfig,
    mesh: AnyMesh = None,
    *,
    batch: int,
    capacity: int,
    dtype: DTypeLike,
    kv_dtype: str | None = None,
) -> Program:
    """One greedy decode step of `batch` rows over a cache of `capacity` slots a row, its state donated."""
    config = split_config(config, mesh)
    profile, sampler = make_sampler([SamplingParams(seed=0, temperature=0.0)] * batch, [[]] * batch, config.vocab_size)
    cache = _dense_cache(config, mesh, batch, capacity, stored_dtype(kv_dtype, dtype))
    state = jax.eval_shape(idle_state, cache, sampler)
    state = jax.tree.map(lambda x: _array(x.shape, x.dtype, ("batch",) if x.shape else (), mesh), state)
    args = (fused_parameters(config, mesh, dtype), dataclasses.replace(state, cache=cache))
    return Program("decode", _decode_step, args, {"config": config, "profile": profile})


def _dense_cache(config: LlamaConfig, mesh: AnyMesh, batch: int, capacity: int, dtype: DTypeLike) -> DenseCache:
    """Shapes of a cache and where it lies."""
    cache = jax.eval_shape(partial(DenseCache.create, config, batch, capacity, dtype))

    def lay_out(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return _array(x.shape, x.dtype, DENSE_AXES if len(x.shape) > 2 else ("batch",)[: len(x.shape)], mesh)

    return jax.tree.map(lay_out, cache)


def fused_parameters(config: LlamaConfig, mesh: AnyMesh, dtype: DTypeLike) -> Params:
    """Shapes and shardings of the parameters as `load` lays them out."""
    fused = flatten(jax.eval_shape(partial(fuse_params, config=config), abstract_params(config, dtype)))
    if mesh is None:
        return unflatten(fused)
    where = param_sharding(config, mesh)
    canonical = {s.name: where(s) for s in param_specs(config)}

    def lay_out(name: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if name in canonical:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=canonical[name])
        leaf, _, member = name.rpartition(".")
        members = [other.rpartition(".")[2] for other in fused if other.rpartition(".")[0] == leaf]
        return _array(x.shape, x.dtype, leaf_axes(members, PROJECTION_AXES[leaf.rpartition(".")[2]])[member], mesh)

    return unflatten({name: lay_out(name, x) for name, x in fused.items()})


def _array(shape: tuple[int, ...], dtype: Any, axes: Axes, mesh: AnyMesh) -> jax.ShapeDtypeStruct:
    """The shape, laid out by the rules; a dimension that does not divide stays whole."""
    if mesh is None:
        return jax.ShapeDtypeStruct(shape, dtype)
    by = ruled(mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(by.automatic, by.spec(axes, shape)))
