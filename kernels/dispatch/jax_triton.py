"""Code shared by the backends `jax_triton`: where they run, and the call.

JAX has deprecated Pallas-Triton; this is the road once it is gone, for kernels in Triton's own language. It needs the
extra `triton`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import jax

from llama_jax.targets import Target, current

OLDEST_TRITON = (3, 7)
"""The oldest triton that jax-triton 0.4 works with; it fails midway with the older ones that PyTorch installs."""


@dataclass(frozen=True)
class Launch:
    """The arguments of a kernel's call.

    Attributes:
      arrays: in the order of the kernel's parameters, before its results.
      constants: its compile-time parameters.
      out: shape and dtype of each result.
      num_warps, num_stages: waves of a program, and steps of a loop that overlap.
      fused: whether a product and a sum may be rounded once. Not where a sum over lanes is of products: each lane would
        fuse its own, and lanes that should hold one sum hold several, which differ in the last bit.
    """

    arrays: tuple[jax.Array, ...]
    constants: Mapping[str, Any]
    out: Sequence[jax.ShapeDtypeStruct]
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    fused: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """The options that the kernel is compiled with."""
        # Said always: Triton fuses by default up to 3.9 only.
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.fused}


def unsupported(target: Target) -> str | None:
    """The reason no kernel can run on `target` through jax-triton, or None."""
    if target.vendor == "cpu":
        return "it needs a GPU"
    if find_spec("jax_triton") is None or find_spec("triton") is None:
        return "jax-triton is not installed (pip install 'llama-jax[triton]')"
    if (found := _triton_version()) and found < OLDEST_TRITON:
        needed, installed = (".".join(map(str, numbers)) for numbers in (OLDEST_TRITON, found))
        return f"jax-triton needs triton {needed} or newer; {installed} is installed"
    if target.vendor == "amd" and target.wave_size != 64:
        return "jaxlib launches kernels of jax-triton with waves of 64 threads"
    if target.vendor == "amd" and jax.config.jax_compilation_cache_dir:
        # The program names a file with the kernel, which is deleted once it has been read.
        return "jax keeps compiled programs on disk (JAX_COMPILATION_CACHE_DIR), and these cannot be kept"
    return None


def _triton_version() -> tuple[int, ...] | None:
    """The first two numbers; None of a Triton that was installed under another name, such as pytorch-triton-rocm."""
    try:
        return tuple(int(number) for number in re.findall(r"\d+", version("triton"))[:2])
    except PackageNotFoundError:
        return None


def call(kernel: Any, name: str, how: Launch) -> list[jax.Array]:
    """The kernel's results; `name` is what it is called in profiles."""
    import jax_triton

    if current().vendor == "amd":
        _complete_triton_for_amd()
    return list(
        jax_triton.triton_call(
            *how.arrays,
            kernel=kernel,
            out_type=tuple(how.out),
            grid=how.grid,
            name=name,
            backend_options=how.options,
            **how.constants,
        )
    )


@functools.cache
def _complete_triton_for_amd() -> None:
    """jax-triton 0.4.1 starts compiling with nothing in `metadata`; Triton 3.7 to 3.9 looks for `num_ctas` there."""
    from triton.backends.amd.compiler import HIPBackend

    make_llir = HIPBackend.make_llir

    def complete(src: Any, metadata: dict[str, Any], options: Any) -> Any:
        metadata.setdefault("num_ctas", options.num_ctas)
        return make_llir(src, metadata, options)

    HIPBackend.make_llir = staticmethod(complete)
