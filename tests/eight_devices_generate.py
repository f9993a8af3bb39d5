"""Tests that generate on eight devices; `test_sharding.py` runs them in a process of its own, on simulated ones."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from engines import small_settings
from helpers import (
    GOLDEN_CASES,
    GOLDENS,
    TINY,
    TOLERANCE,
    error,
    in_slots,
    load_golden,
    random_adapters,
    random_params,
    random_tokens,
    run,
    tiny_config,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny_chat_model import write_chat_model

import llama_jax as lj
from llama_jax import layout, sharding
from llama_jax.adapters import LoraConfig, attach, merge, new_adapter
from llama_jax.aot.programs import prefill_program
from llama_jax.cache import DenseCache, NewCache
from llama_jax.checkpoint.build import load_source
from llama_jax.config import LayerSpec, LlamaConfig, MoeSpec, preset
from llama_jax.convert.opening import open_source
from llama_jax.decode import buckets, loop
from llama_jax.decode import prefill as prefill_module
from llama_jax.errors import RequestError
from llama_jax.generation import batch_generate, generate, stream_generate
from llama_jax.generation.llm import LLM
from llama_jax.kernels import report
from llama_jax.kernels.attention import KeysValues, Places, Rule, Visibility, attention, attention_reference
from llama_jax.kernels.dispatch import using
from llama_jax.kernels.registry import OPERATIONS
from llama_jax.loading import load
from llama_jax.measure import bench
from llama_jax.measure.bench import random_model
from llama_jax.model import forward
from llama_jax.model.adapters import empty_slots, put_adapter
from llama_jax.model.fuse import arrange, fuse_params, repeat_kv_heads
from llama_jax.model.loaded import Model
from llama_jax.params import PROJECTION_AXES, Params, abstract_params, flatten, param_specs, unflatten
from llama_jax.sampling import SamplerState, SamplingParams, make_sampler, sample

MESHES = ("tensor=2", "data=2,tensor=4")


def on_mesh(params: Params, config: LlamaConfig, mesh: Mesh, **options: Any) -> Model:
    """Canonical parameters as `load` would have placed them."""
    where = layout.param_sharding(config, mesh)
    flat = flatten(params)
    placed = unflatten({s.name: jax.device_put(flat[s.name], where(s)) for s in param_specs(config)})
    return Model(*arrange(placed, config, mesh, **options), mesh)


# --- Every family -----------------------------------------------------------------------------------------------------

FAST = (
    ("llama3.1-rope", "tensor=4"),  # key/value heads are repeated
    ("smollm2-odd-heads", "tensor=2"),  # nine heads on two devices
    ("llama4-text", "data=2,tensor=4"),  # experts beside a shared one
)
# Each of the others on one mesh, in turn.
SLOW = [
    pytest.param(case, mesh, marks=pytest.mark.slow)
    for case, mesh in zip(GOLDEN_CASES, cycle(MESHES), strict=False)
    if (case, mesh) not in FAST
]


@pytest.mark.sampled(8)
@pytest.mark.parametrize(("case", "mesh"), [*FAST, *SLOW])
def test_generate_equals_transformers(case: str, mesh: str) -> None:
    """Greedy tokens through `batch_generate` and its cache; logits; and each device holds its own part alone."""
    golden, made = load_golden(case), sharding.make_mesh(mesh)
    source = open_source(GOLDENS / case)
    where = layout.param_sharding(source.config, made)
    params = load_source(source, dtype=jnp.dtype("float32"), sharding=where)
    source.close()
    params, config = arrange(params, source.config, made)
    assert_parts(params, config, made)

    prompts = [row[mask].tolist() for row, mask in zip(golden.tokens, golden.mask, strict=True)]
    outputs = batch_generate(
        Model(params, config, made), None, prompts, max_tokens=golden.greedy.shape[1], ignore_eos=True
    )
    assert [list(output.outputs[0].token_ids) for output in outputs] == golden.greedy.tolist()
    with sharding.on(made):
        logits, _ = run(params, config, golden.tokens, golden.positions)
    assert error(logits, golden.logits, golden.mask) < TOLERANCE
    rows, vocab = layout.partition_spec(param_specs(config)[0], config, made)[0], config.vocab_size
    assert logits.sharding.shard_shape(logits.shape)[2] == vocab // (made.shape["tensor"] if rows else 1)


@pytest.mark.parametrize("mesh", MESHES)
def test_scores_equal_those_of_one_device(mesh: str) -> None:
    """Contexts that are shared, batches that do not fill the data axis."""
    config, rng = tiny_config(num_kv_heads=4), np.random.default_rng(5)
    params = random_params(config)
    contexts = [rng.integers(0, 40, n).tolist() for n in (3, 3, 20)]
    pairs = [(contexts[i], rng.integers(0, 40, n).tolist()) for i, n in ((0, 4), (1, 1), (1, 6), (2, 2), (2, 5))]
    want = lj.score(Model(params, config), None, pairs)
    found = lj.score(on_mesh(params, config, sharding.make_mesh(mesh)), None, pairs)
    for one, other in zip(found, want, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)
        assert one.is_greedy == other.is_greedy


def assert_parts(params: Params, config: LlamaConfig, mesh: Mesh) -> None:
    """Shapes of the parts on the devices, by the numbers of the model alone."""
    tensor = mesh.shape["tensor"]
    heads = 1 if config.num_heads % tensor else tensor
    width = next(w.intermediate_size if isinstance(w, MoeSpec) else w for w in [config.layers[0].mlp])
    layer = params["layers"]["0"]
    kv_heads, hidden = config.num_kv_heads // heads, config.hidden_size
    group = config.num_heads // config.num_kv_heads + 2
    parts = {
        (kv_heads, group, config.head_dim, hidden): layer["attn"]["qkv_proj"]["weight"],
        (hidden, config.q_dim // heads): layer["attn"]["o_proj"]["weight"],
        (config.vocab_size // tensor, hidden): params["embed"]["weight"],
        (hidden,): layer["attn_norm"]["weight"],
    }
    if "mlp" in layer:
        parts[2, width // tensor, hidden] = layer["mlp"]["gate_up_proj"]["weight"]
        parts[hidden, width // tensor] = layer["mlp"]["down_proj"]["weight"]
    else:
        experts = layer["moe"]["experts"]
        parts[len(experts["gate_proj"]["weight"]), width // tensor, hidden] = experts["gate_proj"]["weight"]
    for shape, leaf in parts.items():
        assert {shard.device for shard in leaf.addressable_shards} == set(mesh.devices.flat)
        assert {shard.data.shape for shard in leaf.addressable_shards} == {shape}


@pytest.mark.slow
def test_options_of_generate_on_a_mesh() -> None:
    """A few rows with different settings, repeated prompts, log-probabilities."""
    config = tiny_config(LayerSpec(mlp=24), LayerSpec("sliding", 5, mlp=24), max_position_embeddings=256)
    params = random_params(config)
    one = Model(fuse_params(params, config), config)
    split = on_mesh(params, config, sharding.make_mesh("data=2,tensor=4"))
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    each = [
        SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=1, max_tokens=90, ignore_eos=True),
        SamplingParams(n=2, seed=5, top_k=7, top_p=0.9, max_tokens=30),
        SamplingParams(seed=8, repetition_penalty=1.2, stop_token_ids=[11, 12], max_tokens=40),
    ]
    want = batch_generate(one, None, prompts, each)
    found = batch_generate(split, None, prompts, each)
    for a, b in zip(found, want, strict=True):
        assert [o.token_ids for o in a.outputs] == [o.token_ids for o in b.outputs]
        assert [o.finish_reason for o in a.outputs] == [o.finish_reason for o in b.outputs]
    mine, theirs = (o[0].outputs[0].logprobs for o in (found, want))
    assert mine is not None
    assert theirs is not None
    np.testing.assert_allclose([t.logprob for t in mine], [t.logprob for t in theirs], rtol=1e-4, atol=1e-5)
    streamed = [s.token for s in stream_generate(split, None, prompts[0], max_tokens=5, ignore_eos=True)]
    assert tuple(streamed) == want[0].outputs[0].token_ids[:5]


# --- Functions on a mesh ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_adapters_on_a_mesh(name: str) -> None:
    """Low-rank adapters, also of a shared expert, which is computed on each device's part."""
    config = TINY[name]
    params, adapters, tokens = random_params(config), random_adapters(config), random_tokens(config, 2, 6)
    ids = jnp.array([[1, 1, 0, 2, 2, 1], [0, 0, 0, 1, 2, 1]])
    expected, _ = run(params, config, tokens, adapters=in_slots(adapters, adapters), adapter_ids=ids)
    mesh = sharding.make_mesh("data=2,tensor=2")
    model = on_mesh(params, config, mesh, fuse=name != "plain")
    with sharding.on(mesh):
        slots = empty_slots(model.config, slots=3, rank=4, dtype="float32")
        for slot in (1, 2):
            slots = put_adapter(slots, slot, repeat_kv_heads(adapters, config, model.config))
        logits, _ = run(model.params, model.config, tokens, adapters=slots, adapter_ids=ids)
    split = slots["layers"]["0"]["attn"]["o_proj"]["a"]
    assert split.sharding.shard_shape(split.shape) == (3, 4, config.q_dim // 2)
    assert error(logits, expected) < 1e-5


@pytest.mark.parametrize("name", ["biased", "tied-mqa"])
def test_peft_adapters_on_a_mesh(name: str) -> None:
    """Attached, merged and, of one model, in an engine's slots: magnitudes, biases and repeated key/value heads."""
    config = TINY[name]
    params, tokens = random_params(config), random_tokens(config, 2, 6)
    lora = LoraConfig(2, 4, dora=True, bias="all", target_modules="all-linear", modules_to_save=("k_proj", "lm_head"))
    fresh = new_adapter(params, config, lora, jax.random.key(0))
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: np.asarray(x + 0.3 * rng.standard_normal(x.shape), np.float32), fresh)
    expected, _ = run(*attach(params, config, adapter), tokens)
    model = on_mesh(params, config, sharding.make_mesh("tensor=4"))
    for change in (attach, merge):
        with sharding.on(model.mesh):
            changed, own = change(model.params, model.config, adapter)
            logits, _ = run(changed, own, tokens)
        assert error(logits, expected) < 2e-5, change.__name__
    if name == "biased":
        return
    mixed = replace(adapter, whole={})
    one = Model(params, config, adapters={"a": mixed})
    options = {"max_tokens": 8, "ignore_eos": True, "adapter": ["", "a", "a"]}
    prompts, settings = [[1, 2, 3], [1, 2, 3], [4, 5]], small_settings()
    want = LLM(one, settings=settings).generate(prompts, **options)
    found = LLM(replace(model, adapters={"a": mixed}), settings=settings).generate(prompts, **options)
    assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in want]
    assert len({o.outputs[0].token_ids for o in want}) == 3


