"""Caches in int8: what is stored, that every path computes with it alike, and how far that is from the unquantised."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import engines
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from engines import alone, golden_model, run, small_settings, some_requests, tiny_model, tokens
from helpers import arange_positions, error, load_golden, random_params, random_tokens, tiny_config
from helpers import run as run_model
from test_engine import check, nothing_is_held

import llama_jax as lj
from llama_jax.cache import DenseCache, PagedCache, stored_dtype, vector_bytes
from llama_jax.cache.dense import DenseLayer
from llama_jax.cache.stored import FIELDS, quantise
from llama_jax.cli import cli
from llama_jax.config import LayerSpec, preset
from llama_jax.engine.core import Core
from llama_jax.engine.sizing import settings_for
from llama_jax.engine.state import new_state, scrub
from llama_jax.errors import DoesNotFit, KernelError, RequestError
from llama_jax.kernels.attention import KeysValues, Places, Rule, Visibility, attention
from llama_jax.kernels.dispatch import using
from llama_jax.measure.static import time_static
from llama_jax.model import forward
from llama_jax.model.loaded import Model
from llama_jax.plan.workload import Workload

CONFIG = tiny_config(LayerSpec(mlp=24), LayerSpec("sliding", 3, mlp=24))
PARAMS = random_params(CONFIG)
SAME = 2e-5
"""Between two computations with the same codes, as a share of the largest logit. A code that is off by one step gives
1e-3 and more."""


def decoded(codes: Any, scales: Any) -> np.ndarray:
    return np.asarray(codes, np.float32) * np.asarray(scales, np.float32)[..., None]


def hadamard(size: int) -> np.ndarray:
    """Of ones and minus ones, in blocks if `size` is no power of two."""
    matrix = np.ones((1, 1), np.float32)
    while size % (2 * len(matrix)) == 0:
        matrix = np.kron(matrix, np.asarray([[1, 1], [1, -1]], np.float32))
    return np.kron(np.eye(size // len(matrix), dtype=np.float32), matrix)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundedCache:
    """A dense float32 cache of what int8 would hold: another way to the same numbers, without codes and scales."""

    cache: DenseCache

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def extend(self, positions: jax.Array, rows: Any = None) -> Any:
        cache, slots = self.cache.extend(positions, rows)
        return RoundedCache(cache), slots

    def layer(self, index: int) -> Any:
        return RoundedLayer(self.cache.layer(index))

    def with_layers(self, views: list[Any]) -> Any:
        return RoundedCache(self.cache.with_layers([view.layer for view in views]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundedLayer:
    layer: DenseLayer

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, *rest: Any) -> Any:
        def rounded(x: jax.Array) -> jax.Array:
            step = (jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127).astype(jnp.bfloat16).astype(jnp.float32)
            return jnp.clip(jnp.round(x / step), -127, 127) * step

        turn = hadamard(k.shape[-1])
        out, layer = self.layer.attend(q, rounded(k @ turn) @ turn.T / (turn @ turn.T)[0, 0], rounded(v), *rest)
        return out, RoundedLayer(layer)


def rounded_logits(config: Any, params: Any, text: Any, positions: Any) -> np.ndarray:
    cache: Any = RoundedCache(DenseCache.create(config, text.shape[0], text.shape[1], jnp.float32))
    return np.asarray(run_model(params, config, text, positions, cache)[0])


# ---- what is stored


def test_codes_are_the_nearest_for_scales_as_they_are_stored() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((5, 7, 3, 16)) * 10.0 ** rng.uniform(-6, 6, (5, 7, 3, 1))).astype(np.float32)
    x[0, 0, 0] = 0
    codes, scales = quantise(jnp.asarray(x))
    assert (codes.dtype, scales.dtype, scales.shape) == (jnp.int8, jnp.bfloat16, x.shape[:-1])
    step = np.asarray(scales, np.float32)
    np.testing.assert_allclose(step, np.abs(x).max(axis=-1) / 127, rtol=2**-8)
    assert (np.abs(decoded(codes, scales) - x) <= 0.5001 * step[..., None]).all()
    assert np.abs(codes).max() == 127
    assert not step[0, 0, 0]
    changed = x.copy()
    changed[2, 3, 1] *= 3
    other, other_scales = quantise(jnp.asarray(changed))
    kept = np.ones(scales.shape, bool)
    kept[2, 3, 1] = False
    np.testing.assert_array_equal(other[kept], codes[kept])
    np.testing.assert_array_equal(other_scales[kept], scales[kept])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_none(bad: float) -> None:
    x = np.ones((2, 8), np.float32)
    x[1, 3] = bad
    _, scales = quantise(jnp.asarray(x))
    np.testing.assert_array_equal(np.isfinite(np.asarray(scales, np.float32)), [True, False])


def test_bytes() -> None:
    assert vector_bytes(128, 2) == 256
    assert vector_bytes(128, 2, "int8") == 130
    dense, paged = (
        DenseCache.create(CONFIG, 3, 20, jnp.int8),
        PagedCache.create(CONFIG, 3, 20, jnp.int8, page_size=16),
    )
    for cache, slots in ((dense, 3 * 20), (paged, 3 * 32)):
        held = sum(x.nbytes for name in FIELDS for x in getattr(cache, name))
        assert held == 2 * CONFIG.num_layers * CONFIG.num_kv_heads * slots * vector_bytes(CONFIG.head_dim, 4, "int8")
        assert cache.dtype == stored_dtype("int8", jnp.float32) == jnp.int8
    assert dense.grow(30).k_scale[0].shape == (3, CONFIG.num_kv_heads, 30)


# ---- every path computes with the same codes


def in_pieces(cache: Any, text: Any, cuts: tuple[int, ...], **named: str) -> tuple[np.ndarray, Any]:
    """Logits of texts that go into the cache piece by piece."""
    parts, start = [], 0
    for length in cuts:
        piece = slice(start, start + length)
        with using(**named):
            out, cache = run_model(
                PARAMS, CONFIG, text[:, piece], arange_positions(*text[:, piece].shape) + start, cache
            )
        parts.append(np.asarray(out))
        start += length
    return np.concatenate(parts, axis=1), cache


MAKERS: dict[str, Callable[[int], Any]] = {
    "dense": lambda rows: DenseCache.create(CONFIG, rows, 48, jnp.int8),
    "paged": lambda rows: PagedCache.create(CONFIG, rows, 48, jnp.int8, page_size=16),
}


@pytest.mark.parametrize("backend", ["auto", pytest.param("pallas_interpret", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", MAKERS)
def test_whole_or_in_pieces(kind: str, backend: str) -> None:
    text = random_tokens(CONFIG, 2, 21)
    want = rounded_logits(CONFIG, PARAMS, text, arange_positions(2, 21))
    unquantised, _ = run_model(PARAMS, CONFIG, text, arange_positions(2, 21))
    named = {} if backend == "auto" else dict.fromkeys(("flash_attention", "decode_attention"), backend)
    for cuts in ((21,), (17, 1, 3)):
        got, cache = in_pieces(MAKERS[kind](2), text, cuts, **named)
        assert error(got, want) < SAME
    assert {x.dtype for x in (*cache.k, *cache.v)} == {jnp.dtype(jnp.int8)}
    assert 50 * SAME < error(unquantised, want) < 0.03


def test_packed_tokens() -> None:
    """Rows of 1, 12 and 20 tokens, in any order."""
    texts = [np.asarray(random_tokens(CONFIG, 1, n, seed=n)) for n in (1, 12, 20)]
    rows = np.repeat([0, 1, 2], [1, 12, 20])
    positions = np.concatenate([np.arange(n) for n in (1, 12, 20)])
    order = np.random.default_rng(0).permutation(33)
    packed = np.concatenate([text[0] for text in texts])[order][None]
    got, _ = run_model(PARAMS, CONFIG, packed, positions[order][None], MAKERS["paged"](3), rows=rows[order][None])
    want = np.concatenate([rounded_logits(CONFIG, PARAMS, text, arange_positions(*text.shape))[0] for text in texts])
    assert error(got[0], want[order]) < SAME


@pytest.mark.parametrize("kind", MAKERS)
def test_scales_go_where_their_codes_go(kind: str) -> None:
    """Select, put, fork, truncate and grow; then each row goes on as its own text does."""
    text = random_tokens(CONFIG, 1, 24)
    spread = np.concatenate([text[:, :18], np.zeros((2, 18), np.int32)])
    positions = np.concatenate([arange_positions(1, 18), np.full((2, 18), -1)])
    _, cache = run_model(PARAMS, CONFIG, spread, positions, MAKERS[kind](3))
    cache = cache.fork(jnp.array([0, 0]), jnp.array([2, 1])).truncate(jnp.array([18, 18, 17])).grow(64)
    part = cache.select(jnp.array([1]))
    _, part = run_model(PARAMS, CONFIG, text[:, 18:19], np.array([[18]]), part)
    cache = cache.put(jnp.array([1]), part)
    tokens = np.stack([text[0, 18], text[0, 19], text[0, 17]])[:, None]
    got, _ = run_model(PARAMS, CONFIG, tokens, np.array([[18], [19], [17]]), cache)
    want = rounded_logits(CONFIG, PARAMS, text, arange_positions(1, 24))[0]
    assert error(got[:, 0], want[[18, 19, 17]]) < SAME


def test_cleared_pages_have_no_scales() -> None:
    state = new_state(CONFIG, small_settings(), jnp.dtype(jnp.int8))
    spoilt = {
        name: tuple(jnp.full_like(x, jnp.nan if "scale" in name else 7) for x in getattr(state.cache, name))
        for name in FIELDS
    }
    state = dataclasses.replace(state, cache=dataclasses.replace(state.cache, **spoilt))
    cleared = scrub(state, jnp.array([2, 5, 999])).cache
    for name in FIELDS:
        for x in getattr(cleared, name):
            assert not np.asarray(x[jnp.array([2, 5])], np.float32).any()
            assert np.asarray(x[3], np.float32).all()


# ---- the engine


@pytest.fixture
def quantised_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`engines.alone` through a new dense cache for each token, in int8."""

    def whole(params: Any, config: Any, ids: Any, positions: Any, **options: Any) -> Any:
        return forward(params, config, ids, positions, DenseCache.create(config, 1, ids.shape[1], jnp.int8), **options)

    monkeypatch.setattr(engines, "_forward", jax.jit(whole, static_argnames="config"))


