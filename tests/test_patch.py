"""Patches of activations against the same change made to weights, and attention maps against numpy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN_CASES, TINY, TOLERANCE, error, load_golden, random_params, random_tokens, run, tiny_config
from test_model import EVERY_VISIBILITY

import llama_jax as lj
from llama_jax.adapters import LoraConfig, attach, new_adapter
from llama_jax.cache import DenseCache
from llama_jax.config import LayerSpec, MoeSpec
from llama_jax.errors import RequestError
from llama_jax.model import activation_names, forward, transformer
from llama_jax.model.fuse import fuse_params
from llama_jax.model.loaded import Model
from llama_jax.params import Params, flatten, unflatten

FAST = {"llama4-text", "mistral-short-window"}
EVERY_CASE = [pytest.param(case, marks=() if case in FAST else pytest.mark.slow, id=case) for case in GOLDEN_CASES]


def without(x: jax.Array, _: Any, index: jax.Array) -> jax.Array:
    """An activation without some heads or neurons, those of axis 2."""
    return x.at[:, :, index].set(0)


def changed(params: Params, leaf: str, columns: slice, value: float = 0.0) -> Params:
    """Parameters with some inputs of a projection cut off."""
    flat = flatten(params)
    return unflatten(flat | {leaf: flat[leaf].at[:, columns].set(value)})


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", EVERY_CASE)
def test_ablated_heads_and_neurons_are_as_weights_of_zero(case: str) -> None:
    g = load_golden(case)
    last, width = g.config.num_layers - 1, g.config.head_dim
    params = changed(g.params, "layers.0.attn.o_proj.weight", slice(width, 2 * width))
    patch = lj.patch({"layers.0.attn_heads": without}, jnp.array([1]))
    if not isinstance(g.config.layers[last].mlp, MoeSpec):
        params = changed(params, f"layers.{last}.mlp.down_proj.weight", slice(3, 5))
        patch |= lj.patch({f"layers.{last}.mlp_hidden": without}, jnp.array([3, 4]))
    expected, _ = run(params, g.config, g.tokens, g.positions)
    fused = fuse_params(g.params, g.config)
    found, _ = run(fused, g.config, g.tokens, g.positions, patch=patch)
    assert error(found, expected, g.mask) < 1e-5
    assert error(found, g.logits, g.mask) > 1e-4  # the ablation changes something


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", [*EVERY_CASE[1:], EVERY_CASE[0]])
def test_attention_maps_give_the_golden_logits(case: str) -> None:
    """The weights as they are: computed apart, they lead to the logits of Hugging Face's transformers."""
    g = load_golden(case)
    logits, _, seen = run(g.params, g.config, g.tokens, g.positions, capture=("layers.*.attn_probs",))
    assert error(logits, g.logits, g.mask) < TOLERANCE
    assert len(seen) == g.config.num_layers
    for maps in seen.values():
        chex.assert_shape(maps, (len(g.tokens), g.config.num_heads, *g.tokens.shape[1:] * 2))
        np.testing.assert_allclose(
            np.asarray(maps).sum(-1), np.broadcast_to(g.mask[:, None], maps.shape[:3]), atol=1e-5
        )