@pytest.mark.parametrize("heads", [(8, 4), (9, 3), (4, 2)], ids=["split", "odd", "fewer than devices"])
@pytest.mark.parametrize("backend", ["reference", "pallas_interpret"])
def test_attention_runs_on_local_heads(heads: tuple[int, int], backend: str) -> None:
    """Where they divide, every device sees only its own; a Pallas kernel could not be dealt out otherwise."""
    q_heads, kv_heads = heads
    mesh, rng = sharding.make_mesh("data=2,tensor=4"), np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 1, q_heads, 16)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((2, kv_heads, 32, 16)), jnp.float32) for _ in range(2))
    q_positions, kv_positions = jnp.asarray([[31], [20]]), jnp.tile(jnp.arange(32), (2, 1))
    args = Places(q_positions, kv_positions), Rule(Visibility(), 0.25)
    expected = attention_reference(q, KeysValues(k, v), *args)

    def compute(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, KeysValues(k, v), *args, backend=backend)

    with sharding.on(mesh):
        out = jax.jit(compute)(q, k, v)
        text = str(jax.make_jaxpr(compute)(q, k, v))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    local = 4 if kv_heads % 4 == 0 else 1
    assert f"[1,{kv_heads // local},32,16]" in text
    assert out.sharding.shard_shape(out.shape)[2] == q_heads // local


