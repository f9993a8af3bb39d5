"""Products with quantised weights: kernels against the decoded weight in float64, and what they are made of."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import error, random_tokens, run

from llama_jax.config import preset
from llama_jax.errors import KernelError
from llama_jax.kernels import report
from llama_jax.kernels.dispatch import using
from llama_jax.kernels.quantized_matmul import kernel, pallas_triton, quantized_matmul, quantized_matmul_op, unpack
from llama_jax.kernels.quantized_matmul.cases import product_cases, product_models, product_shape
from llama_jax.kernels.quantized_matmul.decoding import decoded
from llama_jax.kernels.quantized_matmul.operands import Weight
from llama_jax.kernels.quantized_matmul.shapes import MEASURED, SHAPES, ProductShape, layout_of
from llama_jax.kernels.quantized_matmul.shifts import Shifts, shifts_of
from llama_jax.kernels.quantized_matmul.tiles import CHUNK, Tiles, candidates, default_tiles, matrix_rows
from llama_jax.kernels.quantized_matmul.unpack import AMD, ANYWHERE, FIELDS, FLOATS, NVIDIA, Field, Words
from llama_jax.model.fuse import fuse_params
from llama_jax.model.quantization import dequantize_params, quantize_params
from llama_jax.params import init_params
from llama_jax.quantized import codes
from llama_jax.recipe import recipe
from llama_jax.targets import TARGETS, find

GPUS = [target for target in TARGETS if target.vendor != "cpu"]
KERNEL = partial(pallas_triton.run, dtype=jnp.float32, interpret=True)


def example(layout: str, rows: int, out: int, inner: int, dtype: str = "bfloat16") -> tuple[jax.Array, dict[str, Any]]:
    arrays = ProductShape(layout, rows, out, inner, dtype).example(jax.random.key(rows + out))
    return arrays.pop("x"), arrays


def exact(x: jax.Array, members: dict[str, Any], layout: str) -> np.ndarray:
    weight = np.asarray(codes.decode(layout_of(layout), members, jnp.float32), np.float64)
    return np.einsum("...i,oi->...o", np.asarray(x.astype(jnp.float32), np.float64), weight)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("layout", ["int8", "int8_g32", "int4_g32", "int4_g64_min", "int4_g128_zero"])
def test_against_float64(layout: str, rows: int) -> None:
    x, members = example(layout, rows, 40, 640)
    found = KERNEL(x, members, layout=layout_of(layout))
    assert error(found, exact(x, members, layout)) < 1e-4


@pytest.mark.parametrize("layout", ["int8", "int4_g32_min"])
def test_every_code_has_its_place(layout: str) -> None:
    """The product with an identity matrix is the decoded weight, number by number."""
    _, members = example(layout, 1, 24, 64)
    found = KERNEL(jnp.eye(64, dtype=jnp.bfloat16), members, layout=layout_of(layout))
    weight = codes.decode(layout_of(layout), members, jnp.float32)
    step = np.asarray(members["scales"], np.float32).min()
    assert np.abs(np.asarray(found).T - np.asarray(weight)).max() < 1e-2 * step


def test_a_mean_is_no_error() -> None:
    """The number that codes are counted from as floats is subtracted exactly enough where x is far from zero."""
    for rows in (1, 16):
        x, members = example("int4_g64_zero", rows, 32, 256)
        x = x + 20
        found = KERNEL(x, members, layout=layout_of("int4_g64_zero"))
        assert error(found, exact(x, members, "int4_g64_zero")) < 1e-4


@pytest.mark.parametrize("way", [ANYWHERE, AMD], ids=["anywhere", "amd"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("width", [4, 64])
def test_codes_are_exact(way: Words, dtype: str, width: int) -> None:
    """All that a byte can be, in eight bits; and in four all bytes in all places of a word, less what is added."""
    stored = np.random.default_rng(0).permuted(np.tile(np.arange(256, dtype=np.uint8), (16, 1)), axis=1)
    (whole,) = way.parts(jnp.asarray(stored.view(np.int8)), dtype)
    assert way.added("int8", dtype) == 0
    np.testing.assert_array_equal(whole.astype(jnp.int32), stored.view(np.int8))
    words = stored.view(np.int32).reshape(-1, width)
    parts, added = way.parts(jnp.asarray(words), dtype), way.added(words.dtype, dtype)
    assert parts[0].shape == (len(words), 8 * width // len(parts))
    low_first = np.stack([stored & 15, stored >> 4], axis=-1).reshape(len(words), -1).astype(np.int32)
    codes = np.where(low_first > 7, low_first - 16, low_first)
    for n, part in enumerate(parts):
        assert part.dtype == dtype
        np.testing.assert_array_equal(part.astype(jnp.int32) - added, codes[:, n :: len(parts)])


@pytest.mark.parametrize("kind", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("stored", FIELDS)
def test_what_the_instructions_multiply_and_add(stored: str, kind: Any) -> None:
    """The constants, exact in the float, make of every byte its codes."""
    dtype = {"bf16": jnp.bfloat16, "f16": np.float16}[kind.name]
    every = np.arange(256, dtype=np.uint8)
    halves = [every.view(np.int8)] if stored == "int8" else [every << 4, every & 0xF0]
    want = [half.view(np.int8).astype(np.float64) / (1 if stored == "int8" else 16) for half in halves]
    for field, values in zip(FIELDS[stored], want, strict=True):
        factor, zero = kind.multiply_add(field)
        for constant in (factor, zero):
            assert float(np.asarray(constant, dtype)) == constant
        got = ((every & field.mask) ^ field.flip) * kind.last * factor + zero
        np.testing.assert_array_equal(got, got.astype(dtype).astype(np.float64))
        np.testing.assert_array_equal(got * kind.unit, values)


@pytest.mark.parametrize(("rows", "fold"), [(1, 1), (1, 4), (3, 1), (3, 2)])
@pytest.mark.parametrize("layout", ["int8_g64", "int4_g64_min", "int4_g128_zero", "int4_g64_min_f32"])
def test_by_bytes(layout: str, rows: int, fold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The computation of NVIDIA's GPUs, with plain operations in place of their instructions."""

    def numbers(codes: jax.Array, field: Field, dtype: jnp.dtype) -> jax.Array:
        factor, zero = FLOATS[dtype.name].multiply_add(field)
        bits = (jax.lax.bitcast_convert_type(codes, jnp.uint8).astype(jnp.int32) & field.mask) ^ field.flip
        return (bits * (FLOATS[dtype.name].last * factor) + zero).astype(dtype)

    monkeypatch.setattr(unpack, "_numbers", numbers)
    x, members = example(layout, rows, 40, 640 * fold)
    tiles = Tiles(8, 32, 64, 2, 1, 3, fold)
    found = kernel.product(x, Weight.of(layout_of(layout), members), tiles, jnp.float32, NVIDIA, interpret=True)
    assert error(found, exact(x, members, layout)) < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("layout", "inner", "tiles"),
    [
        ("int4_g128", 640, Tiles(64, 32, 64, 2, 1, 3, scaled=True)),  # a step more than there are
        ("int4_g128", 1024, Tiles(64, 32, 32, 2, 1, 3, scaled=True)),  # half a group a step, two scales a word
        ("int4_g64_min", 640, Tiles(64, 32, 64, 2, 1, 3, scaled=True)),
        ("int4_g64_zero", 256, Tiles(64, 16, 64, 1, 1, 3, scaled=True)),
        ("int4_g32_min", 160, Tiles(64, 16, 32, 1, 1, 3, scaled=True)),
        ("int8_g32", 608, Tiles(64, 32, 64, 3, 1, 3, scaled=True)),
        ("int8_g128_bf16", 512, Tiles(64, 32, 64, 1, 1, 3, scaled=True)),
        ("int8", 608, Tiles(16, 32, 128, 2, 1, 3, scaled=True)),
    ],
    ids=["step-too-many", "half-group", "minima", "zeros", "short", "int8", "bf16-scales", "whole-rows"],
)
def test_scales_multiply_the_weight(layout: str, inner: int, tiles: Tiles, dtype: str) -> None:
    """As near to the exact product as that with the decoded weight, rounded."""
    x, members = example(layout, 70, 40, inner, dtype)
    want = exact(x, members, layout)
    weight = codes.decode(layout_of(layout), members, dtype)
    rounded = np.asarray(x.astype(jnp.float32)) @ np.asarray(weight.astype(jnp.float32)).T
    assert error(KERNEL(x, members, layout=layout_of(layout), tiles=tiles), want) < 2 * error(rounded, want)


