"""Tests of rules other than the default ones; `test_sharding.py` runs them in a process of its own, on eight simulated
devices."""

from __future__ import annotations

from itertools import cycle, product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices_generate import on_mesh
from eight_devices_sampling import SAMPLINGS, rows_of
from helpers import TINY, error, random_params, random_tokens, run, tiny_config
from tiny_chat_model import write_chat_model

from llama_jax.config import LayerSpec, LlamaConfig, MoeSpec
from llama_jax.errors import RequestError
from llama_jax.generation import batch_generate, generate
from llama_jax.layout import explain, local_size
from llama_jax.loading import load
from llama_jax.model.fuse import fuse_params
from llama_jax.model.loaded import Model
from llama_jax.params import flatten, param_specs
from llama_jax.sampling import make_sampler, sample
from llama_jax.sharding import RuledMesh, constrain, local, make_mesh, on, share, split_over, ways

HEADS = {"q_heads": "tensor", "kv_heads": "tensor"}
WIDE = {"batch": "data", **HEADS, "mlp": ("fsdp", "tensor"), "vocab": ("fsdp", "tensor")}
"""Hidden units and vocabulary over more devices than heads, rows over an axis of their own."""
MODEL_ONLY = {**HEADS, "mlp": ("data", "tensor"), "vocab": ("tensor", "data")}
"""The axis "data" for the model too; the vocabulary in another order of the axes."""
MESHES = {
    "wide": ("data=2,fsdp=2,tensor=2", WIDE),
    "model only": ("data=2,tensor=4", MODEL_ONLY),
    "rows over two axes": ("data=2,fsdp=2,tensor=2", HEADS | {"batch": ("data", "fsdp")}),
}


def mesh_of(name: str) -> RuledMesh:
    axes, rules = MESHES[name]
    return make_mesh(axes, rules=rules)


def models() -> dict[str, LlamaConfig]:
    shared = MoeSpec(4, 2, 16, "sigmoid", 24)  # one width for the shared expert, another for the others
    dense = tiny_config(LayerSpec(mlp=24), LayerSpec("sliding", 5, mlp=32), num_heads=8, num_kv_heads=2)
    return {"dense": dense, "moe": tiny_config(LayerSpec(mlp=shared), num_heads=4, num_kv_heads=4), **TINY}


FAST = {("dense", "wide"), ("moe", "model only")}
GENERATED = {*FAST, ("dense", "rows over two axes")}
# These two on every mesh, each of the others on one, in turn.
CASES = [
    pytest.param(name, mesh, marks=() if (name, mesh) in FAST else pytest.mark.slow)
    for name, mesh in [*product(("dense", "moe"), MESHES), *zip(TINY, cycle(MESHES), strict=False)]
]


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_logits_and_tokens_of_one_device(name: str, mesh: str) -> None:
    config, ruled = models()[name], mesh_of(mesh)
    params, tokens = random_params(config), random_tokens(config, 4, 6)
    expected, _ = run(params, config, tokens)
    model = on_mesh(params, config, ruled)
    with on(ruled):
        logits, _ = run(model.params, model.config, tokens)
    assert error(logits, expected) < 1e-5
    rows, vocab = ruled.share("batch", 4), ruled.share("vocab", config.vocab_size)
    assert logits.sharding.shard_shape(logits.shape) == (rows, 6, vocab)
    if (name, mesh) in GENERATED:
        one = Model(fuse_params(params, config), config)
        prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
        want, found = (batch_generate(m, None, prompts, max_tokens=4, ignore_eos=True, seed=3) for m in (one, model))
        assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in want]