@pytest.mark.slow
def test_generate_with_kernels_on_a_mesh() -> None:
    """Prefill, decode steps and experts through the Pallas kernels, each on what a device has."""
    mixture = MoeSpec(4, 2, 32, router="sigmoid", shared_intermediate_size=32)
    config = tiny_config(LayerSpec(mlp=mixture), num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=32)
    params, prompts = random_params(config), [[1, 2, 3], [4, 5, 6, 7]]
    one = Model(fuse_params(params, config), config)
    want = batch_generate(one, None, prompts, max_tokens=4, ignore_eos=True)
    split = on_mesh(params, config, sharding.make_mesh(tensor=2))
    with using(**dict.fromkeys(OPERATIONS, "pallas_interpret")):
        found = batch_generate(split, None, prompts, max_tokens=4, ignore_eos=True)
        with sharding.on(split.mesh):
            text = str(jax.make_jaxpr(run, static_argnums=1)(split.params, config, random_tokens(config, 2, 16)))
    assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in want]
    assert text.count("pallas_call") >= 2
    # This model has no quantised weights and no adapters, and no product is fused on a mesh.
    plain = set(OPERATIONS) - {"quantized_matmul", "integer_matmul", "quantized_moe", "fused_matmul", "add_lora"}
    assert {choice.operation for choice in report() if choice.backend == "pallas_interpret"} == plain
    assert "shard_map" in text


