"""Weights that are stored by a scheme from outside (`toy_scheme`), through everything that handles weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, error, on_eight_devices, random_params, random_tokens, run
from toy_scheme import TOY, WHOLE, encoded, with_scheme

from llama_jax.aot.programs import fused_parameters
from llama_jax.checkpoint import load_params, open_checkpoint, save, verify
from llama_jax.config import LlamaConfig
from llama_jax.convert.export import export_hf
from llama_jax.errors import CheckpointError, RequestError, UnsupportedModel
from llama_jax.library.describe import describe
from llama_jax.model import forward
from llama_jax.model.fuse import arrange, fuse_params, repeat_kv_heads
from llama_jax.model.weights import compute_dtype
from llama_jax.params import abstract_params, count_params, flatten, init_params, param_specs, unflatten
from llama_jax.plan import costs
from llama_jax.schemes import Member, Scheme, register_scheme


def nbytes(tree: object) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scheme"), [("plain", WHOLE), *((name, TOY) for name in TINY)], ids=lambda x: getattr(x, "name", x)
)
def test_forward_canonical_and_fused(name: str, scheme: Scheme) -> None:
    """As with the decoded weights; a scheme that has rows is fused, one that has none is left apart."""
    config = with_scheme(TINY[name], scheme)
    params, plain = encoded(config)
    tokens = random_tokens(config, 2, 6)
    expected, _ = run(plain, TINY[name], tokens)
    assert error(run(params, config, tokens)[0], expected) < 1e-5
    before = flatten(params)
    fused = fuse_params(params, config)
    assert error(run(fused, config, tokens)[0], expected) < 1e-5
    assert flatten(params).keys() == before.keys()
    assert nbytes(fused) == nbytes(params)
    attn = fused["layers"]["0"]["attn"]
    heads = (config.num_kv_heads, config.num_heads // config.num_kv_heads + 2, config.head_dim)
    if scheme is TOY:
        assert attn["qkv_proj"]["row_scale"].shape == heads
        assert attn["qkv_proj"]["values"].dtype == jnp.int8
    else:
        assert "qkv_proj" not in attn
        assert attn["q_proj"].keys() >= {"codes", "size"}


def test_only_leaves_of_one_scheme_are_joined() -> None:
    config = with_scheme(TINY["plain"], without=("k_proj", "embed"))
    params, plain = encoded(config)
    fused = fuse_params(params, config)
    assert "qkv_proj" not in fused["layers"]["0"]["attn"]
    assert "gate_up_proj" in fused["layers"]["0"]["mlp"]
    tokens = random_tokens(config, 2, 6)
    assert error(run(fused, config, tokens)[0], run(plain, config, tokens)[0]) < 1e-5


@pytest.mark.parametrize("scheme", [TOY, WHOLE], ids=lambda scheme: scheme.name)
def test_repeated_key_value_heads(scheme: Scheme) -> None:
    config = with_scheme(TINY["plain"], scheme)
    params, plain = encoded(config)
    repeated = config.replace(num_kv_heads=config.num_heads)
    tokens = random_tokens(config, 2, 6)
    logits, _ = run(fuse_params(repeat_kv_heads(params, config, repeated), repeated), repeated, tokens)
    assert error(logits, run(plain, config, tokens)[0]) < 1e-5


def test_arranging_frees_what_it_was_given_only_if_it_may() -> None:
    config = with_scheme(TINY["plain"])
    params, _ = encoded(config)
    keys = flatten(params).keys()
    arranged, split = arrange(params, config, None)
    assert split == config
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    again, _ = arrange(params, config, None, donate=True)
    assert flatten(params).keys() == keys
    assert params["layers"]["0"]["attn"]["q_proj"]["values"].is_deleted()
    chex.assert_trees_all_equal(again, arranged)


@pytest.mark.parametrize("fused", [False, True])
def test_members_that_no_scheme_has(fused: bool) -> None:
    """Beside a plain weight, in place of one, and where there is none: never ignored."""
    config = TINY["sigmoid-moe"]
    params = random_params(config)
    params = fuse_params(params, config) if fused else params
    tokens = random_tokens(config, 1, 3)
    abstract = partial(jax.eval_shape, lambda params: forward(params, config, tokens))
    for name in flatten(params):
        leaf = name.rpartition(".")[0]
        with pytest.raises(RequestError, match="scale") as caught:
            abstract(unflatten(flatten(params) | {f"{leaf}.scale": jnp.ones(1)}))
        assert caught.value.param == "params"
    for leaf in ("embed", "final_norm", "lm_head", "layers.0.moe.router", "layers.0.moe.experts.up_proj"):
        with pytest.raises(RequestError, match="bias"):
            abstract(unflatten(flatten(params) | {f"{leaf}.bias": jnp.ones(1)}))


def test_schemes_that_cannot_be_told_apart() -> None:
    members = {"values": Member("int8"), "other": Member("int8")}
    for scheme in (
        Scheme(TOY.name, members, TOY.encode, TOY.decode),
        Scheme("new", TOY.members, TOY.encode, TOY.decode),
        Scheme("new", {"bias": Member(None)}, TOY.encode, TOY.decode),
    ):
        with pytest.raises(RequestError, match="scheme"):
            register_scheme(scheme)
    register_scheme(TOY)


def test_table() -> None:
    config = with_scheme(TINY["biased"])
    specs = {s.name: s for s in param_specs(config)}
    weight, bias = specs["layers.0.attn.q_proj.values"], specs["layers.0.attn.q_proj.bias"]
    scale = specs["layers.0.attn.q_proj.row_scale"]
    assert (weight.shape, weight.axes, weight.dtype) == ((32, 16), ("q_heads", "embed"), "int8")
    assert (scale.shape, scale.axes, scale.dtype, scale.scheme) == ((32,), ("q_heads",), "float32", "toy_rows")
    assert (bias.dtype, bias.scheme) == (None, "plain")
    assert count_params(config) == count_params(TINY["biased"])
    shapes = abstract_params(config, "bfloat16")
    chex.assert_trees_all_equal_shapes_and_dtypes(init_params(config, jax.random.key(0), "bfloat16"), shapes)
    plain = flatten(init_params(TINY["biased"], jax.random.key(0)))["layers.0.attn.q_proj.weight"]
    decoded = TOY.decode(init_params(config, jax.random.key(0))["layers"]["0"]["attn"]["q_proj"], jnp.float32)
    assert error(decoded, plain) < 0.01


@pytest.mark.parametrize(
    ("schemes", "says"),
    [((("embed", "unheard"),), "'unheard', which is not known"), ((("final_norm", "toy_rows"),), "for final_norm")],
)
def test_unknown_schemes_and_leaves(schemes: tuple[tuple[str, str], ...], says: str) -> None:
    with pytest.raises(UnsupportedModel, match=says) as caught:
        param_specs(TINY["plain"].replace(schemes=schemes))
    assert caught.value.hint


def stored(folder: Path, **options: object) -> tuple[Path, LlamaConfig, dict[str, jax.Array]]:
    config = with_scheme(TINY["biased"].replace(num_kv_heads=2, dtype="bfloat16"), without=("o_proj",))
    config = config.replace(layers=TINY["plain"].layers, o_bias=True)
    params, _ = encoded(config)
    return save(folder / "m", params, config, **options), config, flatten(params)


def test_checkpoint(tmp_path: Path) -> None:
    """Bytes, digests and schemes, tensor by tensor; a cast leaves alone what has a dtype of its own."""
    path, config, leaves = stored(tmp_path)
    assert verify(path).ok
    opened = open_checkpoint(path)
    assert dict(opened.config.schemes) == dict(config.schemes)
    assert opened.tensors["embed.values"].scheme == "toy_rows"
    assert opened.tensors["embed.values"].dtype == "int8"
    assert opened.nbytes == nbytes(leaves)
    assert opened.dtype == "float32"
    loaded = flatten(load_params(path, dtype="bfloat16"))
    assert loaded.keys() == leaves.keys()
    for spec in param_specs(config):
        leaf = loaded[spec.name]
        assert leaf.dtype == (spec.dtype or "bfloat16"), spec.name
        np.testing.assert_array_equal(leaf, leaves[spec.name].astype(leaf.dtype))
    assert compute_dtype(unflatten(loaded)) == jnp.bfloat16

    shown = describe(path, "m")
    assert shown["tensors"]["embed.row_scale"]["scheme"] == "toy_rows"
    assert "scheme" not in shown["tensors"]["final_norm.weight"]
    assert shown["parameters"] == count_params(config)
    assert shown["memory_bytes"]["float32"] == opened.nbytes
    with pytest.raises(UnsupportedModel, match="toy_rows"):
        export_hf(path, tmp_path / "hf")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "float8_e4m3fn", "float8_e5m2"])
def test_dtypes_of_members(tmp_path: Path, dtype: str) -> None:
    name = f"toy_{dtype}"
    codes = {f"codes_{dtype}": Member(dtype)}
    scheme = Scheme(name, codes, lambda w: {f"codes_{dtype}": w.astype(dtype)}, lambda leaf, d: leaf[f"codes_{dtype}"])
    register_scheme(scheme)
    config = TINY["plain"].replace(schemes=(("lm_head", name),))
    flat = flatten(random_params(TINY["plain"]))
    flat[f"lm_head.codes_{dtype}"] = (flat.pop("lm_head.weight") * 9).astype(dtype)
    path = save(tmp_path / "m", unflatten(flat), config)
    assert verify(path).ok
    found = load_params(path, dtype="bfloat16", only="lm_head.*")["lm_head"][f"codes_{dtype}"]
    assert np.asarray(found).tobytes() == np.asarray(flat[f"lm_head.codes_{dtype}"]).tobytes()


def test_damaged_members(tmp_path: Path) -> None:
    path, config, leaves = stored(tmp_path)
    with pytest.raises(CheckpointError, match=r"embed\.values is float32"):
        save(tmp_path / "n", unflatten(leaves | {"embed.values": leaves["embed.values"].astype("float32")}), config)
    metadata = path / "params" / "_CHECKPOINT_METADATA"
    text = metadata.read_text()
    metadata.write_text(text.replace('"toy_rows"', '"other"', 1))
    with pytest.raises(CheckpointError, match="several schemes"):
        open_checkpoint(path)
    metadata.write_text(text.replace('"toy_rows"', '"unheard"'))
    with pytest.raises(UnsupportedModel, match="'unheard'"):
        load_params(path)


@pytest.mark.parametrize("name", ["plain", "softmax-moe"])
def test_costs_and_shapes_of_programs(name: str) -> None:
    """Bytes are those of the members; arithmetic is that of the weights."""
    config = with_scheme(TINY[name])
    shapes = abstract_params(config, "bfloat16")
    assert costs.held_bytes(config, 2) == nbytes(shapes)
    assert nbytes(fused_parameters(config, None, "bfloat16")) == nbytes(shapes)
    assert costs.matmul_params(config, 1) == costs.matmul_params(TINY[name], 1)
    many = costs.read_bytes(config, 2, 1000)
    assert many == nbytes(shapes) - nbytes(shapes["embed"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_a_mesh() -> None:
    on_eight_devices("eight_devices_schemes.py")
