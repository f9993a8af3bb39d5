"""Ahead-of-time compilation of an engine for AMD GPUs this machine lacks: every program, its memory and kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.aot import Compilation, compile_for, device_mesh
from llama_jax.aot.programs import Program, fused_parameters
from llama_jax.cache import check_kv_dtype, stored_dtype
from llama_jax.config import LlamaConfig
from llama_jax.engine.compiled import THREADS
from llama_jax.engine.draft_programs import DRAFT, FOLLOW, draft_program, new_cache
from llama_jax.engine.program_set import START, Key, program, program_set
from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.sizing import settings_for
from llama_jax.engine.state import new_state, shapes_of
from llama_jax.errors import DoesNotFit, RequestError
from llama_jax.layout import check
from llama_jax.plan import ENGINE_FRACTION, Verdict
from llama_jax.plan.device_memory import usable_bytes
from llama_jax.plan.memory import DeviceShare
from llama_jax.sharding import ruled
from llama_jax.targets import Target, abstract_device

DRAFT_START = "draft start"
"""Name of the program that makes the draft model's cache, which `Core` runs once."""


@dataclass(frozen=True)
class EngineCompilation:
    """An engine compiled for a target.

    Attributes:
      sizes: of the mesh's axes by name, empty for one device.
      dtype: of parameters and, without `kv_dtype`, of the cache.
      weights: bytes of the parameters on each device; loading: the peak during loading.
      start: the program that makes the state; programs: every one of `program_set`.
      draft_weights: bytes of a draft model's parameters on each device; draft_start: the program that makes its
        cache.
      fraction: of each device's memory that jax may use.
    """

    target: Target
    sizes: Mapping[str, int]
    dtype: str
    kv_dtype: str | None
    settings: EngineSettings
    weights: int
    loading: int
    start: Compilation
    programs: Mapping[Key, Compilation]
    fraction: float
    draft_weights: int = 0
    draft_start: Compilation | None = None

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.start.devices

    @property
    def compilations(self) -> Mapping[str, Compilation]:
        """All by name, in the order of `program_set`."""
        starts = {START: self.start} | ({DRAFT_START: self.draft_start} if self.draft_start else {})
        return starts | {str(key): compilation for key, compilation in self.programs.items()}

    @property
    def verdict(self) -> Verdict:
        """Whether it fits: loading as planned; per program name the largest as XLA reports it, plus the code of all
        programs, which stays on the device."""
        code = sum(compilation.memory.code for compilation in self.compilations.values())
        phases = {"loading": self.loading + self.draft_weights}
        state, cache = self.start.memory.outputs, self.draft_start.memory.outputs if self.draft_start else 0
        for key, compilation in ((Key(START), self.start), *self.programs.items()):
            beside = 0 if key.size else self.weights  # programs with a size take the weights as an argument
            if key.name == "mark" or key.greedy:  # which take only the arrays over the vocabulary, or all others
                beside += state - compilation.memory.aliased
            beside += self.weights + state if key.name in (DRAFT, FOLLOW) else self.draft_weights + cache
            needs = beside + compilation.memory.total - compilation.memory.code + code
            phases[key.name] = max(needs, phases.get(key.name, 0))
        return Verdict.of(self.target, phases, self.fraction)

    @property
    def fits(self) -> bool | None:
        """Whether every program fits; None if the table lists no memory size for the target."""
        return self.verdict.fits