@pytest.mark.parametrize(
    ("name", "least"), [("int4_g128", 17), ("int4_g64_min", 9), ("int4_g32_min", 2), ("int8_g128", 9), ("int8", 17)]
)
def test_scales_multiply_the_weight_of_many_rows(name: str, least: int) -> None:
    """Where a GPU of NVIDIA multiplies bfloat16, and only there: the sooner the shorter groups are."""
    layout = layout_of(name)
    sizes = {"out": 4096, "row_bytes": 4096 // layout.per_byte, "layout": layout}
    assert default_tiles(find("h200"), rows=least, **sizes).scaled
    assert not default_tiles(find("h200"), rows=least - 1, **sizes).scaled
    assert not default_tiles(find("mi300x"), rows=64, **sizes).scaled


def test_sums_keep_their_precision_where_xla_may_keep_more() -> None:
    """The two halves of each sum add up to it, and no compiler may take the rounding of the first for excess."""
    x, members = example("int4_g64_min", 5, 16, 640)
    weight = Weight.of(layout_of("int4_g64_min"), members)

    @jax.jit
    def halves(x: jax.Array) -> jax.Array:
        shifts = shifts_of(weight, x, 1, 0, several=True)
        assert isinstance(shifts, Shifts)
        return shifts.sums

    assert "reduce_precision" in str(jax.make_jaxpr(halves)(x))
    found = np.asarray(halves(x).astype(jnp.float32), np.float64).sum(axis=0)
    sums = np.asarray(x.astype(jnp.float32), np.float64).reshape(5, -1, 64).sum(axis=-1)
    np.testing.assert_allclose(found, sums, rtol=0, atol=2e-5 * np.abs(sums).max())


@pytest.mark.parametrize(("rows", "fold"), [(1, 8), (3, 2)])
@pytest.mark.parametrize("layout", ["int8", "int4_g64_min"])
def test_parts_of_rows_are_summed(layout: str, rows: int, fold: int) -> None:
    """Also of columns that no tile divides, and where several programs share the parts."""
    x, members = example(layout, rows, 44, 1024)
    found = KERNEL(x, members, layout=layout_of(layout), tiles=Tiles(8, 32, 32, 2, 1, 3, fold))
    assert error(found, exact(x, members, layout)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "tiles",
    [Tiles(16, 32, 16, 4, 2, 2), Tiles(32, 16, 64, 1, 1, 3)],
    ids=str,
)
def test_any_cut_gives_the_same(tiles: Tiles) -> None:
    for layout in ("int8", "int4_g32_min"):
        for rows, out, inner in ((3, 70, 608), (1, 16, 1024), (33, 9, 96)):
            x, members = example(layout, rows, out, inner)
            found = KERNEL(x, members, layout=layout_of(layout), tiles=tiles)
            assert error(found, exact(x, members, layout)) < 1e-4


def test_joint_weights_and_batches() -> None:
    """Of a weight [2, mlp, in], as gate and up are stored together, and x [batch, len, in]."""
    x, members = example("int4_g32_min", 6, 2 * 24, 96)
    joint = {name: member.reshape(2, 24, *member.shape[1:]) for name, member in members.items()}
    run = partial(quantized_matmul, layout=layout_of("int4_g32_min"), backend="pallas_interpret")
    found = run(x.reshape(2, 3, 96), joint)
    assert (found.shape, found.dtype) == ((2, 3, 2, 24), jnp.bfloat16)
    np.testing.assert_array_equal(found.reshape(6, 48), run(x, members))


@pytest.mark.parametrize(
    ("layout", "out", "inner"),
    [
        ("int4_g64_min", 33, 704),
        pytest.param("int4_g128_zero", 48, 512, marks=pytest.mark.slow),
        pytest.param("int8_g32", 5, 608, marks=pytest.mark.slow),
    ],
)
def test_a_weight_is_decoded_to_the_bit(layout: str, out: int, inner: int) -> None:
    _, members = example(layout, 1, out, inner)
    found = decoded(Weight.of(layout_of(layout), members), jnp.bfloat16, interpret=True)
    np.testing.assert_array_equal(found, codes.decode(layout_of(layout), members, jnp.bfloat16))


def test_many_rows_multiply_the_decoded_weight() -> None:
    x, members = example("int4_g64_min", pallas_triton.MOST_ROWS + 1, 24, 256)
    found = KERNEL(x, members, layout=layout_of("int4_g64_min"))
    assert 1e-4 < error(found, exact(x, members, "int4_g64_min")) < 4e-3  # rounded to bfloat16, once


def test_a_step_of_too_many_groups_is_refused() -> None:
    x, members = example("int4_g32", 1, 16, 1024)
    with pytest.raises(KernelError, match="more than 16 groups of 32"):
        KERNEL(x, members, layout=layout_of("int4_g32"), tiles=Tiles(16, 16, 512, 1, 1, 1))


def test_gradient() -> None:
    layout = layout_of("int4_g64_min")
    x, members = example("int4_g64_min", 3, 40, 128)

    def loss(x: jax.Array, backend: str) -> jax.Array:
        return jnp.sum(jnp.sin(quantized_matmul(x, members, layout=layout, dtype=jnp.float32, backend=backend)))

    found = jax.grad(loss)(x, "pallas_interpret")
    assert found.dtype == x.dtype
    assert error(found, jax.grad(loss)(x.astype(jnp.float32), "reference")) < 1e-2


def test_what_is_not_supported() -> None:
    def reason(layout: str, x: Any = None, **shape: int) -> str | None:
        sizes = {"rows": 1, "out": 32, "inner": 1024} | shape
        arrays = jax.eval_shape(ProductShape(layout, **sizes).example, jax.random.key(0))
        given = arrays.pop("x")
        return pallas_triton.unsupported(find("mi300x"), given if x is None else x, arrays, layout=layout_of(layout))

    assert reason("int8") is reason("int4_g64_min", rows=129) is None
    assert "8-bit floats" in str(reason("fp8_g128"))
    assert "129 rows" in str(reason("int8", rows=129))
    assert "no rows" in str(reason("int8", rows=0))
    assert "groups of 16" in str(reason("int8_g16"))
    assert "asymmetric" in str(reason("int4_min"))
    assert "40 bytes" in str(reason("int8", inner=40))
    assert "bytes" in str(reason("int8", out=1 << 19, inner=8192))
    assert "float32" in str(reason("int8", x=jax.ShapeDtypeStruct((1, 1024), jnp.float32)))
    x, members = example("int8", 1, 32, 64)
    with pytest.raises(KernelError, match="GPUs only"):
        quantized_matmul(x, members, layout=layout_of("int8"), backend="pallas_triton")


@pytest.mark.slow
def test_a_model_computes_with_the_kernels() -> None:
    """All of its products, joint ones and the head's too: as near to the decoded weights as with plain operations."""
    config = preset("llama-3.2-1b").replace(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=96)
    config = config.replace(layers=config.layers[:1])
    params = fuse_params(init_params(config, jax.random.key(0), jnp.bfloat16), config)
    params, stored = quantize_params(params, config, recipe("int4", group=32))
    tokens = random_tokens(config, 1, 2)
    errors = {}
    expected, _ = run(*dequantize_params(params, stored, jnp.float32), tokens)
    for backend in ("reference", "pallas_interpret"):
        with using(quantized_matmul=backend):
            errors[backend] = error(run(params, stored, tokens)[0], expected)
    assert errors["pallas_interpret"] < max(1.5 * errors["reference"], 2e-2)
    made = {c.shape for c in report() if (c.operation, c.backend) == ("quantized_matmul", "pallas_interpret")}
    assert {shape.split()[2] for shape in made} >= {"n128", "n64", "n16384", "n96"}


@pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)
def test_tiles_fit(target: Any) -> None:
    """Powers of two, no more threads than there can be, no step of more than a group."""
    for shape in (*SHAPES, ProductShape("int4_g32", 1, 8, 32), ProductShape("int4_g1024", 256, 100, 8192)):
        layout = layout_of(shape.layout)
        row_bytes = shape.inner // layout.per_byte
        sizes = {"rows": shape.rows, "out": shape.out, "row_bytes": row_bytes, "layout": layout}
        found = list(candidates(target, **sizes))
        assert found[0] == default_tiles(target, **sizes)
        assert len(set(found)) == len(found) > 2
        for tiles in found:
            assert all(n & (n - 1) == 0 < n for n in (tiles.rows, tiles.cols, tiles.inner, tiles.splits))
            assert tiles.num_warps * (target.wave_size or 32) <= 1024
            assert tiles.inner >= CHUNK
            assert tiles.rows >= matrix_rows(target)