@pytest.mark.slow
def test_gradients_on_a_mesh() -> None:
    config = TINY["sigmoid-moe"]
    params, tokens = random_params(config), random_tokens(config, 2, 6)
    fused = fuse_params(params, config)

    def loss(params: Params) -> jax.Array:
        logits, _ = run(params, config, tokens)
        return jnp.mean(jax.nn.log_softmax(logits)[..., 0])

    expected = jax.grad(loss)(fused)
    mesh = sharding.make_mesh("data=2,tensor=2")
    model = on_mesh(params, config, mesh)
    with sharding.on(mesh):
        found = jax.jit(jax.grad(loss))(model.params)
    for name, leaf in flatten(expected).items():
        assert error(flatten(found)[name], leaf) < 1e-4, name


# --- Communication ----------------------------------------------------------------------------------------------------

COLLECTIVE = re.compile(r" = (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(")


def collectives(hlo: str) -> Counter[tuple[str, int]]:
    """Kind and number of elements of what each collective in a program's text brings; a loop's body counts once."""
    found: Counter[tuple[str, int]] = Counter()
    for line in hlo.splitlines():
        if match := COLLECTIVE.search(line):
            for shape in re.findall(r"\w+\[([\d,]*)\]", match[1]):
                found[match[2], int(np.prod([int(n) for n in shape.split(",") if n]))] += 1
    return found


def abstract_model(name: str, layers: int, mesh: Mesh) -> tuple[Params, LlamaConfig]:
    """A preset's fused parameters as shapes with places; nothing is allocated."""
    config = preset(name)
    config = layout.split_config(config.replace(layers=config.layers[:layers]), mesh)
    specs = {s.name: layout.partition_spec(s, config, mesh) for s in param_specs(config)}

    def place(name: str, leaf: Any) -> Any:
        axes = PROJECTION_AXES.get(name.split(".")[-2], ())
        over = (sharding.RULES.get(a or "", (None,))[0] for a in axes)
        spec = specs.get(name) or PartitionSpec(*(o if o in mesh.shape else None for o in over))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    fused = jax.eval_shape(lambda p: fuse_params(p, config), abstract_params(config, jnp.bfloat16))
    return unflatten({n: place(n, leaf) for n, leaf in flatten(fused).items()}), config


