"""Weights in few bits: layouts, rounding to the nearest, models that compute with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import chex
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, error, on_eight_devices, random_params, random_tokens, run

import llama_jax as lj
from llama_jax.checkpoint import load_params, open_checkpoint, save, verify
from llama_jax.errors import CheckpointError, RequestError, UnsupportedModel
from llama_jax.kernels.quantized_matmul import quantized_matmul
from llama_jax.layout import check
from llama_jax.model.fuse import fuse_params
from llama_jax.model.loaded import Model
from llama_jax.model.quantization import dequantize_params, quantize, quantize_params
from llama_jax.params import count_params, flatten, param_specs, unflatten
from llama_jax.plan import costs
from llama_jax.quantized import CODES, Layout, codes, layout_named
from llama_jax.quantized.layout import OFFSETS, SCALES
from llama_jax.quantized.nearest import encode
from llama_jax.recipe import recipe, schemes, usual_form
from llama_jax.schemes import Scheme, register_scheme, scheme_of
from llama_jax.targets import find
from llama_jax.targets.table import CPU

LAYOUTS = (
    *("int8", "int8_g32", "int8_g32_min", "int8_g32_zero", "int4", "int4_g32", "int4_g64_min", "int4_g32_zero"),
    *("fp8", "fp8_g128"),
)


def layout(name: str) -> Layout:
    found = layout_named(name)
    assert found is not None
    return found


def weight(*shape: int, seed: int = 0) -> jax.Array:
    return 0.1 * jax.random.normal(jax.random.key(seed), shape) + 0.01


def by_hand(name: str, members: dict[str, jax.Array]) -> np.ndarray:
    """The weight that members stand for, number by number as the docstring of `Layout` says it."""
    where, found = layout(name), {k: np.asarray(v) for k, v in members.items()}
    stored = found[name]
    if where.kind == "int4":
        halves = np.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:-1], -1).astype(np.int8)
        stored = np.where(halves > 7, halves - 16, halves)
    out = np.empty(stored.shape, np.float32)
    for at in np.ndindex(out.shape):
        group = at[:-1] if where.group is None else (*at[:-1], at[-1] // where.group)
        code, scale = np.float32(stored[at]), np.float32(found["scales"][group])
        if where.offset == "min":
            above = code + 8 if where.kind == "int4" else code
            out[at] = np.float32(above * scale) + np.float32(found["minima"][group])
        elif where.offset == "zero":
            out[at] = (code - np.float32(found["zeros"][group])) * scale
        else:
            out[at] = code * scale
    return out


def test_names() -> None:
    """Each layout has one name, which says all of it; nothing else is one."""
    for kind in CODES:
        for group in (None, 32, 128):
            for offset in (None, *OFFSETS) if kind != "fp8" else (None,):
                for scales in SCALES:
                    made = Layout(kind, group, offset, scales)
                    assert layout_named(made.name) == made
    assert Layout("int4", 64, "min").name == "int4_g64_min"
    assert layout("int4_g64_min_bf16").scale_dtype == "bfloat16"
    for name in (
        "int4_g0",
        "int4_g33",
        "int5",
        "fp8_min",
        "int4_g64_f16",
        "int8_f32",
        "Int8",
        "int4_min_g64",
        "weight",
    ):
        assert layout_named(name) is None, name


@pytest.mark.parametrize("name", LAYOUTS)
def test_decoded_as_the_layout_says(name: str) -> None:
    members = encode(layout(name), weight(3, 4, 128))
    decoded = codes.decode(layout(name), members, jnp.float32)
    np.testing.assert_array_equal(decoded, by_hand(name, members))
    rounded = codes.decode(layout(name), members, jnp.bfloat16)
    np.testing.assert_array_equal(rounded, decoded.astype(jnp.bfloat16))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_code_is_the_nearest(name: str) -> None:
    """No other code of the same scale would be nearer; what lies on the grid comes out as it was."""
    where, original = layout(name), weight(8, 256)
    members = encode(where, original)
    decoded = codes.decode(where, members, jnp.float32)
    scales = np.repeat(np.asarray(members["scales"], np.float32).reshape(8, -1), where.group or 256, axis=1)
    distance = np.abs(np.asarray(decoded) - np.asarray(original))
    if where.kind != "fp8":
        rounding = 2**-11 * (where.largest - where.lowest)  # of the scale, by which the last code may fall short
        assert (distance <= scales * (0.5 + (rounding + 0.01 if where.offset else 1e-3))).all()
    else:  # half of the last of three bits behind the point, or of the smallest number
        assert (distance <= np.maximum(np.abs(original) * 2**-4, scales * 2**-10) * 1.001).all()
    if where.group is not None and name not in ("fp8_g128", "int8_g32_zero"):  # whose last code may be cut off
        chex.assert_trees_all_equal(encode(where, decoded), members)


@pytest.mark.parametrize(("kind", "name"), [("Q8_0", "int8_g32"), ("Q4_1", "int4_g32_min")])
def test_grids_of_gguf_are_found_again(kind: str, name: str) -> None:
    """Rounding to the nearest, to the same groups, changes no number that lies on such a grid."""
    packed = gguf.quantize(np.asarray(weight(64, 512)), gguf.GGMLQuantizationType[kind])
    grid = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])
    again = codes.decode(layout(name), encode(layout(name), jnp.asarray(grid)), jnp.float32)
    np.testing.assert_array_equal(again, grid)


@pytest.mark.parametrize("name", LAYOUTS)
def test_products_and_rows(name: str) -> None:
    """In float32 as with the decoded weight; in bfloat16 as near as that dtype allows, of a joint weight too."""
    where = layout(name)
    members = encode(where, weight(2, 3, 5, 128))
    decoded = np.asarray(codes.decode(where, members, jnp.float32), np.float64)
    x = jax.random.normal(jax.random.key(1), (2, 4, 128))
    expected = np.einsum("bti,koni->btkon", np.asarray(x, np.float64), decoded)
    assert error(quantized_matmul(x, members, layout=where, dtype=jnp.float32), expected) < 2e-6
    near = x.astype(jnp.bfloat16)
    expected = np.einsum("bti,koni->btkon", np.asarray(near, np.float64), decoded)
    assert error(quantized_matmul(near, members, layout=where, dtype=jnp.float32), expected) < 6e-3
    table = {n: m.reshape(30, *m.shape[3:]) for n, m in members.items()}
    tokens = jnp.asarray([[0, 29, 7]])
    np.testing.assert_array_equal(codes.lookup(where, table, tokens, jnp.float32)[0, 1], decoded.reshape(30, 128)[29])


def test_zeros_and_what_is_not_finite() -> None:
    """A group of zeros stays one. What cannot be stored shows in the scales, where every loader looks."""
    for name in ("int8", "int4_g32", "int4_g64_min", "int4_g32_zero", "fp8"):
        members = encode(layout(name), jnp.zeros((2, 128)))
        assert not np.asarray(codes.decode(layout(name), members, jnp.float32)).any(), name
        for bad in (jnp.nan, jnp.inf):
            members = encode(layout(name), weight(2, 128).at[1, 5].set(bad))
            found = np.isfinite(np.asarray(members["scales"], np.float32)).reshape(2, -1)
            assert found[0].all(), name
            assert not found[1].all(), name
    assert not np.isfinite(encode(layout("int4_g32"), jnp.full((1, 32), 1e6))["scales"]).all()


def test_layouts_are_schemes() -> None:
    members = encode(layout("int4_g64_min"), weight(4, 64))
    assert scheme_of(members).name == "int4_g64_min"
    assert scheme_of([*members, "bias"]).name == "int4_g64_min"
    with pytest.raises(RequestError, match="no scheme has"):
        scheme_of({"int4_g64_min", "scales"})
    for members in ({"int8": None}, {"x": None}):
        with pytest.raises(RequestError, match="name of a layout"):
            register_scheme(Scheme("int4_g32" if "x" in members else "y", members, lambda w: {}, lambda m, d: None))  # type: ignore[arg-type, return-value]


WANTED = {
    "plain": recipe("int8"),
    "biased": recipe("int4", group=4, lm_head="int4_g8_zero", embed="int8_g4"),
    "tied-mqa": recipe("int4", group=8, symmetric=True, lm_head="int8_g4"),
    "softmax-moe": recipe("fp8", group=4, embed="int4_g8_min"),
    "sigmoid-moe": recipe("int4_g4_zero", lm_head="bfloat16"),
}


@pytest.mark.parametrize("name", WANTED)
def test_models_compute_with_what_is_stored(name: str) -> None:
    """As with the decoded weights; fused before or after, with the same bytes."""
    config, plain = TINY[name], random_params(TINY[name])
    params, stored = quantize_params(plain, config, WANTED[name])
    assert {s.name: (s.shape, s.dtype or "float32") for s in param_specs(stored)} == {
        n: (x.shape, x.dtype.name) for n, x in flatten(params).items()
    }
    decoded, back = dequantize_params(params, stored, jnp.float32)
    assert back == config
    tokens = random_tokens(config, 2, 6)
    expected, _ = run(decoded, config, tokens)
    fused = fuse_params(params, stored)
    assert error(run(fused, stored, tokens)[0], expected) < 2e-5
    if name == "biased":  # with every kind of leaf that is joined
        assert error(run(params, stored, tokens)[0], expected) < 2e-5
    chex.assert_trees_all_equal(quantize_params(fuse_params(plain, config), config, WANTED[name])[0], fused)
    chex.assert_trees_all_equal(dequantize_params(fused, stored, jnp.float32)[0], fuse_params(decoded, config))
    assert error(run(plain, config, tokens)[0], expected) > 1e-3
    held = sum(x.nbytes for x in jax.tree.leaves(params))
    assert held == costs.held_bytes(stored, 4)
    assert count_params(stored) == count_params(config)


def test_a_model() -> None:
    """`quantize` leaves its argument alone; what is freed is what was asked for."""
    config = TINY["plain"]
    model = Model(random_params(config), config)
    small = lj.quantize(model, "int4", group=8, ignore=["*.o_proj", "layers.0.mlp.*"])
    stored = dict(small.config.schemes)
    assert stored["layers.0.attn.q_proj"] == "int4_g8_min"
    assert stored["lm_head"] == "int8"
    assert not stored.keys() & {"embed", "layers.0.attn.o_proj", "layers.0.mlp.up_proj"}
    assert model.config == config
    assert small.params["embed"]["weight"] is model.params["embed"]["weight"]
    assert small.dtype == jnp.float32
    params, _ = dequantize_params(small.params, small.config, jnp.float32, donate=True)
    assert small.params["lm_head"]["int8"].is_deleted()
    assert not params["embed"]["weight"].is_deleted()


@pytest.mark.parametrize(
    ("options", "param", "says"),
    [
        ({"weights": "int5"}, "weights", "'int5' names no layout"),
        ({"weights": "int4", "group": 48}, "group", "rows of layers.0.attn.q_proj have 16 numbers"),
        ({"weights": "int4", "group": 7}, "group", "group 7"),
        ({"weights": "int8", "symmetric": False}, "symmetric", "int8 are symmetric"),
        ({"weights": "int4_g8", "group": 8}, "weights", "whole layout"),
        ({"weights": "int8", "lm_head": "int3"}, "lm_head", "'int3'"),
        ({"weights": "int8", "ignore": ["*.q_pro"]}, "ignore", "no weight is called"),
    ],
)
def test_requests_that_are_refused(options: dict[str, object], param: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        schemes(TINY["plain"], recipe(**options))  # type: ignore[arg-type]
    assert caught.value.param == param
    assert caught.value.hint


def test_forms_that_nobody_names() -> None:
    """On one NVIDIA GPU as they are stored where codes are read as they lie; on AMD's always, on a CPU never."""
    mi300x, h100, cpu = find("mi300x"), find("h100"), CPU
    other_nvidia = dataclasses.replace(h100, arch="sm_120")
    integers = (("lm_head", "int8"), ("layers.0.attn.q_proj", "int4_g64_min"))
    experts = (*integers, ("layers.0.moe.experts.up_proj", "int4_g32"))
    others = ((("lm_head", "fp8"),), (("lm_head", "toy_rows"),))
    for target, read, routed, unread in (
        (mi300x, "stored", "stored", "stored"),
        (h100, "stored", "stored", "float"),
        (other_nvidia, "stored", "float", "float"),
        (cpu, "float", "float", "float"),
    ):
        assert usual_form(target, integers, split=False) == read
        assert usual_form(target, experts, split=False) == routed
        assert {usual_form(target, (*integers, *other), split=False) for other in others} == {unread}
    assert usual_form(h100, integers, split=True) == "float"
    assert usual_form(mi300x, integers, split=True) == "stored"


