"""Programs compiled by XLA for gfx942 and gfx950, executed in the emulator, against JAX on the CPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from tinygrad.renderer.amd import decode_inst

from amd.emulator import Options, load_kernel
from amd.emulator.instruction import decode
from amd.harness import ARCHS, Program, compile_on, run_on
from amd.programs import examples

# Pallas's Triton lowering, which JAX has deprecated.
pytestmark = [pytest.mark.amd, pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")]

EXAMPLES = examples()
FAST = {
    "gfx942": ("rope", "sample", "matmul_f16", "matmul_fp8_fnuz", "cross_entropy", "attention", "add_rms_norm", "scan")
    + ("int4_g64_min_product", "int4_g64_min_kernel"),
    "gfx950": ("int8_kernel", "argmax", "matmul_bf16", "matmul_fp8_ocp", "cache_update", "attention"),
}
FAILS = {
    (
        "gfx950",
        "fp8_g128_product",
    ): "a sum of float8_e4m3fn is NaN, by XLA or the emulator"
}


def marks(arch: str, name: str) -> list[pytest.MarkDecorator]:
    known = [pytest.mark.xfail(reason=FAILS[arch, name])] if (arch, name) in FAILS else []
    return known + ([] if name in FAST[arch] else [pytest.mark.slow])


CASES = [pytest.param(arch, name, marks=marks(arch, name), id=f"{name}-{arch}") for arch in ARCHS for name in EXAMPLES]


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Every array within `tolerance` of the largest expected value; equal where that is 0."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        want = np.asarray(want)
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        if not tolerance:
            np.testing.assert_array_equal(got, want)
            continue
        got, want = got.astype(np.float64), want.astype(np.float64)
        assert np.isfinite(got).all()
        assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def assert_same_bits(actual: Any, expected: Any) -> None:
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert got.tobytes() == want.tobytes()


@pytest.mark.sampled(3)
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "name"), CASES)
def test_results_and_order_of_waves(arch: str, name: str) -> None:
    """Within the tolerance, and bit for bit the same in whatever order waves run."""
    example = EXAMPLES[name]()
    program = compile_on(arch, example.f, *example.args)
    got, report = program.run(*example.args)
    assert_close(got, example.expected(), example.tolerance)
    compiled = {kernel.name for kernel in program.compilation.kernels}
    assert set(report.kernels) <= compiled  # a loop whose length is known never runs its condition
    assert report.wave_instructions > 0
    shuffled, again = program.run(*example.args, options=Options(seed=5))
    assert_same_bits(shuffled, got)
    assert again.wave_instructions == report.wave_instructions


@pytest.fixture(scope="module")
def attention() -> Program:
    example = EXAMPLES["attention"]()
    return compile_on("gfx942", example.f, *example.args)


def test_portions_make_no_difference(attention: Program) -> None:
    """Few waves at a time or many."""
    args = EXAMPLES["attention"]().args
    few, _ = attention.run(*args, options=Options(waves=8))
    many, _ = attention.run(*args, options=Options(waves=2048))
    assert_same_bits(few, many)


def test_instructions_are_decoded_as_tinygrad_decodes_them(attention: Program) -> None:
    seen = 0
    for kernel in attention.compilation.kernels:
        code = load_kernel(kernel.elf, kernel.name)
        pc = code.entry
        while True:
            own, other = decode(code.image, pc), decode_inst(code.image[pc : pc + 16], "cdna")
            assert own.name == other.op.name.removesuffix("_E32").removesuffix("_E64")
            assert (own.size, own.format) == (other.size(), type(other).__name__.partition("_")[0])
            pc += own.size
            seen += 1
            if own.name == "S_ENDPGM":
                break
    assert seen > 500


@pytest.mark.slow  # the compiler takes its time over 512 registers
@pytest.mark.parametrize("arch", ARCHS)
def test_spilled_registers(arch: str) -> None:
    """One wave that holds more numbers than it has registers: the rest goes to scratch memory and comes back."""

    def normalise(x_ref, out_ref):  # type: ignore[no-untyped-def]
        x = x_ref[...]
        out_ref[...] = x / jnp.sum(x)

    def f(x: jax.Array) -> jax.Array:
        one_wave = plgpu.CompilerParams(num_warps=1)
        return pl.pallas_call(normalise, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), compiler_params=one_wave)(x)

    x = np.random.default_rng(0).random(1 << 15).astype(np.float32)
    program = compile_on(arch, f, x)
    assert program.compilation.kernels[0].scratch_bytes > 0
    got, _ = program.run(x)
    np.testing.assert_allclose(got, x / x.sum(), rtol=1e-6)


def test_limit() -> None:
    with pytest.raises(RuntimeError, match="more than 100 wave instructions"):
        run_on("gfx942", lambda x: x + 1, np.zeros(1 << 16, np.float32), options=Options(limit=100))
