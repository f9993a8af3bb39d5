"""The routed experts in Triton's own language: interpreted, compiled for AMD GPUs that are not here, lowered in JAX.

The package `triton` is large, and so an extra; without it most of this is skipped.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from triton_calls import compile_launch, lowered_for_gfx942, needs_triton, no_compilation_cache, triton

from llama_jax.kernels.dispatch import jax_triton as shared
from llama_jax.kernels.moe import jax_triton, products, routed_experts
from llama_jax.kernels.moe.schedule import schedule
from llama_jax.kernels.moe.shapes import SHAPES, MoeShape
from llama_jax.kernels.moe.tiles import Tiles, default_tiles
from llama_jax.targets import find

SHAPE = MoeShape(8, 2, 4096, 14336, "output").arguments(64)


@pytest.fixture(autouse=True)
def without_a_cache() -> Iterator[None]:
    with no_compilation_cache():
        yield


@pytest.mark.parametrize(
    ("installed", "target", "change", "reason"),
    [
        ("3.7.0", "cpu", {}, "needs a GPU"),
        (None, "mi300x", {}, "jax-triton is not installed (pip install 'llama-jax[triton]')"),
        ("3.6.0", "h100", {}, "jax-triton needs triton 3.7 or newer; 3.6 is installed"),
        ("3.7.0", "rx7900xtx", {}, "waves of 64"),
        ("3.7.0", "mi300x", {"activation": jnp.tanh}, "only silu, relu"),
        ("3.7.0", "mi300x", {"up": jax.ShapeDtypeStruct((8, 14336, 4096), jnp.int8)}, "one dtype"),
        ("3.7.0", "mi300x", {"tiles": Tiles(128, 128, 128, 256, 64, 1, 8, 2)}, "98304 bytes"),
        ("3.10.1", "mi300x", {}, None),
        ("3.8rc1", "mi300x", {}, None),
        ("pytorch-triton-rocm", "mi300x", {}, None),
    ],
)
def test_limits(installed: str | None, target: str, change: dict, reason: str | None, monkeypatch: Any) -> None:
    monkeypatch.setattr(shared, "find_spec", lambda name: object() if installed else None)

    def version(name: str) -> str | None:
        if installed == "pytorch-triton-rocm":
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(shared, "version", version)
    found = jax_triton.unsupported(find(target), **SHAPE | {"activation": jax.nn.silu} | change)
    assert (reason is None) == (found is None)
    assert reason is None or reason in (found or "")


def test_compiled_programs_must_not_be_kept_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "find_spec", lambda name: object())
    monkeypatch.setattr(shared, "version", lambda name: "3.7.0")
    jax.config.update("jax_compilation_cache_dir", "/somewhere")
    check = functools.partial(jax_triton.unsupported, **SHAPE, activation=jax.nn.silu)
    assert "JAX_COMPILATION_CACHE_DIR" in (check(find("mi300x")) or "")
    assert check(find("h100")) is None


class Buffer:
    """A tensor as Triton's interpreter needs it, around an array."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = triton.runtime.jit.type_canonicalisation_dict[array.dtype.name.replace("float", "fp")]

    def data_ptr(self) -> int:
        return self.array.ctypes.data


def interpreted(
    name: str, x: Any, weights: Any, plan: Any, activation: Any, scale: Any, cut: Any, grid_log: list
) -> np.ndarray:
    """`jax_triton.grouped_product`, in Triton's interpreter."""
    from triton.runtime.interpreter import GridExecutor

    from llama_jax.kernels.moe.triton_kernel import moe_grouped

    how = jax_triton.launch(x, weights, plan, activation, scale, cut)
    result = np.full(how.out[0].shape, np.nan, how.out[0].dtype)
    run = GridExecutor(moe_grouped.fn, moe_grouped.arg_names, how.grid)
    # Its copies to and from a device need more of a tensor than there is, and the arrays are on the host.
    run._init_args_hst = lambda args, kwargs: (args, kwargs)
    run._restore_args_dev = lambda *args: None
    run(*(Buffer(np.array(a)) for a in how.arrays), Buffer(result), **how.constants)
    grid_log.append(how.grid)
    return result