def test_rows_that_do_not_divide() -> None:
    """Groups of 12 in rows of 16, as a checkpoint may claim, are refused: they would be read as something else."""
    for name in ("int4_g12", "int8_g32"):
        with pytest.raises(UnsupportedModel, match=f"stored as {name}, but its rows of 16"):
            param_specs(TINY["plain"].replace(schemes=(("layers.0.attn.q_proj", name),)))


def test_neither_twice_nor_by_halves() -> None:
    config = TINY["plain"]
    params, stored = quantize_params(random_params(config), config, recipe("int8"))
    with pytest.raises(RequestError, match="quantised already"):
        quantize_params(params, stored, recipe("int8"))
    fused = Model(fuse_params(random_params(config), config), config)
    with pytest.raises(RequestError, match="joins q_proj, k_proj, v_proj") as caught:
        quantize(fused, "int8", ignore="*.k_proj")
    assert caught.value.param == "ignore"


def test_no_mesh_cuts_through_a_group() -> None:
    """down_proj has 24 inputs: three groups of 8, which two devices cannot share; two groups of 12 they can."""
    config = TINY["plain"]
    for group, devices, cut in ((8, 2, True), (4, 2, False), (12, 4, True), (8, 3, False)):
        stored = config.replace(schemes=(("layers.0.mlp.down_proj", f"int4_g{group}"),))
        if not cut:
            check(stored, {"tensor": devices})
            continue
        with pytest.raises(RequestError, match=rf"down_proj .*int4_g{group}.* {24 // devices} each") as caught:
            check(stored, {"tensor": devices})
        assert caught.value.param == "mesh"