def test_what_a_device_holds() -> None:
    """By the numbers alone: 32 hidden units and 40 tokens of the vocabulary over 8 devices, heads over 4."""
    config = models()["dense"].replace(layers=(LayerSpec(mlp=32),))
    model = on_mesh(random_params(config), config, mesh_of("model only"))
    assert model.config.num_kv_heads == 4  # two heads, each held twice, for four devices
    parts = {name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in flatten(model.params).items()}
    hidden, group = config.hidden_size, config.num_heads // 4 + 2
    assert parts["layers.0.mlp.gate_up_proj.weight"] == (2, 32 // 8, hidden)
    assert parts["layers.0.mlp.down_proj.weight"] == (hidden, 32 // 8)
    assert parts["embed.weight"] == (config.vocab_size // 8, hidden)
    assert parts["layers.0.attn.qkv_proj.weight"] == (4 // 4, group, config.head_dim, hidden)
    assert parts["layers.0.attn.o_proj.weight"] == (hidden, config.q_dim // 4)


@pytest.mark.parametrize("size", [8, 6, 3])
def test_all_of_the_axes_or_none(size: int) -> None:
    """2 x 2 devices, of which 2 would divide more: parameters, programs, explanation and costs say the same."""
    mesh = make_mesh("fsdp=2,tensor=2", devices=jax.devices()[:4], rules=WIDE)
    config = tiny_config(LayerSpec(mlp=size))
    parts = 4 if size % 4 == 0 else 1
    assert mesh.share("mlp", size) == size // parts
    said = next(split for split in explain(config, mesh) if split.axis == "mlp")
    how = "split over" if parts == 4 else "whole on each device of"
    why = "" if parts == 4 else f", 4 does not divide {size}"
    assert str(said) == f"mlp {size}: {how} fsdp=2 x tensor=2{why}"
    model = on_mesh(random_params(config), config, mesh, fuse=False)
    for spec in param_specs(config):
        leaf = flatten(model.params)[spec.name]
        assert np.prod(leaf.sharding.shard_shape(leaf.shape)) == local_size(spec, config, mesh)
    up = model.params["layers"]["0"]["mlp"]["up_proj"]["weight"]
    assert up.sharding.shard_shape(up.shape) == (size // parts, config.hidden_size)

    def shapes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        assert share("mlp", size) == size // parts
        assert ways("mlp") == 4
        assert split_over("mlp", size) == (("fsdp", "tensor") if parts == 4 else None)
        own = local(lambda x: jnp.full((1,), x.shape[0]), {"x": x}, {"x": ("mlp",)}, ())
        return constrain(x, ("mlp",)), own

    with on(mesh):
        laid_out, own = jax.jit(shapes)(jnp.ones((size, 3)))
    assert laid_out.sharding.shard_shape(laid_out.shape) == (size // parts, 3)
    assert own.tolist() == [size // parts]


@pytest.mark.parametrize("name", ["top_k of more than the candidates", "all"])
@pytest.mark.parametrize("mesh", ["wide", "model only"])
def test_the_same_tokens_from_a_vocabulary_over_two_axes(name: str, mesh: str) -> None:
    batch, vocab = 4, 1024
    profile, state = make_sampler([SAMPLINGS[name]] * batch, [[1, 2, 3, 900]] * batch, vocab, [1000])
    logits = rows_of(batch, vocab, 3.0, 0)
    plain = jax.jit(sample, static_argnames="profile")
    tokens, want, logprobs = plain(logits, state, profile=profile)
    with on(mesh_of(mesh)):
        found, have, found_logprobs = plain(logits, state, profile=profile)
    assert found.tolist() == tokens.tolist()
    jax.tree.map(np.testing.assert_array_equal, have, want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found_logprobs, logprobs)


def test_programs_are_traced_anew_for_other_rules() -> None:
    """One mesh and one jitted function; a mesh without rules inside of one with rules has the default ones."""
    mesh = make_mesh("data=2,tensor=4")
    laid_out = jax.jit(lambda x: constrain(x, ("batch", "vocab")))
    x = jnp.ones((8, 8))

    def shard() -> tuple[int, ...]:
        return laid_out(x).sharding.shard_shape(x.shape)

    with on(RuledMesh(mesh, MODEL_ONLY)):  # type: ignore[arg-type]
        assert shard() == (8, 1)
        with on(mesh):
            assert shard() == (4, 2)
        assert shard() == (8, 1)
    assert laid_out._cache_size() == 2
    with jax.set_mesh(mesh):
        assert shard() == (4, 2)


def test_rules_that_collide() -> None:
    """Two logical axes over one axis of the mesh: in one array, and in one operation, whose sum would mix rows."""
    mesh = make_mesh("data=2,tensor=4", rules={"batch": "data", "mlp": ("data", "tensor")})
    x, w = jnp.ones((2, 8)), jnp.ones((8, 3))
    arguments, axes = {"x": x, "w": w}, {"x": ("batch",), "w": ("mlp",)}
    with on(mesh):
        with pytest.raises(RequestError, match=r"two dimensions of \(2, 8\) over one axis of the mesh"):
            jax.jit(lambda x: constrain(x, ("batch", "mlp")))(x)
        with pytest.raises(RequestError, match="split both batch and mlp over data"):
            local(lambda x, w: x[:, :1] @ w[:1], arguments, axes, ("batch",), summed="mlp")


def test_load_with_rules(tmp_path: Path) -> None:
    """Given once: parameters, notes, generation and the prompt's log-probabilities follow them."""
    folder = write_chat_model(tmp_path / "tiny", layers=2)
    plain, tokenizer = load(folder)
    want = generate(plain, tokenizer, "The quick", max_tokens=6, logprobs=2)
    said: list[str] = []
    model, _ = load(folder, mesh=mesh_of("model only"), notify=said.append)
    assert isinstance(model.mesh, RuledMesh)
    assert generate(model, tokenizer, "The quick", max_tokens=6, logprobs=2) == want
    notes = [str(s) for s in explain(plain.config, model.mesh) if s.note]
    assert notes
    assert [line for line in said if "tensor=4" in line] == notes
    weight = model.params["layers"]["0"]["mlp"]["gate_up_proj"]["weight"]
    assert weight.sharding.shard_shape(weight.shape)[1] == weight.shape[1] // 8
    with pytest.raises(RequestError, match="batch and mlp, vocab are both split over data"):
        load(folder, mesh=make_mesh("data=2,tensor=4", rules=MODEL_ONLY | {"batch": "data"}))