def in_int8(model: Model) -> Model:
    return dataclasses.replace(model, kv_dtype="int8")


@pytest.mark.usefixtures("quantised_alone")
def test_an_engine_draws_what_each_would_draw_alone() -> None:
    """With prefixes found, prompts in pieces, and too few pages for all, so that rows are preempted."""
    model = in_int8(tiny_model())
    core = Core(model, small_settings(pages=7))
    check(model, core, 14)
    check(model, core, 14)  # with the cache warm
    counts = core.snapshot().counts
    assert counts.preemptions > 0
    assert counts.prefix_hit_tokens > 0
    assert core.snapshot().kv_dtype == "int8"
    nothing_is_held(core)


@pytest.mark.slow
@pytest.mark.usefixtures("quantised_alone")
@pytest.mark.parametrize("changes", [{"prefix_cache": False}, {"steps": 4}, {"drafts": 3, "draft_rows": 2}], ids=str)
@pytest.mark.parametrize("case", ["llama3.1-rope", "mistral-sliding"])
def test_sizes_change_nothing(case: str, changes: dict[str, Any]) -> None:
    model = in_int8(golden_model(case))
    core = Core(model, small_settings(**changes))
    asked = some_requests(model, 9)
    for request, news in zip(asked, run(core, asked), strict=True):
        assert tokens(news) == alone(model, request).tokens