def test_checkpoint(tmp_path: Path) -> None:
    """Stored by Orbax byte for byte, with digests that see a single bit."""
    config = TINY["biased"].replace(dtype="bfloat16", layers=TINY["plain"].layers)
    plain = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(config))
    params, stored = quantize_params(plain, config, WANTED["biased"])
    path = save(tmp_path / "m", params, stored)
    assert verify(path).ok
    opened = open_checkpoint(path)
    assert dict(opened.config.schemes) == dict(stored.schemes)
    assert opened.nbytes == sum(x.nbytes for x in jax.tree.leaves(params))
    loaded = load_params(path)
    for name, leaf in flatten(params).items():
        found = flatten(loaded)[name]
        assert found.dtype == leaf.dtype
        assert np.asarray(found).tobytes() == np.asarray(leaf).tobytes(), name
    # Scales keep their own dtype, whatever the model computes in.
    assert load_params(path, dtype="float32")["embed"]["scales"].dtype == jnp.float16
    with pytest.raises(CheckpointError, match="int8_g4"):
        save(tmp_path / "n", unflatten(flatten(params) | {"embed.int8_g4": jnp.zeros((40, 16))}), stored)


@pytest.mark.parametrize("name", ["int8", "int4_g64_min"])
def test_gradients_reach_the_input(name: str) -> None:
    """Through what is read as bytes and behind a barrier, as through the decoded weight."""
    where, x = layout(name), jax.random.normal(jax.random.key(1), (4, 128))
    members = encode(where, weight(8, 128))
    found = jax.grad(lambda x: jnp.sum(jnp.sin(quantized_matmul(x, members, layout=where, dtype=jnp.float32))))(x)
    decoded = codes.decode(where, members, jnp.float32)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(jnp.matmul(x, decoded.T, precision="highest"))))(x)
    assert error(found, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_a_mesh() -> None:
    on_eight_devices("eight_devices_quantization.py")
