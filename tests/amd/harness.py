"""`run_on`: a JAX function compiled for gfx942 or gfx950 by XLA's own compiler, and executed in the emulator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from amd.emulator import KernelCode, Options
from amd.executable import Executable, LaunchRecord
from llama_jax.aot import Compilation, compile_for

ARCHS = ("gfx942", "gfx950")
IN_ORDER = Options()
COMPILER_OPTIONS = {
    # On gfx942 XLA would hand ragged_dot to hipBLASLt, and libraries cannot be emulated.
    "xla_gpu_experimental_use_ragged_dot_grouped_gemm": False,
}


@dataclass(frozen=True)
class Report:
    """A record of what ran.

    Attributes:
      launches: every launch in order.
    """

    launches: tuple[LaunchRecord, ...]

    @property
    def kernels(self) -> Counter[str]:
        """Launches by the kernel's name."""
        return Counter(launch.name for launch in self.launches)

    @property
    def wave_instructions(self) -> int:
        return sum(launch.wave_instructions for launch in self.launches)


@dataclass(frozen=True)
class Program:
    """A function compiled for an emulated GPU; call it as often as you like.

    Attributes:
      compilation: what the compiler says: kernels, registers, memory.
    """

    compilation: Compilation
    executable: Executable
    output: Any

    def run(self, *args: Any, options: Options = IN_ORDER) -> tuple[Any, Report]:
        """The function's results, numpy arrays in its tree, and what ran."""
        flat = [np.asarray(x) for x in jax.tree.leaves(args)]
        leaves, tree = jax.tree.flatten(self.output)
        raw, launches = self.executable.run(flat, len(leaves), options)
        arrays = [_array(data, leaf) for data, leaf in zip(raw, leaves, strict=True)]
        return jax.tree.unflatten(tree, arrays), Report(tuple(launches))


def compile_on(
    arch: str, f: Callable[..., Any], *args: Any, edit: Callable[[KernelCode], KernelCode] | None = None
) -> Program:
    """Compiles `f` for the shapes of `args`: trees of arrays or `jax.ShapeDtypeStruct`; `edit` plants a bug."""

    def program(*args: Any) -> Any:  # of our own: every argument stays a parameter, whatever `f` is
        return f(*args)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.result_type(x)), args)
    compilation = compile_for(arch, program, shapes, compiler_options=COMPILER_OPTIONS, keep_unused=True)
    return Program(compilation, Executable(compilation.serialized, arch, edit), compilation.compiled.out_info)


def run_on(arch: str, f: Callable[..., Any], *args: Any, options: Options = IN_ORDER) -> tuple[Any, Report]:
    """Compiles `f` for an arch of `ARCHS` and runs it on `args`.

    Returns:
      its results, numpy arrays in its tree, and what ran.

    Raises:
      amd.emulator.EmulatorError: the program did something wrong, or something that the emulator does not know.
    """
    return compile_on(arch, f, *args).run(*args, options=options)


def _array(data: np.ndarray, leaf: Any) -> np.ndarray:
    dtype = np.dtype(leaf.dtype)
    return data[: int(np.prod(leaf.shape)) * dtype.itemsize].view(dtype).reshape(leaf.shape).copy()