def test_names() -> None:
    assert product_shape(**product_cases()[1].arguments()) == "int4_g64_min r1 n100 k704"
    assert len({shape.name for shape in SHAPES}) == len(SHAPES)
    assert MEASURED[0].flops == 2 * 28672 * 4096
    assert MEASURED[0].bytes == 28672 * 4096 + 4 * 28672 + 2 * (4096 + 28672)
    numbers = {"products": ((64, 32), (32, 96)), "layouts": ("int8",)}
    assert [case.name for case in product_models(numbers)][::3] == ["int8 64x32, 1 rows", "int8 32x96, 1 rows"]
    usual = product_models({"products": ((64, 64),)})
    assert {case.name.split()[0] for case in usual} == {"int8", "int4_g64_min"}


@pytest.mark.parametrize("case", quantized_matmul_op.models(None)[::5], ids=lambda case: case.name)
def test_lowers_for_amd(case: Any) -> None:
    """Triton's dialect has all that the kernels use, and the call is one kernel."""
    target = find("mi300x")
    device = jax.sharding.AbstractDevice(device_kind=target.arch, num_cores=target.compute_units, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        call = jax.jit(lambda arrays: pallas_triton.run(**case.arguments(arrays)))
        text = call.trace(case.abstract()).lower(lowering_platforms=("rocm",)).as_text()
    assert text.count("xla.gpu.triton") == 1
    assert "quantized_mat" in text