def compile_engine(
    config: LlamaConfig,
    target: Target,
    mesh_shape: Mapping[str, int] | None = None,
    *,
    dtype: DTypeLike = "bfloat16",
    kv_dtype: str | None = None,
    memory_fraction: float = ENGINE_FRACTION,
    settings: EngineSettings | None = None,
    draft: LlamaConfig | None = None,
    keys: Sequence[Key] | None = None,
    progress: Callable[[str], None] | None = None,
    **sizes: Any,
) -> EngineCompilation:
    """Compiles every program of an engine on one replica of a model, several at a time.

    Args:
      mesh_shape: axis name to number of devices, without "data", since each replica has its own engine.
      dtype: of parameters and, without `kv_dtype`, of the cache.
      memory_fraction: of each device's memory that jax may use.
      settings: sizes of the engine; by default those chosen on such a device once the weights are loaded.
      draft: a draft model, on the same mesh and in the same dtypes.
      keys: the programs; all of the engine's by default.
      progress: called with a line of text after each program.
      sizes: without `settings`, options of `default_settings`: rows, context, pages, ...

    Raises:
      RequestError: the mesh splits rows, nothing in the model divides by "tensor", or the context exceeds the model's.
      DoesNotFit: the weights, or the weights and one sequence of the context's length, exceed a device's memory.
      CompilerUnavailable: the compiler for AMD GPUs is missing, or the target is not AMD's.
    """
    say = progress or (lambda line: None)
    dtype = jnp.dtype(dtype)
    check_kv_dtype(kv_dtype, target)
    for each in (config, draft):
        if each is not None:
            check(each, mesh_shape)
    mesh = device_mesh(target, mesh_shape or {})
    if ruled(mesh).ways("batch") > 1:
        raise RequestError(
            f"an engine runs on one replica of the model, and the mesh has {ruled(mesh).ways('batch')}",
            param="mesh",
            hint="leave out the axis data: every replica compiles the same programs",
        )
    share = DeviceShare(config, target, mesh, dtype.itemsize, kv_dtype)
    small = None if draft is None else DeviceShare(draft, target, mesh, dtype.itemsize, kv_dtype)
    weights = share.weights + (small.weights if small else 0)
    usable = usable_bytes(target, memory_fraction)
    if usable is not None and weights > usable:
        raise DoesNotFit(
            f"the weights alone take {weights / 1e9:.1f} GB on each of {mesh.size} devices, and jax may use "
            f"{usable / 1e9:.1f} GB of {target.name}",
            hint="split the model over more devices, e.g. with --tp 8",
        )
    split = share.config
    if settings is None:
        free = None if usable is None else usable - weights
        drafting = (small.config, dtype, kv_dtype) if small else None
        sizes |= {"kv_dtype": kv_dtype, "draft": drafting}
        settings = settings_for(split, dtype, mesh, on_cpu=False, free=free, **sizes)

    def compiled(made: Program) -> Compilation:
        done = compile_for(target, made.function, made.args, mesh=mesh, kwargs=made.static)
        say(f"{made.name}, {done.trace_s + done.compile_s:.1f} s")
        return done

    def started(name: str, make: Callable[..., Any], config: LlamaConfig) -> Compilation:
        def begin(_: jax.Array) -> Any:  # takes an argument: without one it would be compiled for this machine
            return make(config, settings, stored_dtype(kv_dtype, dtype))

        nothing = jax.ShapeDtypeStruct((), jnp.bool)
        return compiled(Program(name, jax.jit(begin, keep_unused=True), (nothing,), {}))

    start = started(START, new_state, split)
    draft_start = started(DRAFT_START, new_cache, small.config) if small else None

    def made(key: Key) -> Program:
        if small and draft_start and key.name in (DRAFT, FOLLOW):
            params, cache = fused_parameters(small.config, mesh, dtype), shapes_of(draft_start.compiled)
            return draft_program(key.name, small.config, settings, params, cache, config.vocab_size)
        params, state = fused_parameters(split, mesh, dtype), shapes_of(start.compiled)
        return program(key, split, settings, params, state, None)

    def of_key(key: Key) -> Compilation:
        with abstract_device(target, mesh):
            wanted = made(key)
        return compiled(wanted)

    keys = program_set(settings, on_cpu=False) if keys is None else keys
    with ThreadPoolExecutor(THREADS) as pool:
        programs = dict(zip(keys, pool.map(of_key, keys), strict=True))
    return EngineCompilation(
        target=target,
        sizes=dict(mesh_shape or {}),
        dtype=dtype.name,
        kv_dtype=kv_dtype,
        settings=settings,
        weights=share.weights,
        loading=share.loading,
        start=start,
        programs=programs,
        fraction=memory_fraction,
        draft_weights=small.weights if small else 0,
        draft_start=draft_start,
    )
