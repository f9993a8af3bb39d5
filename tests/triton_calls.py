"""Kernels in Triton's own language, compiled by the package `triton` for AMD GPUs that are not here.

The package is large, and so an extra; tests that need it are marked `needs_triton`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from llama_jax.kernels.dispatch.jax_triton import Launch

try:
    import jax_triton as package
    import triton
except ImportError:
    package = triton = None

needs_triton = pytest.mark.skipif(package is None, reason="needs the extra 'triton'")
TYPES = {"int8": "*i8", "bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32"}


def compile_launch(kernel: Any, how: Launch, arch: str) -> Any:
    """The result of `triton.compile` for a launch, as jax-triton calls it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, arrays = kernel.arg_names, (*how.arrays, *how.out)
    source = ASTSource(
        kernel,
        signature={name: TYPES[a.dtype.name] for name, a in zip(names, arrays, strict=False)}
        | dict.fromkeys(how.constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in how.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(arrays))},
    )
    target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    return triton.compile(source, target=target, options=how.options)


@contextmanager
def no_compilation_cache() -> Iterator[None]:
    """Which the other tests keep compiled programs in."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", folder)


def lowered_for_gfx942(
    f: Callable[..., Any], arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, list[tuple[int, int, bytes]]]:
    """The program as text, and its kernels: waves, local memory, machine code."""
    kernels = []

    def kernel(name: str, num_warps: int, num_ctas: int, shared: int, path: str, *rest: Any) -> str:
        kernels.append((num_warps, shared, Path(path).read_bytes()))
        return name

    # jaxlib has this for the GPUs of the machine only; what it is given is all that matters here.
    library = SimpleNamespace(
        get_arch_details=lambda device: "gfx942:sramecc+:xnack-",
        create_array_parameter=lambda *args: args,
        TritonKernel=kernel,
        TritonKernelCall=lambda *args: SimpleNamespace(to_proto=lambda name, metadata: name.encode()),
    )
    monkeypatch.setattr(package.triton_lib, "triton_kernel_call_lib", library)
    device = AbstractDevice(device_kind="gfx942", num_cores=304, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with use_abstract_mesh(mesh):
        text = jax.jit(f).trace(**arguments).lower(lowering_platforms=("rocm",)).as_text()
    return text, kernels
