"""Routed experts through jax-triton: the grouped products and tiles of Pallas-Triton, with an `@triton.jit` kernel.

JAX has deprecated Pallas-Triton; this is the road once it is gone. Needs the extra `triton`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.moe import products
from llama_jax.kernels.moe.reference import Activation
from llama_jax.kernels.moe.schedule import Schedule
from llama_jax.kernels.moe.tiles import Cut, Tiles
from llama_jax.targets import Target, current

# The kernel is written in another language, so an activation has to be known to it by name.
ACTIVATIONS: dict[Activation | None, str] = {None: "none", jax.nn.silu: "silu", jax.nn.relu: "relu"}

OLDEST_TRITON = (3, 7)
"""What jax-triton 0.4 asks of triton; PyTorch brings older ones, with which it fails in the middle."""


def _triton_version() -> tuple[int, ...] | None:
    """The first two numbers; None of a Triton that was installed under another name, such as pytorch-triton-rocm."""
    try:
        return tuple(int(number) for number in re.findall(r"\d+", version("triton"))[:2])
    except PackageNotFoundError:
        return None


def unsupported(
    target: Target,
    x: jax.Array,
    expert_ids: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    activation: Activation,
    tiles: Tiles | None = None,
    **scales: Any,
) -> str | None:
    """Why this backend cannot run a call on `target`, or None."""
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
    if reason := products.unsupported(target, x, expert_ids, gate, up, down):
        return reason
    if activation not in ACTIVATIONS:
        return f"the kernel knows no such activation, only {', '.join(list(ACTIVATIONS.values())[1:])}"
    if tiles is not None and not tiles.fits(target, x.dtype.itemsize):
        return (
            f"the tiles take {tiles.lds_bytes(target, x.dtype.itemsize)} bytes of local memory, of {target.lds_bytes}"
        )
    return None


def kernel_arguments(
    x: jax.Array,
    weights: Sequence[jax.Array],
    schedule: Schedule,
    activation: Activation | None,
    scale: jax.Array | None,
    cut: Cut,
) -> tuple[tuple[jax.Array, ...], dict[str, Any], jax.ShapeDtypeStruct, tuple[int, int, int]]:
    """What `triton_kernel.moe_grouped` is called with: arrays, compile-time constants, its result, its grid."""
    pairs = schedule.order.shape[0]
    _, columns, inner = weights[0].shape
    steps = -(-inner // (cut.inner * cut.splits))
    # The kernel has a fixed number of arguments: x stands in for those that it will not read.
    arrays = (*schedule, x, weights[0], weights[-1], x if scale is None else scale)
    constants = {
        "PAIRS": pairs,
        "DIVISOR": pairs // x.shape[0],
        "COLUMNS": columns,
        "INNER": inner,
        "ROWS": cut.rows,
        "COLS": cut.cols,
        "STEP": cut.inner,
        "STEPS": steps,
        "SCALED": scale is not None,
        "ACTIVATION": ACTIVATIONS[activation],
        "COLS_RAGGED": columns % cut.cols != 0,
        "INNER_RAGGED": cut.splits * steps * cut.inner != inner,
    }
    out = jax.ShapeDtypeStruct((cut.splits, pairs, columns), jnp.float32 if cut.splits > 1 else x.dtype)
    return arrays, constants, out, (schedule.expert.shape[0], -(-columns // cut.cols), cut.splits)


def grouped_product(
    name: str,
    x: jax.Array,
    weights: Sequence[jax.Array],
    schedule: Schedule,
    activation: Activation | None,
    scale: jax.Array | None,
    cut: Cut,
) -> jax.Array:
    """See `llama_jax.kernels.moe.products.GroupedProduct`."""
    import jax_triton

    from llama_jax.kernels.moe.triton_kernel import moe_grouped

    if current().vendor == "amd":
        _complete_triton_for_amd()
    arrays, constants, out, grid = kernel_arguments(x, weights, schedule, activation, scale, cut)
    return jax_triton.triton_call(
        *arrays,
        kernel=moe_grouped,
        out_type=out,
        grid=grid,
        name=name,
        backend_options=compile_options(cut),
        **constants,
    )


def compile_options(cut: Cut) -> dict[str, Any]:
    """What the kernel is compiled with."""
    # Fused multiply-adds are Triton's default up to 3.9 only.
    return {"num_warps": cut.num_warps, "num_stages": cut.num_stages, "enable_fp_fusion": True}


@functools.cache
def _complete_triton_for_amd() -> None:
    """jax-triton 0.4.1 starts compiling with nothing in `metadata`; Triton 3.7 to 3.9 looks for `num_ctas` there."""
    from triton.backends.amd.compiler import HIPBackend

    make_llir = HIPBackend.make_llir

    def complete(src: Any, metadata: dict[str, Any], options: Any) -> Any:
        metadata.setdefault("num_ctas", options.num_ctas)
        return make_llir(src, metadata, options)

    HIPBackend.make_llir = staticmethod(complete)


def run(*args: jax.Array, **options: Any) -> jax.Array:
    """`llama_jax.kernels.moe.routed_experts` with the keyword `tiles`: how to cut the products, or None."""
    return products.run(*args, product=grouped_product, **options)