def compiled(name: str, layers: int, mesh: Mesh, step: str, params: SamplingParams, batch: int = 8) -> str:
    """The optimised program of a decode step, or of a prefill of 256 tokens a row."""
    with sharding.on(mesh):
        if step == "prefill":
            config = preset(name)
            config = config.replace(layers=config.layers[:layers])
            program = prefill_program(config, mesh, batch=batch, capacity=512, chunk=256, dtype="bfloat16")
            return str(program.lower().compile().as_text())
        model, config = abstract_model(name, layers, mesh)
        profile, sampler = make_sampler([params] * batch, [[1]] * batch, config.vocab_size)

        def decode_step(model: Params, tokens: jax.Array, cache: DenseCache, sampler: SamplerState) -> Any:
            logits, cache = forward(model, config, tokens[:, None], tokens[:, None], cache)
            return sample(logits[:, 0], sampler, profile), cache

        tokens = jax.ShapeDtypeStruct((batch,), jnp.int32)
        cache = jax.eval_shape(lambda: DenseCache.create(config, batch, 512, jnp.bfloat16))
        of_kv = NamedSharding(mesh, PartitionSpec(*(a if a in mesh.shape else None for a in ("data", "tensor"))))
        cache = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=of_kv) if x.ndim == 4 else x, cache
        )
        return str(jax.jit(decode_step, donate_argnums=2).lower(model, tokens, cache, sampler).compile().as_text())


# The larger model has its first layer, one in the middle and the last: the others are like the one in the middle.
STEPS = [
    *(("llama-3.1-8b", 2, *step) for step in (("decode", 1), ("decode", 8), ("prefill", 8), ("prefill", 32))),
    *(pytest.param("llama-3.1-70b", 3, *step, marks=pytest.mark.slow) for step in (("decode", 8), ("prefill", 32))),
]


