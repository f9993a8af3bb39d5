"""Decode attention in Triton's own language: compiled for AMD GPUs, executed on an emulated one, lowered in JAX."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from triton_calls import compile_launch, lowered_for_gfx942, needs_triton, no_compilation_cache, triton

from llama_jax.kernels.attention.cases import arguments
from llama_jax.kernels.attention.decode import call as calls
from llama_jax.kernels.attention.decode import decode_attention, jax_triton, partition
from llama_jax.kernels.attention.decode.tiles import default_tiles
from llama_jax.kernels.attention.reference import attention_reference, visible
from llama_jax.kernels.attention.shapes import DECODES
from llama_jax.kernels.dispatch import jax_triton as shared
from llama_jax.kernels.dispatch.cases import Case
from llama_jax.kernels.dispatch.jax_triton import Launch
from llama_jax.targets import abstract_device, find


@pytest.fixture(autouse=True)
def without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if triton:
        monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    with no_compilation_cache():
        yield


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "find_spec", lambda name: object())
    monkeypatch.setattr(shared, "version", lambda name: "3.9.0")
    structs = {"q": jax.ShapeDtypeStruct((2, 1, 8, 64), jnp.bfloat16)}
    structs |= {n: jax.ShapeDtypeStruct((2, 2, 64, 64), jnp.bfloat16) for n in "kv"}
    structs |= {"q_positions": jax.ShapeDtypeStruct((2, 1), jnp.int32)}
    structs |= {"kv_positions": jax.ShapeDtypeStruct((2, 64), jnp.int32)}
    why = partial(decode_attention.backends["jax_triton"].unsupported, find("mi300x"))
    call = arguments(**structs, **DECODES[0].options())
    assert why(**call) is None
    assert "needs a GPU" in str(decode_attention.backends["jax_triton"].unsupported(find("cpu"), **call))
    wide = call | {"q": jax.ShapeDtypeStruct((2, 9, 8, 64), jnp.bfloat16)}
    assert "9 queries" in str(why(**wide))


def call_of(arguments: dict[str, Any]) -> calls.Call:
    """With the tiles that an MI300X gets."""
    target, q, kv = find("mi300x"), arguments["q"], arguments["kv"]
    rows = q.shape[2] // kv.k.shape[1] * q.shape[1]
    slots = arguments["places"].kv_positions.shape[1]
    tiles = default_tiles(target, rows=rows, head_dim=q.shape[3], itemsize=q.dtype.itemsize, slots=slots)
    with abstract_device(target):
        return calls.Call.of(arguments["rule"], tiles, q, kv, arguments["places"])


def emulate(kernel: Any, name: str, how: Launch) -> list[np.ndarray]:
    """The results of a launch on an emulated gfx942; NaN where nothing was written."""
    from amd.emulator import Kernel, Options, Region, load_kernel
    from amd.emulator import Launch as Grid

    compiled = compile_launch(kernel, how, "gfx942")
    inputs = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in how.arrays]
    results = [np.full(x.shape, np.nan, x.dtype) for x in how.out]
    # Regions are of whole words, of which the last may reach past what the kernel may touch.
    regions = [Region(f"input {i}", np.pad(x, (0, -x.size % 4)), x.size) for i, x in enumerate(inputs)]
    regions += [Region(f"result {i}", x.reshape(-1).view(np.uint8), x.nbytes) for i, x in enumerate(results)]
    grid = Grid(how.grid, (64 * how.num_warps, 1, 1), compiled.metadata.shared)
    Kernel(load_kernel(compiled.asm["hsaco"], name), "gfx942").launch(grid, regions, Options())
    return results


@needs_triton
@pytest.mark.amd
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if c.quick else pytest.mark.slow, id=c.name) for c in decode_attention.cases()],
)
def test_on_an_emulated_gpu(case: Case) -> None:
    """Masks, layouts and heads of all kinds, against the reference in float32."""
    from llama_jax.kernels.attention.decode import triton_kernel as kernels

    given = case.arguments(case.example())
    q, kv, places, rule = (given[name] for name in ("q", "kv", "places", "rule"))
    call = call_of(given)
    ranges = partition.visible_slots(places.q_positions, places.kv_positions, rule.visibility)
    cut = partition.shares(*ranges, call.cut, call.most_shares)
    shares = jax_triton.shares_launch(call, cut, q, kv, places)
    part, lse = map(jnp.asarray, emulate(kernels.decode_attention_shares, "decode_attention_shares", shares))
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    combine = jax_triton.combine_launch(call, cut, part, lse, given["sinks"], out)
    (got,) = emulate(kernels.decode_attention_combine, "decode_attention_combine", combine)

    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, kv)
    want = attention_reference(q.astype(jnp.float32), wide, places, rule, sinks=given["sinks"])
    real = np.asarray(visible(places, rule.visibility).any(axis=2))
    error = np.linalg.norm(got.astype(np.float32) - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert real.any()
    assert error[real].max() < 5e-3
    assert (got[~real].astype(np.float32) == 0).all() or given["sinks"] is not None


@needs_triton
@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx950"])
@pytest.mark.parametrize(
    "name",
    ["llama-3.1-8b-b8-s4096-paged-16", "llama-3.2-1b-b8-s4096", "gemma-2-9b-heads"]
    + ["llama-3.1-8b-int8-b8-s4096-paged-16"],
)
def test_compiles_for_amd(arch: str, name: str) -> None:
    """No spills, no more local memory than there is, matrix instructions."""
    from llama_jax.kernels.attention.decode import triton_kernel as kernels

    case = next(case for case in decode_attention.models(None) if case.name == name)
    given = case.arguments(case.abstract())
    q, kv, places = (given[name] for name in ("q", "kv", "places"))
    call = call_of(given)
    rows = jax.ShapeDtypeStruct((q.shape[0],), jnp.int32)
    cut = jax.eval_shape(lambda *rows: partition.shares(*rows, call.cut, call.most_shares), rows, rows)
    shares = jax_triton.shares_launch(call, cut, q, kv, places)
    combine = jax_triton.combine_launch(call, cut, *shares.out, given["sinks"], q)
    for kernel, how in ((kernels.decode_attention_shares, shares), (kernels.decode_attention_combine, combine)):
        compiled = compile_launch(kernel, how, arch)
        assembly = compiled.asm["amdgcn"]
        assert re.findall(r"\.[vs]gpr_spill_count:\s*(\d+)", assembly) == ["0", "0"]
        assert compiled.metadata.shared <= find(arch).lds_bytes
        assert ("v_mfma" in assembly) == (how is shares)


@needs_triton
def test_lowers_in_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole operation is a program with two kernels, compiled for gfx942; the cache goes in as it lies."""
    shape = next(shape for shape in DECODES if shape.name == "llama-3.1-8b-b8-s4096-paged-16")

    def run(**arrays: jax.Array) -> jax.Array:
        return decode_attention(**arguments(**arrays, **shape.options()), backend="jax_triton")

    text, kernels = lowered_for_gfx942(run, shape.arguments(), monkeypatch)
    assert len([line for line in text.splitlines() if "triton_kernel_call_ffi" in line]) == 2
    assert "transpose" not in text
    assert [(warps, shared <= 65536, elf[:4]) for warps, shared, elf in kernels] == [
        (1, True, b"\x7fELF"),
        (4, True, b"\x7fELF"),
    ]