def test_attention_maps_by_hand() -> None:
    """Of every kind of visibility, from the queries and keys, in numpy."""
    params, tokens = random_params(EVERY_VISIBILITY), random_tokens(EVERY_VISIBILITY, 2, 9)
    _, _, seen = run(params, EVERY_VISIBILITY, tokens, capture=("layers.*.q", "layers.*.k"))
    maps = np.asarray(jax.jit(lj.attention_maps, static_argnums=1)(params, EVERY_VISIBILITY, tokens))
    query, key = np.arange(9)[:, None], np.arange(9)[None]
    sees = [key <= query] * 4
    sees[1] = sees[1] & (query - key < 3)
    sees[2] = sees[2] & (query // 4 == key // 4)
    for i, see in enumerate(sees):
        q, k = (np.asarray(seen[f"layers.{i}.{name}"], np.float64) for name in "qk")
        logits = np.einsum("bqhd,bkhd->bhqk", q, k.repeat(2, axis=2)) * EVERY_VISIBILITY.head_dim**-0.5
        weights = np.where(see, np.exp(logits - logits.max(-1, keepdims=True)), 0)
        assert np.abs(maps[i] - weights / weights.sum(-1, keepdims=True)).max() < 1e-6


@pytest.mark.parametrize("name", TINY)
def test_activations_of_another_text(name: str) -> None:
    """Whatever is patched in at the end of a block decides all that follows; and functions see where they are."""
    config = TINY[name]
    params, one, other = random_params(config), random_tokens(config, 2, 6), random_tokens(config, 2, 6, seed=1)
    expected, _, seen = run(params, config, other, capture=("layers.*.out",))
    last = f"layers.{config.num_layers - 1}.out"
    patch = lj.patch({last: replaced}, seen[last])
    found, _, after = run(params, config, one, patch=patch, capture=("layers.*.out", "final_norm"))
    assert error(found, expected) < 1e-5
    np.testing.assert_array_equal(after[last], seen[last])

    half, _ = run(params, config, one, patch=lj.patch({last: from_position}, seen[last], jnp.int32(4)))
    assert error(half[:, 4:], expected[:, 4:]) < 1e-5
    assert error(half[:, :4], run(params, config, one)[0][:, :4]) < 1e-5


def replaced(_: jax.Array, place: Any, by: jax.Array) -> jax.Array:
    return by


def from_position(x: jax.Array, place: Any, by: jax.Array, first: jax.Array) -> jax.Array:
    return jnp.where((place.positions >= first)[..., None], by, x)


def in_layer(x: jax.Array, place: Any, layer: jax.Array, vector: jax.Array) -> jax.Array:
    return jnp.where(place.layer == layer, x + vector, x)


def plus(x: jax.Array, place: Any, vector: jax.Array) -> jax.Array:
    return x + vector


@contextmanager
def traced_layers() -> Iterator[list[Any]]:
    """Counts the traces of blocks: the patches of each."""
    found: list[Any] = []
    inner, before = transformer._layer, transformer._layer.__wrapped__

    def counted(*args: Any, **kwargs: Any) -> Any:
        found.append(args[9])
        return before(*args, **kwargs)

    transformer._layer = jax.jit(counted, static_argnames=("spec", "dims", "capture", "in_order", "chunk_rows"))
    try:
        yield found
    finally:
        transformer._layer = inner


@pytest.mark.slow
def test_one_trace_for_equal_layers_and_one_program_for_a_sweep() -> None:
    config = tiny_config(*[LayerSpec(mlp=24)] * 6)
    params, tokens = random_params(config), random_tokens(config, 1, 5)
    vector = jnp.linspace(-1, 1, config.hidden_size)
    with traced_layers() as traced:  # the first block is one of its own: nothing is added before its norm
        forward(params, config, tokens, patch=lj.patch({"layers.3.out": plus}, vector))
    assert [sorted(patches) for patches in traced] == [[], [], ["out"]]
    with traced_layers() as traced:
        forward(params, config, tokens, patch=lj.patch({"layers.*.out": plus}, vector))
    assert len(traced) == 2

    @jax.jit
    def sweep(params: Params, tokens: jax.Array) -> jax.Array:
        def one(layer: jax.Array) -> jax.Array:
            return forward(params, config, tokens, patch=lj.patch({"layers.*.out": in_layer}, layer, vector))[0]

        return jax.lax.scan(lambda _, layer: (None, one(layer)), None, jnp.arange(config.num_layers))[1]

    swept = sweep(params, tokens)
    for i in (0, 2, 5):
        alone, _ = run(params, config, tokens, patch=lj.patch({f"layers.{i}.out": plus}, vector))
        assert error(swept[i], alone) < 1e-5
    # A closure over a traced value is as good as an argument.
    closed = jax.jit(lambda v: forward(params, config, tokens, patch=lj.patch({"layers.2.out": lambda x, _: x + v}))[0])
    assert error(closed(vector), run(params, config, tokens, patch=lj.patch({"layers.2.out": plus}, vector))[0]) < 1e-5


@pytest.mark.slow
def test_patch_in_decoding() -> None:
    """Token by token with a cache as for all tokens at once, and in the functional loop."""
    config = TINY["sigmoid-moe"]
    params, tokens = random_params(config), random_tokens(config, 2, 7)
    patch = lj.patch({"layers.*.attn_out": plus, "layers.1.out": plus, "embed": plus}, jnp.float32(0.3))
    patch |= lj.patch({"final_norm": plus}, jnp.float32(0.1))
    expected, _ = run(params, config, tokens, patch=patch)
    cache = DenseCache.create(config, 2, 8, jnp.float32)
    positions = np.broadcast_to(np.arange(7, dtype=np.int32), (2, 7))
    for i in range(7):
        at = slice(i, i + 1)
        logits, cache = run(params, config, tokens[:, at], positions[:, at], cache, patch=patch)
        assert error(logits[:, 0], expected[:, i]) < 1e-5

    model = Model(params, config)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    found = lj.patched_generate(model, None, prompts, patch, max_tokens=6, ignore_eos=True)
    for prompt, new in zip(prompts, found, strict=True):
        logits, _ = run(params, config, jnp.asarray([prompt + new]), patch=patch)
        np.testing.assert_array_equal(logits[0, len(prompt) - 1 : -1].argmax(-1), new)
    options = {"max_tokens": 6, "ignore_eos": True, "seed": 3, "temperature": 1.0}
    plain = lj.batch_generate(model, None, prompts, **options)
    unchanged = lj.patched_generate(model, None, prompts, lj.patch({}), **options)
    assert [list(o.outputs[0].token_ids) for o in plain] == unchanged
    assert unchanged != lj.patched_generate(model, None, prompts, patch, **options)


@pytest.mark.slow
def test_gradients() -> None:
    config = TINY["sigmoid-moe"]
    params, tokens = random_params(config), random_tokens(config, 1, 5)

    def loss(logits: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(logits[:, -1]).sum()

    @jax.jit
    def of(vector: jax.Array) -> jax.Array:
        return loss(forward(params, config, tokens, patch=lj.patch({"layers.0.out": plus}, vector))[0])

    zero = jnp.zeros(config.hidden_size)
    steer, step = jax.jit(jax.grad(of))(zero), 1e-2
    slope = (of(zero.at[3].set(step)) - of(zero.at[3].set(-step))) / (2 * step)
    assert abs(steer[3] - slope) < 1e-3 * float(jnp.abs(steer).max())

    names = ("layers.*.out", "embed")
    value, found = jax.jit(lambda p, t: lj.activation_gradients(loss, p, config, t, names=names))(params, tokens)
    assert abs(value - of(zero)) < 1e-5
    assert set(found) == {"layers.0.out", "layers.1.out", "embed"}
    chex.assert_trees_all_close(found["layers.0.out"].sum((0, 1)), steer, atol=1e-5)
    embeds = params["embed"]["weight"][tokens]
    expected = jax.jit(jax.grad(lambda x: loss(forward(params, config, None, inputs_embeds=x)[0])))(embeds)
    chex.assert_trees_all_close(found["embed"], expected, atol=1e-5)


def test_lens_and_head_outputs() -> None:
    config = tiny_config(LayerSpec(mlp=24), LayerSpec(mlp=24), o_bias=True)
    params, tokens = random_params(config), random_tokens(config, 2, 6)
    logits, _, seen = run(params, config, tokens, capture=("layers.*.attn_heads", "layers.*.attn_out"))
    at = jnp.array([[1, 3], [5, 0]])
    lens = lj.logit_lens(params, config, tokens, at=at)
    chex.assert_trees_all_close(lens[-1], jnp.take_along_axis(logits, at[..., None], axis=1), atol=1e-5)
    shorter = config.replace(layers=config.layers[:1])
    chex.assert_trees_all_close(
        lj.logit_lens(params, config, tokens, layers=[0])[0, :, 0], run(params, shorter, tokens)[0][:, -1], atol=1e-5
    )
    each = lj.head_outputs(params, config, 1, seen["layers.1.attn_heads"])
    chex.assert_shape(each, (2, 6, config.num_heads, config.hidden_size))
    total = each.sum(2) + params["layers"]["1"]["attn"]["o_proj"]["bias"]
    chex.assert_trees_all_close(total, seen["layers.1.attn_out"], atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_heads_of_an_adapted_model(dora: bool) -> None:
    config = tiny_config()
    params, tokens = random_params(config), random_tokens(config, 2, 6)
    lora = LoraConfig(rank=2, alpha=4, dora=dora, target_modules=("o_proj",))
    adapter = jax.tree.map(lambda x: x + 0.3, new_adapter(params, config, lora, jax.random.key(0)))
    params, config = attach(params, config, adapter)
    _, _, seen = run(params, config, tokens, capture=("layers.*.attn_heads", "layers.*.attn_out"))
    each = lj.head_outputs(params, config, 0, seen["layers.0.attn_heads"])
    chex.assert_trees_all_close(each.sum(2), seen["layers.0.attn_out"], atol=1e-5)


def test_refusals() -> None:
    config = TINY["sigmoid-moe"]
    params, tokens = random_params(config), random_tokens(config, 1, 4)

    def patched(changes: dict[str, Any]) -> Any:
        return forward(params, config, tokens, patch=lj.patch(changes))

    cache = DenseCache.create(config, 1, 4, jnp.float32)
    for hint, call in {
        "layers.1.attn_out": lambda: patched({"layers.1.atn_out": plus}),
        "layers.0.out": lambda: forward(params, config, tokens, capture=["layer.0.out"]),
        "activation_names": lambda: patched({"*": plus} | {"?": plus}),
        "jnp.where": lambda: patched({"embed": lambda x, _: x[:, :2]}),
        "give a function": lambda: patched({"embed": 0}),
        "without a cache": lambda: forward(
            params, config, tokens, jnp.arange(4)[None], cache, capture=["layers.0.attn_probs"]
        ),
        "from 0 to 1": lambda: lj.logit_lens(params, config, tokens, layers=[2]),
        "no layer is named": lambda: lj.attention_maps(params, config, tokens, layers=[]),
        "stop_token_ids": lambda: lj.patched_generate(Model(params, config), None, [[1]], lj.patch({}), n=2),
    }.items():
        with pytest.raises(RequestError, match=hint):
            call()
    assert "layers.0.attn_probs" not in activation_names(config)
    assert lj.patched_generate(Model(params, config), None, [], lj.patch({})) == []