@pytest.mark.parametrize(("name", "layers", "step", "batch"), STEPS)
def test_two_sums_a_layer_and_nothing_else(name: str, layers: int, step: str, batch: int) -> None:
    """Beside them one of the embedding, and of the greedy sampler one number and one index a row from each device.

    Prefill sums the last layer for one token a row, and long ones sum in two pieces.
    """
    mesh = sharding.make_mesh(tensor=8)
    config = preset(name)
    hlo = compiled(name, layers, mesh, step, SamplingParams(temperature=0.0), batch)
    row = config.hidden_size
    if step == "decode":
        expected = Counter({("all-reduce", batch * row): 2 * layers + 1, ("all-gather", 2 * 8 * batch): 1})
    else:
        pieces = 2 if batch == 32 else 1
        expected = Counter({("all-reduce", batch * row): 2})
        expected["all-reduce", batch * 256 // pieces * row] += pieces * (2 * (layers - 1) + 1)
    assert collectives(hlo) == expected


@pytest.mark.parametrize("page_size", [None, pytest.param(16, marks=pytest.mark.slow)])
def test_prefill_in_pieces(page_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of unlike lengths, one of them shorter than the second piece; then tokens that follow, in the functional
    loop."""
    golden = load_golden("llama3.1-rope")
    texts = [np.random.default_rng(n).integers(0, golden.config.vocab_size, n).tolist() for n in (3, 20, 41)]
    mesh = sharding.make_mesh("data=2,tensor=2")
    model = on_mesh(golden.params, golden.config, mesh)
    one = Model(fuse_params(golden.params, golden.config), golden.config)
    want = batch_generate(one, None, texts, max_tokens=8, ignore_eos=True)

    monkeypatch.setattr(buckets, "PIECE_TOKENS", 16)
    prefill_module.prefill_chunk.clear_cache()
    with sharding.on(mesh):
        assert buckets.pieces(2, buckets.prompt_bucket(41), sharding.ways("mlp")) == 2
        cache: Any = NewCache(4, 80, jnp.dtype(jnp.float32), page_size)
        logits, cache = prefill_module.prefill(model.params, model.config, texts, cache)
    assert [int((row >= 0).sum()) for row in cache.positions[:3]] == [3, 20, 41]
    for row, text in enumerate(texts):
        expected, _ = run(golden.params, golden.config, jnp.asarray([text]))
        assert error(logits[row], expected[0, -1]) < TOLERANCE
    greedy = SamplingParams(temperature=0.0, ignore_eos=True)
    profile, sampler = make_sampler([greedy] * 4, [()] * 4, model.config.vocab_size)
    lengths, limits, adapters = (np.asarray(x, np.int32) for x in ([3, 20, 41, 1], [8, 8, 8, 0], [0] * 4))
    with sharding.on(mesh):
        state, first = loop.begin(logits, cache, sampler, lengths, limits, adapters, profile=profile)
        _, rest = loop.advance(model.params, state, np.int32(7), config=model.config, profile=profile, stride=8)
    found = np.concatenate([first.tokens, rest.tokens], axis=1)[:3, :8]
    assert found.tolist() == [list(output.outputs[0].token_ids) for output in want]
    prefill_module.prefill_chunk.clear_cache()


def test_pages_never_cross_the_data_axis() -> None:
    """Each replica has a pool of its own: a decode step of rows over eight of them sends nothing."""
    config = tiny_config()
    mesh = sharding.make_mesh(data=8)
    model = on_mesh(random_params(config), config, mesh)
    profile, sampler = make_sampler([SamplingParams(temperature=0.0)] * 16, [[1]] * 16, config.vocab_size)
    step = jax.jit(loop.decode_step, static_argnames=("config", "profile"), donate_argnames="state")
    with sharding.on(mesh):
        cache: Any = jax.jit(lambda: NewCache(16, 32, jnp.dtype(jnp.float32), 16).create(config))()
        assert (cache.replicas, cache.pages) == (8, 4)
        assert cache.k[0].sharding.spec[0] == "data"
        assert cache.page_table.max() == 3
        state = jax.jit(lambda *parts: loop.by_rows(loop.idle_state(*parts)))(cache, sampler)
        hlo = step.lower(model.params, state, config=model.config, profile=profile).compile().as_text()
        assert not collectives(str(hlo))
        for change in (
            lambda: cache.select(jnp.zeros(2, int)),
            lambda: cache.fork(jnp.zeros(1, int), jnp.ones(1, int)),
        ):
            with pytest.raises(RequestError, match="8 pools"):
                change()
    with pytest.raises(RequestError, match="replicas"):
        cache.extend(jnp.zeros((16, 1), jnp.int32))


@pytest.mark.parametrize("widths", [(16, 32), (16, 36), (12, 32)])
def test_a_mixture_is_summed_once(widths: tuple[int, int]) -> None:
    """Routed and shared experts of a layer in one message; a width that does not divide sends nothing."""
    mesh = sharding.make_mesh(tensor=8)
    experts, shared = widths
    mixture = MoeSpec(4, 2, experts, router="sigmoid", shared_intermediate_size=shared)
    config = tiny_config(LayerSpec(mlp=mixture), num_heads=8, num_kv_heads=8)
    params, tokens = random_params(config), random_tokens(config, 2, 3)
    model = on_mesh(params, config, mesh)
    with sharding.on(mesh):
        program = run.lower(model.params, config, tokens).compile()
        logits, _ = run(model.params, config, tokens)
    assert collectives(str(program.as_text())) == {("all-reduce", 2 * 3 * config.hidden_size): 3}
    assert error(logits, run(params, config, tokens)[0]) < 1e-5


def test_rows_of_a_batch_never_meet() -> None:
    """Over "data" nothing is sent; the sums stay among the devices of a group."""
    mesh = sharding.make_mesh("data=2,tensor=4")
    hlo = compiled("llama-3.1-8b", 1, mesh, "decode", SamplingParams(temperature=0.0))
    assert collectives(hlo) == {("all-reduce", 4 * 4096): 3, ("all-gather", 2 * 4 * 4): 1}
    for step in ("decode", "prefill"):
        alone = compiled("llama-3.1-8b", 1, sharding.make_mesh(data=8), step, SamplingParams(temperature=0.0))
        assert not collectives(alone)


def test_sampling_sends_candidates_only() -> None:
    """Of 128,256 logits a row each of 8 devices sends 128 and a few sums; more only in the branch for flat rows."""
    sampled = SamplingParams(temperature=0.7, top_k=40, top_p=0.9, seed=1)
    hlo = compiled("llama-3.1-8b", 1, sharding.make_mesh(tensor=8), "decode", sampled)
    sizes = {key: n for key, n in collectives(hlo).items() if key != ("all-reduce", 8 * 4096)}
    assert max(size for _, size in sizes) == 8 * 8 * 128
    gathers = {size: n for (kind, size), n in sizes.items() if kind == "all-gather"}
    # Candidates; the drawn token, of which the program has three ways.
    assert gathers == {8 * 8 * 128: 1, 2 * 8 * 8: 3}


# --- Through the public doors -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat") / "tiny", layers=2)


def test_load_and_generate(folder: Path) -> None:
    """Leaves that stay whole or are repeated are reported; fused and canonical trees give the same text."""
    plain, tokenizer = load(folder)
    want = generate(plain, tokenizer, "The quick", max_tokens=6)
    for fuse in (True, False):
        said: list[str] = []
        model, _ = load(folder, mesh=sharding.make_mesh(tensor=4), fuse=fuse, notify=said.append)
        assert generate(model, tokenizer, "The quick", max_tokens=6) == want
        notes = [str(s) for s in layout.explain(plain.config, {"tensor": 4}) if s.note]
        assert [line for line in said if "tensor=4" in line] == notes
        assert notes


def test_command_line(folder: Path) -> None:
    from llama_jax.cli import cli

    def run_cli(*args: str) -> Any:
        result = CliRunner().invoke(cli, list(args))
        assert result.exit_code == 0, result.output
        return result

    args = ("generate", "The", "-m", str(folder), "--max-tokens", "4", "--json", "--quiet")
    alone, split = (json.loads(run_cli(*args, *more).stdout) for more in ((), ("--mesh", "data=2,tensor=4")))
    assert split["token_ids"] == alone["token_ids"]
    assert split["device"] == "8 x cpu (data=2, tensor=4)"
    text = run_cli("show", str(folder), "--tp", "4").stdout
    assert "vocab" in text.split("sharding:")[1]
    failed = CliRunner().invoke(cli, ["generate", "The", "-m", str(folder), "--tp", "16"])
    assert "needs 16 devices; there are 8" in failed.output
    assert failed.exit_code == 5


@pytest.mark.slow
def test_bench_and_batches(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench` and `batch` take the same options; a file's results are those of one device."""
    from llama_jax.cli import cli

    monkeypatch.setattr(bench, "measure_ceilings", lambda dtype: bench.Ceilings(1e9, 1e9))
    args = ["bench", "-m", str(folder), "--batch", "3", "--prompt", "4", "--new", "3", "--repeats", "1", "--json"]
    result = CliRunner().invoke(cli, [*args, "--mesh", "data=2,tensor=2"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["device"] == "4 x cpu (data=2, tensor=2)"

    (tmp_path / "in.jsonl").write_text('{"prompt": "The"}\n{"prompt": "a", "temperature": 1}\n{"prompt": "Quick"}\n')
    results = []
    for name, more in (("one", ()), ("split", ("--mesh", "data=2,tensor=4"))):
        target = tmp_path / f"{name}.jsonl"
        command = ["batch", str(tmp_path / "in.jsonl"), str(target), "-m", str(folder), *more]
        result = CliRunner().invoke(cli, [*command, "--max-tokens", "5", "--quiet"])
        assert result.exit_code == 0, result.output
        results.append(target.read_text())
    assert results[0] == results[1]


@pytest.mark.slow
def test_random_models_are_made_in_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    config = preset("smollm2-135m")
    monkeypatch.setattr(bench, "preset", lambda name: config.replace(layers=config.layers[:2]))
    model = random_model("smollm2-135m", "bfloat16", sharding.make_mesh(tensor=3))
    assert model.config.num_kv_heads == 3
    leaf = model.params["layers"]["0"]["mlp"]["gate_up_proj"]["weight"]
    assert {s.data.shape for s in leaf.addressable_shards} == {(2, 512, 576)}
    assert float(jnp.std(leaf.astype(jnp.float32))) == pytest.approx(576**-0.5, rel=0.05)
