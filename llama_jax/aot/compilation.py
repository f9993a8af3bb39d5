"""`compile_for`: a program compiled for AMD GPUs that this machine does not have, and what the compiler says of it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llama_jax.aot.compiler import executable, hlo, topology
from llama_jax.aot.compiler.executable import Kernel
from llama_jax.errors import RequestError
from llama_jax.targets import Collective
from llama_jax.targets.detect import abstract_device
from llama_jax.targets.table import find
from llama_jax.targets.target import Target

if TYPE_CHECKING:
    import jax


@dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      arguments, outputs: of the program; `aliased` of the outputs take the place of donated arguments.
      temporary: what it needs besides while it runs.
      code: machine code of its kernels.
    """

    arguments: int
    outputs: int
    aliased: int
    temporary: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporary + self.code


@dataclass(frozen=True)
class Compilation:
    """A program compiled for a target.

    Attributes:
      devices: how many it is for.
      compiled: jax's own object: `as_text()`, `output_shardings`, ...; it cannot be run here.
      trace_s, compile_s: seconds that tracing and lowering, and compiling took.
    """

    target: Target
    devices: int
    compiled: jax.stages.Compiled
    trace_s: float
    compile_s: float

    @property
    def _runtime_executable(self) -> Any:
        return self.compiled.runtime_executable()

    @cached_property
    def serialized(self) -> bytes:
        """The executable as XLA stores it."""
        return self._runtime_executable.serialize()

    @cached_property
    def _executable(self) -> executable.Fields:
        return executable.gpu_executable(self.serialized)

    @cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        """Every GPU kernel, in the order of their first launch."""
        return executable.kernels(self._executable)

    @cached_property
    def library_calls(self) -> Counter[str]:
        """Calls of libraries and collectives, by kind; a loop's body counts once."""
        return executable.library_calls(self._executable)

    @cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """The collectives between devices, largest first."""
        return hlo.collectives(self.compiled.as_text() or "", self.devices) if self.devices > 1 else ()

    @cached_property
    def memory(self) -> Memory:
        """Memory of one device."""
        stats: Any = self.compiled.memory_analysis()
        # One code object holds most kernels; pages, notes and symbols belong to what is loaded.
        code = sum(len(elf) for elf in {kernel.elf for kernel in self.kernels})
        return Memory(
            arguments=stats.argument_size_in_bytes,
            outputs=stats.output_size_in_bytes,
            aliased=stats.alias_size_in_bytes,
            temporary=stats.temp_size_in_bytes,
            code=code,
        )

    @cached_property
    def _cost(self) -> Mapping[str, float]:
        from jax._src import xla_bridge
        from jaxlib import _jax, xla_client

        (module,) = self._runtime_executable.hlo_modules()
        try:
            client = xla_bridge.get_backend("cpu")
        except RuntimeError:  # jax was told to use a GPU alone
            client = xla_client.make_cpu_client()
        # Needs a client, but counts the same on every one: a walk over the module.
        return _jax.hlo_module_cost_analysis(client, module)

    @property
    def flops(self) -> float | None:
        """Floating-point operations of one device, by XLA's count: bodies of loops count once, Pallas kernels not at
        all. None if libraries do some of them, which XLA does not count either."""
        if set(self.library_calls) - set(hlo.KINDS):
            return None
        return self._cost.get("flops", 0.0)

    @property
    def bytes_accessed(self) -> float:
        """Bytes that the kernels of one device read and write, by XLA's count (`flops`), ignoring caches."""
        return self._cost.get("bytes accessed", 0.0)


def device_mesh(target: Target | str, mesh_shape: Mapping[str, int]) -> jax.sharding.Mesh:
    """A mesh of devices that do not exist, to make shardings for `compile_for` with.

    Args:
      mesh_shape: axis name to size, e.g. {"tensor": 8}.

    Raises:
      CompilerUnavailable: the compiler for AMD GPUs is missing, or the target is none.
      RequestError: no target has this name.
    """
    import jax
    import numpy as np

    target = find(target) if isinstance(target, str) else target
    shape = tuple(mesh_shape.values()) or (1,)
    devices = topology.devices(target, int(np.prod(shape)))
    axes = tuple(mesh_shape) or ("x",)
    auto = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.sharding.Mesh(np.array(devices).reshape(shape), axes, axis_types=auto)