# ---- how far from the unquantised


@pytest.mark.parametrize("case", ["llama3.1-rope", "llama-mqa", "qwen2-bias"])
def test_logits_of_golden_models(case: str) -> None:
    """Against transformers. Scales of another token or head, or one for all tokens, give errors of 0.5 and more."""
    g = load_golden(case)
    batch, length = g.tokens.shape
    cache = DenseCache.create(g.config, batch, length, jnp.int8)
    got, _ = run_model(g.params, g.config, g.tokens, g.positions, cache, rope_lengths=g.lengths)
    assert error(got, g.logits, g.mask) < 0.05


# ---- what users see


def test_only_what_caches_can_store() -> None:
    tiny = tiny_model()
    asked: list[Callable[[], Any]] = [
        lambda: lj.load("nothing-of-this-name", kv_dtype="int4"),
        lambda: dataclasses.replace(tiny, kv_dtype="float64"),
        lambda: lj.LLM(tiny, kv_dtype="int4"),
        lambda: lj.generate(tiny, None, [3, 4], kv_dtype="fp8"),
        lambda: Workload(kv_dtype="int3").check(preset("llama-3.2-1b")),
    ]
    for ask in asked:
        with pytest.raises(RequestError, match="a cache cannot store") as caught:
            ask()
        assert caught.value.param == "kv_dtype"
        assert "int8" in caught.value.hint
    for command in (["generate", "x"], ["plan", "llama-3.2-1b"], ["bench"]):
        result = CliRunner().invoke(cli, [*command, "--kv-dtype", "int4"])
        assert (result.exit_code, "int8" in result.output) == (2, True)