@needs_triton
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "hidden", "width", "tiles"),
    [
        (3, 2, 4, 32, 48, Tiles(16, 16, 16, 16, 16, 1, 4, 1)),
        (40, 1, 3, 40, 24, Tiles(16, 32, 32, 16, 32, 2, 4, 1)),
        (9, 3, 5, 64, 33, Tiles(16, 16, 16, 32, 16, 3, 4, 1)),
    ],
)
def test_against_the_reference(
    tokens: int, top_k: int, experts: int, hidden: int, width: int, tiles: Tiles, monkeypatch: Any
) -> None:
    rng = np.random.default_rng(tokens)
    shapes = {"x": (tokens, hidden), "gate": (experts, width, hidden), "up": (experts, width, hidden)}
    shapes |= {"down": (experts, hidden, width), "input_scale": (tokens, top_k), "output_scale": (tokens, top_k)}
    args: dict[str, Any] = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    args["expert_ids"] = rng.integers(0, experts, (tokens, top_k), np.int32)
    grids: list = []
    for activation in (jax.nn.silu, jax.nn.relu):
        product = functools.partial(interpreted, grid_log=grids)
        out = products.run(**args, product=product, activation=activation, tiles=tiles)
        expected = routed_experts(**args, activation=activation, backend="reference")
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert len(grids) == 4


@needs_triton
@pytest.mark.parametrize("tokens", [1, 4096])
@pytest.mark.parametrize("name", ["mi300x", "mi355x", "rx7900xtx"])
def test_compiles_for_amd(name: str, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No spills, no more local memory than there is, matrix instructions; with the tiles that it gets by default."""
    from llama_jax.kernels.moe.triton_kernel import moe_grouped

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    target, shape = find(name), SHAPES[0]
    pairs = tokens * shape.top_k
    sizes = {"experts": shape.experts, "hidden": shape.hidden, "intermediate": shape.intermediate}
    tiles = default_tiles(target, pairs=pairs, **sizes)
    args = shape.arguments(tokens)
    plan = jax.eval_shape(lambda ids: schedule(ids, shape.experts, tiles.rows), args["expert_ids"])
    scale = jax.ShapeDtypeStruct((pairs,), jnp.float32)
    inner = jax.ShapeDtypeStruct((pairs, shape.intermediate), jnp.bfloat16)
    for x, weights, activation, cut in (
        (args["x"], (args["gate"], args["up"]), jax.nn.silu, tiles.up),
        (inner, (args["down"],), None, tiles.down),
    ):
        how = jax_triton.launch(x, weights, plan, activation, scale, cut)
        kernel = compile_launch(moe_grouped, how, target.arch)
        assembly = kernel.asm["amdgcn"]
        assert re.findall(r"\.vgpr_spill_count:\s*(\d+)", assembly) == ["0"]
        assert re.findall(r"\.sgpr_spill_count:\s*(\d+)", assembly) == ["0"]
        assert kernel.metadata.shared <= target.lds_bytes
        assert re.search(r"v_s?mfma|v_wmma", assembly)


@needs_triton
def test_lowers_in_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole operation becomes a program with two kernels, compiled for gfx942, and the weights as they lie."""
    call = functools.partial(routed_experts, activation=jax.nn.silu, backend="jax_triton")
    text, kernels = lowered_for_gfx942(call, SHAPES[0].arguments(1), monkeypatch)
    calls = [line for line in text.splitlines() if "triton_kernel_call_ffi" in line]
    assert ["8x14336x4096xbf16" in line for line in calls] == [True, False]
    assert "8x4096x14336xbf16" in calls[1]
    assert "transpose" not in text
    assert [(warps, shared <= 65536, elf[:4]) for warps, shared, elf in kernels] == [(2, True, b"\x7fELF")] * 2
