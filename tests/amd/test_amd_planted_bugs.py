"""Kernels with one thing wrong: each is found, and the same kernel without it passes."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from amd.emulator import Fault, KernelCode, Options
from amd.emulator.instruction import decode
from amd.harness import ARCHS, compile_on, run_on

# Pallas's Triton lowering, which JAX has deprecated.
pytestmark = [pytest.mark.amd, pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")]

ROWS, LENGTH, BLOCK = 4, 100, 128
RNG = np.random.default_rng(0)


def softmax(x: jax.Array, *, load: int = LENGTH, keep: int = LENGTH, num_warps: int = 4) -> jax.Array:
    """Softmax of each row of x [ROWS, LENGTH] in a block of 128: `load` elements are read, `keep` of them count."""

    def row_softmax(x_ref, out_ref):  # type: ignore[no-untyped-def]
        column = jnp.arange(BLOCK)
        row = plgpu.load(x_ref.at[pl.program_id(0), column], mask=column < load, other=-jnp.inf)
        row = jnp.where(column < keep, row, -jnp.inf)
        weights = jnp.exp(row - jnp.max(row))
        plgpu.store(out_ref.at[pl.program_id(0), column], weights / jnp.sum(weights), mask=column < LENGTH)

    return pl.pallas_call(
        row_softmax,
        grid=(ROWS,),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=num_warps),
        name="row_softmax",
    )(x)


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """x @ y [64, 64] in one work-group of four waves, through local memory."""

    def product(x_ref, y_ref, out_ref):  # type: ignore[no-untyped-def]
        out_ref[...] = plgpu.dot(x_ref[...], y_ref[...])

    out = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    return pl.pallas_call(product, out_shape=out, compiler_params=plgpu.CompilerParams(num_warps=4), name="product")(
        x, y
    )


X = RNG.standard_normal((ROWS, LENGTH)).astype(np.float32)
TILES = tuple(RNG.standard_normal((64, 64)).astype(jnp.bfloat16) for _ in range(2))


@pytest.mark.parametrize("arch", ARCHS)
def test_sound_kernels_pass(arch: str) -> None:
    got, report = run_on(arch, softmax, X)
    np.testing.assert_allclose(got, jax.nn.softmax(X), rtol=1e-5)
    assert report.kernels == {"row_softmax": 1}
    got, _ = run_on(arch, matmul, *TILES)
    want = TILES[0].astype(np.float32) @ TILES[1].astype(np.float32)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_read_out_of_bounds(arch: str) -> None:
    """The mask of a load lets the last row read behind the array; what it reads would not even count."""
    with pytest.raises(Fault, match=rf"of argument 0, {X.nbytes} bytes long\n  kernel row_softmax, pc 0x\w+: "):
        run_on(arch, partial(softmax, load=BLOCK), X)


@pytest.mark.parametrize("arch", ARCHS)
def test_wrong_mask(arch: str) -> None:
    """One element too few: nothing is out of bounds, the numbers are wrong."""
    got, _ = run_on(arch, partial(softmax, keep=LENGTH - 1), X)
    assert np.isfinite(got).all()
    assert np.abs(got - np.asarray(jax.nn.softmax(X))).max() > 1e-3
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(got, jax.nn.softmax(X), rtol=1e-5)


def without_barriers(code: KernelCode) -> KernelCode:
    """S_BARRIER becomes S_NOP."""
    image, pc, removed = bytearray(code.image), code.entry, 0
    while (x := decode(code.image, pc)).name != "S_ENDPGM":
        if x.name == "S_BARRIER":
            image[pc : pc + 4] = bytes.fromhex("000080bf")
            removed += 1
        pc += x.size
    assert removed
    return dataclasses.replace(code, image=bytes(image))


@pytest.mark.parametrize("arch", ARCHS)
def test_missing_barrier(arch: str) -> None:
    """Found by the bookkeeping in any order of waves; without it by results that depend on the order."""
    broken = compile_on(arch, matmul, *TILES, edit=without_barriers)
    for seed in (None, 1):
        with pytest.raises(Fault, match=r"LDS (race|read) at \d+"):
            broken.run(*TILES, options=Options(seed=seed))
    in_order, _ = broken.run(*TILES, options=Options(check_races=False))
    orders = [broken.run(*TILES, options=Options(check_races=False, seed=seed))[0] for seed in range(3)]
    assert any((got != in_order).any() for got in orders)
