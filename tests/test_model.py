"""`forward` against Hugging Face transformers, against itself along other paths, and under jax's transformations."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    GOLDEN_CASES,
    TINY,
    TOLERANCE,
    Golden,
    arange_positions,
    error,
    in_slots,
    load_golden,
    merge_adapters,
    random_adapters,
    random_params,
    random_tokens,
    run,
    tiny_config,
)

from llama_jax.cache import DenseCache
from llama_jax.config import LayerSpec, LlamaConfig, QueryScale, RopeSpec, preset
from llama_jax.errors import RequestError
from llama_jax.model import activation_names, forward
from llama_jax.model.fuse import fuse_params
from llama_jax.params import Params, abstract_params, flatten, init_params, projection_names, unflatten

# Cases that between them hold every feature; the others run where a test is marked slow.
REPRESENTATIVE = {
    "llama-biases",
    "llama-mqa",
    "llama-rope-dynamic",
    "llama4-text",
    "mistral-short-window",
    "mixtral-moe",
    "qwen3-qknorm",
    "smollm3-window",
}
EVERY_CASE = [
    pytest.param(case, marks=() if case in REPRESENTATIVE else pytest.mark.slow, id=case) for case in GOLDEN_CASES
]


def filled_cache(golden: Golden, extra: int = 0) -> DenseCache:
    """An empty cache."""
    batch, length = golden.tokens.shape
    return DenseCache.create(golden.config, batch, length + extra, jnp.float32)


def prefill(golden: Golden, cache: DenseCache, chunk: int) -> tuple[np.ndarray, DenseCache]:
    """Logits of all tokens, given to the model `chunk` at a time; the last chunk is filled up with padding."""
    length = golden.tokens.shape[1]
    pad = -length % chunk
    tokens = np.pad(golden.tokens, ((0, 0), (0, pad)))
    positions = np.pad(golden.positions, ((0, 0), (0, pad)), constant_values=-1)
    out = []
    for start in range(0, length + pad, chunk):
        stop = start + chunk
        part = tokens[:, start:stop], positions[:, start:stop], cache
        logits, cache = run(golden.params, golden.config, *part, rope_lengths=golden.lengths)
        out.append(np.asarray(logits))
    return np.concatenate(out, axis=1)[:, :length], cache


# ---- golden cases


def test_there_are_golden_cases() -> None:
    assert len(GOLDEN_CASES) >= 29


@pytest.mark.parametrize("case", EVERY_CASE)  # test_verification.py puts every case through convert and verify
def test_golden(case: str) -> None:
    """Left- and right-padded rows without a cache, and all tokens at once with one."""
    g = load_golden(case)
    logits, none = run(g.params, g.config, g.tokens, g.positions)
    assert none is None
    assert logits.dtype == jnp.float32
    assert error(logits, g.logits, g.mask) < TOLERANCE

    order = np.argsort(~g.mask, axis=1, kind="stable")  # padding to the right
    right = [np.take_along_axis(x, order, axis=1) for x in (g.tokens, g.positions, g.mask)]
    logits, _ = run(g.params, g.config, right[0], right[1])
    assert error(np.asarray(logits)[right[2]], g.logits[g.mask]) < TOLERANCE

    logits, cache = run(g.params, g.config, g.tokens, g.positions, filled_cache(g), rope_lengths=g.lengths)
    assert error(logits, g.logits, g.mask) < TOLERANCE
    np.testing.assert_array_equal(cache.positions, g.positions)


# Of these two every case runs one, for which their lists begin one apart.
@pytest.mark.slow
@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", EVERY_CASE)
def test_golden_token_by_token(case: str) -> None:
    """A prefill in chunks of one token, then greedy decoding: the same compiled step throughout."""
    g = load_golden(case)
    steps = g.greedy.shape[1]
    logits, cache = prefill(g, filled_cache(g, extra=steps), chunk=1)
    assert error(logits, g.logits, g.mask) < TOLERANCE
    last, generated = logits[:, -1], []
    for step in range(steps):
        generated.append(np.argmax(last, axis=-1).astype(np.int32))
        positions = (g.lengths + step)[:, None].astype(np.int32)
        out, cache = run(g.params, g.config, generated[-1][:, None], positions, cache, rope_lengths=g.lengths)
        last = np.asarray(out)[:, 0]
    np.testing.assert_array_equal(np.stack(generated, axis=1), g.greedy)


@pytest.mark.slow
@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", [*EVERY_CASE[1:], EVERY_CASE[0]])
def test_golden_in_chunks(case: str) -> None:
    g = load_golden(case)
    logits, _ = prefill(g, filled_cache(g, extra=7), chunk=7)
    assert error(logits, g.logits, g.mask) < TOLERANCE


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", EVERY_CASE)
def test_golden_fused(case: str) -> None:
    g = load_golden(case)
    logits, _ = run(fuse_params(g.params, g.config), g.config, g.tokens, g.positions)
    assert error(logits, g.logits, g.mask) < TOLERANCE


def _layers(config: LlamaConfig, **changes: object) -> LlamaConfig:
    layers = tuple(
        dataclasses.replace(s, **{k: v(s) if callable(v) else v for k, v in changes.items()}) for s in config.layers
    )
    return config.replace(layers=layers)


def _rope(config: LlamaConfig, **changes: object) -> LlamaConfig:
    return config.replace(rope=dataclasses.replace(config.rope, **changes))


CONTROLS = {
    "window one wider": ("mistral-short-window", lambda c: _layers(c, window=lambda s: s.window + 1)),
    "window one narrower": ("mistral-short-window", lambda c: _layers(c, window=lambda s: s.window - 1)),
    "chunk one wider": ("llama4-interleaved", lambda c: _layers(c, window=lambda s: s.window and s.window + 1)),
    "no window": ("smollm3-window", lambda c: _layers(c, attention="full", window=None)),
    "rope everywhere": ("smollm3-window", lambda c: _layers(c, rope=True)),
    "no query scale": ("llama4-interleaved", lambda c: _layers(c, query_scale=None)),
    "no head norm": ("llama4-scout-like", lambda c: _layers(c, qk_norm="none")),
    "theta": ("llama-gelu", lambda c: _rope(c, theta=c.rope.theta * 1.01)),
    "pairs": ("llama-gelu", lambda c: _rope(c, interleaved=True)),
    "eps": ("llama-gelu", lambda c: c.replace(rms_norm_eps=c.rms_norm_eps * 10)),
    "activation": ("llama-gelu", lambda c: c.replace(activation="gelu")),
    "scaling factor": ("llama-rope-yarn", lambda c: _rope(c, factor=c.rope.factor * 1.05)),
    "growth of the base": ("llama-rope-dynamic", lambda c: _rope(c, kind="default")),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_golden_notices(control: str) -> None:
    """The tolerance is small enough: each of these changes exceeds it."""
    case, change = CONTROLS[control]
    g = load_golden(case)
    config = change(g.config)
    assert config != g.config
    logits, _ = run(g.params, config, g.tokens, g.positions)
    assert error(logits, g.logits, g.mask) > 2 * TOLERANCE


def test_golden_notices_visible_padding() -> None:
    g = load_golden("llama-gelu")
    seen = np.where(g.mask, g.positions, 0).astype(np.int32)
    logits, _ = run(g.params, g.config, g.tokens, seen)
    assert error(logits, g.logits, g.mask) > 100 * TOLERANCE


def test_padding_tokens_do_not_matter() -> None:
    g = load_golden("llama2-mha")
    other = np.where(g.mask, g.tokens, 7).astype(np.int32)
    assert (other != g.tokens).any()
    a, _ = run(g.params, g.config, g.tokens, g.positions)
    b, _ = run(g.params, g.config, other, g.positions)
    np.testing.assert_array_equal(np.asarray(a)[g.mask], np.asarray(b)[g.mask])
    chex.assert_tree_all_finite(a)  # the padding's own logits mean nothing, but are numbers


# ---- 16-bit compute


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 4e-2), ("float16", 4e-3)])
@pytest.mark.parametrize("case", ["llama-biases", "llama4-text", "mixtral-moe"])
def test_sixteen_bits(case: str, dtype: str, bound: float) -> None:
    """Compute in 16 bits differs from float32 compute on the same (rounded) weights by that dtype's rounding only.

    Of the tokens 90 % have to be near: a router's choice may tip over, which then changes all of a token's numbers.
    """
    g = load_golden(case)
    low = jax.tree.map(lambda x: x.astype(dtype), g.params)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    expected, _ = run(rounded, g.config, g.tokens, g.positions)
    actual, cache = run(low, g.config, g.tokens, g.positions, filled_cache(g))
    assert actual.dtype == jnp.float32
    chex.assert_tree_all_finite(actual)
    expected, actual = np.asarray(expected)[g.mask], np.asarray(actual)[g.mask]
    errors = np.abs(actual - expected).max(axis=-1) / np.abs(expected).max()
    assert np.quantile(errors, 0.9) < bound
    assert errors.max() > 1e-5  # it was not float32 after all
    assert {x.dtype for x in cache.k} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compute_dtype_is_that_of_the_embedding(dtype: str) -> None:
    config = TINY["sigmoid-moe"]
    params = jax.tree.map(lambda x: x.astype(dtype), random_params(config))
    names = activation_names(config)
    _, _, seen = run(params, config, random_tokens(config, 2, 5), capture=names)
    assert {name: x.dtype for name, x in seen.items()} == dict.fromkeys(names, jnp.dtype(dtype))


# ---- arguments


@pytest.mark.parametrize("name", TINY)
def test_inputs_embeds(name: str) -> None:
    config = TINY[name]
    params, tokens = random_params(config), random_tokens(config, 2, 6)
    embeds = params["embed"]["weight"][tokens]
    chex.assert_trees_all_equal(run(params, config, tokens), run(params, config, None, inputs_embeds=embeds))


def test_contradicting_arguments() -> None:
    config = TINY["plain"]
    params, tokens = random_params(config), random_tokens(config, 1, 4)
    embeds = params["embed"]["weight"][tokens]
    cache = DenseCache.create(config, 1, 8, jnp.float32)
    for param, call in {
        "tokens": lambda: forward(params, config, tokens, inputs_embeds=embeds),
        "positions": lambda: forward(params, config, tokens, None, cache),
        "segment_ids": lambda: forward(
            params, config, tokens, arange_positions(1, 4), cache, segment_ids=jnp.zeros((1, 4), jnp.int32)
        ),
        "capture": lambda: forward(params, config, tokens, capture=["layers.1.out"]),
    }.items():
        with pytest.raises(RequestError) as caught:
            call()
        assert caught.value.param == param
        assert caught.value.hint
    with pytest.raises(RequestError, match="either tokens or inputs_embeds"):
        forward(params, config, None)


EVERY_VISIBILITY = tiny_config(
    LayerSpec(mlp=24),
    LayerSpec("sliding", 3, mlp=24),
    LayerSpec("chunked", 4, qk_norm="l2", mlp=24),
    LayerSpec(rope=False, query_scale=QueryScale(0.5, 2), mlp=24),
    rope=RopeSpec(theta=100.0),
)
DYNAMIC = tiny_config(rope=RopeSpec(theta=100.0, kind="dynamic", factor=2.0, original_max_positions=6))


@pytest.mark.parametrize("config", [EVERY_VISIBILITY, DYNAMIC], ids=["every-visibility", "dynamic-rope"])
def test_packing(config: LlamaConfig) -> None:
    """Texts packed into one row give the logits that they give in rows of their own."""
    params, lengths = random_params(config), (5, 9, 3)
    tokens = random_tokens(config, 3, 9)
    positions = np.where(np.arange(9) < np.array(lengths)[:, None], np.arange(9), -1).astype(np.int32)
    alone, _ = run(params, config, tokens, positions)

    row = jnp.concatenate([tokens[i, :n] for i, n in enumerate(lengths)])[None]
    segments = np.repeat([4, 2, 9], lengths)[None].astype(np.int32)
    packed, _ = run(params, config, row, segment_ids=segments)
    expected = np.concatenate([alone[i, :n] for i, n in enumerate(lengths)])[None]
    assert error(packed, expected) < 1e-5

    explicit = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    chex.assert_trees_all_close(run(params, config, row, explicit, segment_ids=segments)[0], packed, atol=1e-6)
    mixed, _ = run(params, config, row, explicit)
    assert error(mixed, expected) > 1e-2  # the segments matter


def test_logits_at() -> None:
    config = TINY["sigmoid-moe"]
    params, tokens = random_params(config), random_tokens(config, 3, 6)
    every, _ = run(params, config, tokens)
    at = jnp.array([[5, 0], [2, 2], [1, 4]], jnp.int32)
    some, _ = run(params, config, tokens, logits_at=at)
    chex.assert_shape(some, (3, 2, config.vocab_size))
    chex.assert_trees_all_close(some, jnp.take_along_axis(every, at[:, :, None], axis=1), atol=1e-6)


def test_capture() -> None:
    config = TINY["sigmoid-moe"]
    params, tokens = random_params(config), random_tokens(config, 2, 6)
    names = activation_names(config)
    assert len(names) == len(set(names)) == 2 + 9 * config.num_layers + 1  # one layer has a dense MLP
    logits, cache, seen = run(params, config, tokens, capture=names)
    plain, _ = run(params, config, tokens)
    chex.assert_trees_all_close(logits, plain, atol=1e-5)
    assert cache is None
    assert set(seen) == set(names)

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        x = np.asarray(x, np.float64)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * np.asarray(weight)

    x = np.asarray(params["embed"]["weight"])[tokens]
    np.testing.assert_array_equal(seen["embed"], x)
    for i in range(config.num_layers):
        layer = params["layers"][str(i)]
        part = {name.rsplit(".", 1)[1]: value for name, value in seen.items() if name.startswith(f"layers.{i}.")}
        chex.assert_shape(part["q"], (2, 6, config.num_heads, config.head_dim))
        chex.assert_shape([part["k"], part["v"]], (2, 6, config.num_kv_heads, config.head_dim))
        assert error(part["attn_in"], norm(x, layer["attn_norm"]["weight"])) < 1e-5
        value = np.asarray(part["attn_in"]) @ np.asarray(layer["attn"]["v_proj"]["weight"]).T
        assert error(part["v"], value.reshape(part["v"].shape)) < 1e-5
        output = np.asarray(layer["attn"]["o_proj"]["weight"])
        chex.assert_shape(part["attn_heads"], (2, 6, config.num_heads, config.head_dim))
        assert error(part["attn_out"], np.asarray(part["attn_heads"]).reshape(2, 6, -1) @ output.T) < 1e-5
        x = x + np.asarray(part["attn_out"])
        assert error(part["mlp_in"], norm(x, layer["mlp_norm"]["weight"])) < 1e-5
        assert ("mlp_hidden" in part) == ("mlp" in layer)
        if "mlp" in layer:
            down = np.asarray(layer["mlp"]["down_proj"]["weight"])
            assert error(part["mlp_out"], np.asarray(part["mlp_hidden"]) @ down.T) < 1e-5
        x = x + np.asarray(part["mlp_out"])
        assert error(part["out"], x) < 1e-5
    assert error(seen["final_norm"], norm(x, params["final_norm"]["weight"])) < 1e-5
    assert error(logits, np.asarray(seen["final_norm"]) @ np.asarray(params["lm_head"]["weight"]).T) < 1e-5

    one = run(params, config, tokens, capture=("layers.1.v",))[2]
    assert list(one) == ["layers.1.v"]
    assert run(params, config, tokens, capture=())[2] == {}


# ---- adapters


@pytest.mark.parametrize("fused", [False, True], ids=["canonical", "fused"])
@pytest.mark.parametrize("name", ["biased", "sigmoid-moe"])
def test_adapters_equal_merged_weights(name: str, fused: bool) -> None:
    config = TINY[name]
    params, adapters, tokens = random_params(config), random_adapters(config), random_tokens(config, 2, 6)
    layout = fuse_params(params, config) if fused else params
    ids = jnp.ones((2, 1), jnp.int32)
    adapted, _ = run(layout, config, tokens, adapters=in_slots(adapters), adapter_ids=ids)
    merged, _ = run(merge_adapters(params, adapters), config, tokens)
    assert error(adapted, merged) < 2e-5

    # Each of them counts: without it the logits are others.
    for projection in projection_names(config):
        without = flatten(adapters)
        without[f"{projection}.scale"] = jnp.zeros_like(without[f"{projection}.scale"])
        logits, _ = run(layout, config, tokens, adapters=in_slots(unflatten(without)), adapter_ids=ids)
        assert error(logits, merged) > 1e-3, projection


@pytest.mark.parametrize(
    "path",
    [
        "layers.0.attn.query",
        "layers.0.attn.qkv_proj",
        "layers.7.attn.q_proj",
        "layers.0.moe.experts.up_proj",
        "layers.0.moe.router",
        "layer.0.attn.q_proj",
        "lm_head",
    ],
)
def test_adapters_that_nothing_would_use(path: str) -> None:
    config = TINY["sigmoid-moe"]
    slots = in_slots(unflatten({path: {"a": jnp.zeros((1, 16)), "b": jnp.zeros((16, 1)), "scale": jnp.float32(1)}}))
    with pytest.raises(RequestError) as caught:
        forward(
            random_params(config),
            config,
            random_tokens(config, 1, 3),
            adapters=slots,
            adapter_ids=jnp.ones((1, 1), jnp.int32),
        )
    assert caught.value.param == "adapters"
    assert path in str(caught.value)


# ---- transformations


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n if n in ("plain", "sigmoid-moe") else pytest.param(n, marks=pytest.mark.slow) for n in TINY]
)
def test_gradients(name: str) -> None:
    """Against finite differences, in parameters, input embeddings and adapters, with a padded row."""
    config = TINY[name]
    params, adapters = random_params(config), in_slots(random_adapters(config))
    ids = jnp.array([[1, 1, 1, 1, 0], [0, 0, 0, 1, 1]])
    tokens = random_tokens(config, 2, 5)
    positions = jnp.array([[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2]], jnp.int32)
    mask = (positions >= 0).astype(jnp.float32)
    embeds = params["embed"]["weight"][tokens]

    @jax.jit
    def loss(params: Params, embeds: jax.Array, adapters: Params) -> jax.Array:
        logits, _ = forward(params, config, None, positions, inputs_embeds=embeds, adapters=adapters, adapter_ids=ids)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, :, None], axis=-1)[..., 0]
        return jnp.sum(picked * mask) / jnp.sum(mask)

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, embeds, adapters)
    chex.assert_tree_all_finite(grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, (params, embeds, adapters))
    silent = {n for n, g in flatten(grads[0]).items() if not np.any(g)}
    assert silent <= {"embed.weight"}  # the embeddings came from outside; a tied one still makes the logits
    assert ("embed.weight" in silent) == (not config.tie_word_embeddings)

    # A small step: the difference quotient must not cross a point where a token changes its experts.
    point, rng, step = (params, embeds, adapters), np.random.default_rng(3), 1e-4
    for _ in range(3):
        direction = jax.tree.map(lambda x: np.asarray(rng.standard_normal(x.shape), np.float32), point)
        slope = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))
        ahead, behind = (
            float(loss(*jax.tree.map(lambda x, d, s=s: x + s * d, point, direction))) for s in (step, -step)
        )
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=2e-3, atol=1e-2)


def test_gradient_of_the_embedding() -> None:
    config = TINY["plain"]
    params, tokens = random_params(config), jnp.array([[3, 5, 3]], jnp.int32)
    grad = jax.grad(lambda p: forward(p, config, tokens)[0].std())(params)["embed"]["weight"]
    assert set(np.nonzero(np.abs(grad).sum(axis=1))[0]) == {3, 5}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "softmax-moe"])
def test_vmap(name: str) -> None:
    """Over rows, over models, and over caches."""
    config = TINY[name]
    tokens = random_tokens(config, 3, 4)
    models = [random_params(config, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *models)
    logits = jax.vmap(lambda p, t: forward(p, config, t[None])[0][0])(stacked, tokens)
    expected = np.stack([run(p, config, t[None])[0][0] for p, t in zip(models, tokens, strict=True)])
    assert error(logits, expected) < 1e-5

    caches = jax.vmap(lambda _: DenseCache.create(config, 1, 6, jnp.float32))(jnp.arange(3))
    cached, caches = jax.vmap(lambda p, t, c: forward(p, config, t[None], arange_positions(1, 4), c))(
        stacked, tokens, caches
    )
    assert error(cached[:, 0], expected) < 1e-5
    np.testing.assert_array_equal(caches.length, [4, 4, 4])


def test_not_jitted() -> None:
    config = TINY["sigmoid-moe"]
    params, tokens = random_params(config), random_tokens(config, 2, 6)
    chex.assert_trees_all_close(forward(params, config, tokens), run(params, config, tokens), atol=1e-5)


@pytest.mark.parametrize("name", ["llama-3.1-405b", "llama-4-maverick"])
def test_shapes_of_large_models(name: str) -> None:
    """No memory is taken to find the shapes of models of 800 GB."""
    config = preset(name)
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    cache = jax.eval_shape(lambda: DenseCache.create(config, 2, 32, jnp.bfloat16))
    logits, after = jax.eval_shape(lambda p, t, c: forward(p, config, t, t, c), abstract_params(config), tokens, cache)
    assert (logits.shape, logits.dtype) == ((2, 8, config.vocab_size), jnp.float32)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(lambda: init_params(config, jax.random.key(0))), abstract_params(config)
    )