def test_nothing_is_trained_through_it() -> None:
    def loss(params: Any) -> jax.Array:
        cache = DenseCache.create(CONFIG, 1, 4, jnp.int8)
        return forward(params, CONFIG, jnp.zeros((1, 4), jnp.int32), arange_positions(1, 4), cache)[0].sum()

    with pytest.raises(RequestError, match="no gradient") as caught:
        jax.grad(loss)(PARAMS)
    assert caught.value.param == "kv_dtype"
    codes, scales = quantise(jnp.ones((1, 2, 16, 8)))
    kv = KeysValues(codes, codes, jnp.zeros((1, 1), jnp.int32), scales, scales)
    places = Places(jnp.full((1, 4), 3), jnp.arange(16)[None])
    for backend in ("pallas_interpret", "blocked"):

        def attended(q: jax.Array, backend: str = backend) -> jax.Array:
            return attention(q, kv, places, Rule(Visibility(), 1.0), backend=backend).sum()

        with pytest.raises(KernelError, match="no gradient"):
            jax.grad(attended)(jnp.ones((1, 4, 2, 8)))


def test_the_answer_says_what_the_model_says() -> None:
    model = tiny_model()
    asked: Any = {"max_tokens": 5, "ignore_eos": True}
    by_model = lj.generate(in_int8(model), None, [3, 4, 5], **asked)
    llm = lj.LLM(model, kv_dtype="int8", rows=1)
    assert by_model == lj.generate(model, None, [3, 4, 5], kv_dtype="int8", **asked)
    assert [by_model] == [output.text for output in llm.generate([[3, 4, 5]], **asked)]
    assert (llm.snapshot().kv_dtype, lj.LLM(model, rows=1).snapshot().kv_dtype) == ("int8", "float32")
    assert min(time_static(in_int8(model), [[3, 4, 5]], [4])) > 0


def test_pages_for_the_memory_that_there_is() -> None:
    config = preset("llama-3.1-8b")
    pages = {
        kv_dtype: settings_for(config, jnp.bfloat16, None, on_cpu=False, free=20 << 30, kv_dtype=kv_dtype).pages
        for kv_dtype in (None, "int8")
    }
    assert pages["int8"] == pytest.approx(pages[None] * 256 / 130, rel=1e-3)
    with pytest.raises(DoesNotFit, match="there is memory for") as caught:
        settings_for(config, jnp.bfloat16, None, on_cpu=False, free=18 << 30)
    assert "--kv-dtype int8" in caught.value.hint


def test_commands() -> None:
    def answer(*args: str) -> dict[str, Any]:
        result = CliRunner().invoke(cli, [*args, "--json"])
        assert result.exit_code in (0, 6), result.output
        return json.loads(result.output)

    plan = ("plan", "llama-3.1-8b", "--target", "rx7900xtx", "--batch", "4", "--context", "8192", "--prompt", "8000")
    plan += ("--memory-fraction", "0.85")
    without, with_codes = answer(*plan), answer(*plan, "--kv-dtype", "int8")
    assert (without["kv_dtype"], with_codes["kv_dtype"]) == (None, "int8")
    cache = 2 * 32 * 8 * 4 * without["cache_capacities"][-1]
    assert (without["memory"]["cache"], with_codes["memory"]["cache"]) == (cache * 256, cache * 130)
    read = [facts["predicted"]["decode"]["read_bytes"] for facts in (without, with_codes)]
    assert read[0] - read[1] == 2 * 32 * 8 * 4 * 8192 * 126
    assert (without["fits"], with_codes["fits"]) == (False, True)
    assert "--kv-dtype int8" in without["remedies"]
    per_token = answer("show", "llama-3.1-8b")["kv_cache_bytes_per_token"]
    assert per_token == {"float32": 2**18, "bfloat16": 2**17, "int8": 2 * 32 * 8 * 130}