def compile_for(
    target: Target | str,
    f: Callable[..., Any],
    args: Sequence[Any],
    mesh_shape: Mapping[str, int] | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    in_shardings: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    **jit_options: Any,
) -> Compilation:
    """Compiles a function for AMD GPUs. Needs neither a GPU nor ROCm, and leaves the devices of this process alone.

    Args:
      target: a `Target`, or a name that `find` knows.
      f: a function, or one that `jax.jit` has made.
      args: trees of arrays or `jax.ShapeDtypeStruct`; only shapes, dtypes and shardings on `mesh` matter.
      mesh_shape: axis name to size; a single device by default.
      mesh: from `device_mesh`, where shardings have been made with one, instead of `mesh_shape`.
      in_shardings: a tree like `args` (or the beginning of one) of `PartitionSpec` or `NamedSharding`; what has neither
        that nor a sharding of its own is on every device.
      kwargs: keyword arguments; static ones have to be named in `static_argnames`.
      compiler_options: XLA's flags, e.g. {"xla_gpu_enable_triton_gemm": False} for hipBLASLt's products.
      jit_options: passed to `jax.jit` if `f` is a plain function: `static_argnames`, `donate_argnums`, `out_shardings`
        (on `mesh`), ...

    Raises:
      CompilerUnavailable: the compiler is missing, cannot be loaded here, or the target is not AMD's.
      RequestError: no target has this name, there are no arguments, or `jit_options` come with a jitted function.
    """
    import jax
    from jax._src import config

    target = find(target) if isinstance(target, str) else target
    mesh = device_mesh(target, mesh_shape or {}) if mesh is None else mesh
    shaped = _abstract(args, in_shardings, mesh)
    keywords = {name: _abstract(value, None, mesh) for name, value in (kwargs or {}).items()}
    if not jax.tree.leaves((shaped, keywords)):
        raise RequestError(
            "a program without arguments is compiled for this machine: nothing says that it is not",
            param="args",
            hint="give it one, with keep_unused=True if it needs none",
        )
    if hasattr(f, "trace") and jit_options:
        raise RequestError(
            f"{', '.join(jit_options)} cannot be given for a function that is jitted already",
            param=next(iter(jit_options)),
            hint="give them to jax.jit, or pass the plain function",
        )
    jitted = f if hasattr(f, "trace") else jax.jit(f, **jit_options)
    start = time.perf_counter()
    with abstract_device(target, mesh):
        lowered = jitted.trace(*shaped, **keywords).lower(lowering_platforms=("rocm",))
    traced = time.perf_counter()
    # Kept out of the cache on disk: reading an entry needs a real device, and fails with a warning.
    with config.persistent_cache_min_compile_time_secs(math.inf):
        compiled = lowered.compile(compiler_options=dict(compiler_options or {}) or None)
    return Compilation(target, mesh.size, compiled, traced - start, time.perf_counter() - traced)


def _abstract(tree: Any, shardings: Any, mesh: jax.sharding.Mesh) -> Any:
    """The tree with a `jax.ShapeDtypeStruct` on the mesh in place of each array; other leaves as they are."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    def is_sharding(node: Any) -> bool:
        return node is None or isinstance(node, PartitionSpec | NamedSharding)

    def leaf(array: Any, sharding: Any) -> Any:
        if not (hasattr(array, "shape") and hasattr(array, "dtype")):
            return array
        own = getattr(array, "sharding", None)
        if sharding is None:
            on_mesh = isinstance(own, NamedSharding) and own.mesh.devices.tolist() == mesh.devices.tolist()
            sharding = own if on_mesh else PartitionSpec()
        if isinstance(sharding, PartitionSpec):
            sharding = NamedSharding(mesh, sharding)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    def subtree(sharding: Any, node: Any) -> Any:
        return jax.tree.map(lambda array: leaf(array, sharding), node)

    if shardings is None:
        return subtree(None, tree)
    return jax.tree.map(subtree, shardings, tree, is_leaf=is_sharding)
