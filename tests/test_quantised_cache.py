"""Quantised caches: what is stored, that every path computes with it alike, and how far that is from numbers."""

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
from llama_jax.cache import KV_DTYPES, DenseCache, PagedCache, pair_bytes, stored_dtype
from llama_jax.cache.dense import DenseLayer
from llama_jax.cache.stored import FIELDS, shapes
from llama_jax.cli import cli
from llama_jax.config import LayerSpec, preset
from llama_jax.engine.core import Core
from llama_jax.engine.sizing import settings_for
from llama_jax.engine.state import new_state, scrub
from llama_jax.errors import DoesNotFit, KernelError, RequestError
from llama_jax.kernels.attention import KeysValues, Places, Rule, Visibility, attention
from llama_jax.kernels.attention.assembly import FIELDS as FIELDS_OF_BYTES
from llama_jax.kernels.attention.assembly import UNIT
from llama_jax.kernels.attention.records import CODES
from llama_jax.kernels.attention.records import numbers as codes_numbers
from llama_jax.kernels.dispatch import using
from llama_jax.kernels.rope.coding import quantise
from llama_jax.measure.static import time_static
from llama_jax.model import forward
from llama_jax.model.loaded import Model
from llama_jax.plan.search import make_plan
from llama_jax.plan.workload import Workload
from llama_jax.targets import find

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
    """A dense float32 cache of what a quantised one would hold: another way to the same numbers, without codes."""

    cache: DenseCache
    scheme: str = dataclasses.field(metadata={"static": True})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def extend(self, positions: jax.Array, rows: Any = None) -> Any:
        cache, slots = self.cache.extend(positions, rows)
        return RoundedCache(cache, self.scheme), slots

    def layer(self, index: int) -> Any:
        return RoundedLayer(self.cache.layer(index), self.scheme)

    def with_layers(self, views: list[Any]) -> Any:
        return RoundedCache(self.cache.with_layers([view.layer for view in views]), self.scheme)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundedLayer:
    layer: DenseLayer
    scheme: str = dataclasses.field(metadata={"static": True})

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, *rest: Any) -> Any:
        turn = hadamard(k.shape[-1])

        def rounded(x: jax.Array, bits: str, *, turned: bool) -> jax.Array:
            x = x @ turn if turned else x
            largest = {"8": 127, "4": 15, "f": 1}[bits]
            step = (jnp.max(jnp.abs(x), axis=-1, keepdims=True) / largest).astype(jnp.bfloat16).astype(jnp.float32)
            if bits == "f":  # four significant bits, from steps of 2 ** -9
                x = x / step
                unit = jnp.exp2(jnp.maximum(jnp.floor(jnp.log2(jnp.maximum(jnp.abs(x), 2.0**-9))), -6) - 3)
                x = jnp.round(x / unit) * unit * step
            elif bits == "8":
                x = jnp.clip(jnp.round(x / step), -127, 127) * step
            else:
                x = jnp.clip(2 * jnp.floor(x / step / 2) + 1, -15, 15) * step  # the nearest odd number
            return x @ turn.T / (turn @ turn.T)[0, 0] if turned else x

        of_k, of_v = {"int8": "88", "k8v4": "84", "int4": "44", "fp8": "ff", "fp8_fnuz": "ff"}[self.scheme]
        k, v = rounded(k, of_k, turned=True), rounded(v, of_v, turned=of_v == "4")
        out, layer = self.layer.attend(q, k, v, *rest)
        return out, RoundedLayer(layer, self.scheme)


def rounded_logits(config: Any, params: Any, text: Any, positions: Any, scheme: str) -> np.ndarray:
    cache: Any = RoundedCache(DenseCache.create(config, text.shape[0], text.shape[1], jnp.float32), scheme)
    return np.asarray(run_model(params, config, text, positions, cache)[0])


# ---- what is stored


def test_codes_are_the_nearest_for_scales_as_they_are_stored() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((5, 7, 3, 16)) * 10.0 ** rng.uniform(-6, 6, (5, 7, 3, 1))).astype(np.float32)
    x[0, 0, 0] = 0
    codes, scales = quantise(jnp.asarray(x), "int8")
    assert (codes.dtype, scales.dtype, scales.shape) == (jnp.int8, jnp.bfloat16, x.shape[:-1])
    step = np.asarray(scales, np.float32)
    np.testing.assert_allclose(step, np.abs(x).max(axis=-1) / 127, rtol=2**-8)
    assert (np.abs(decoded(codes, scales) - x) <= 0.5001 * step[..., None]).all()
    assert np.abs(codes).max() == 127
    assert not step[0, 0, 0]
    changed = x.copy()
    changed[2, 3, 1] *= 3
    other, other_scales = quantise(jnp.asarray(changed), "int8")
    kept = np.ones(scales.shape, bool)
    kept[2, 3, 1] = False
    np.testing.assert_array_equal(other[kept], codes[kept])
    np.testing.assert_array_equal(other_scales[kept], scales[kept])


def test_codes_of_four_bits_are_odd_numbers_two_to_a_byte() -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((5, 3, 16)) * 10.0 ** rng.uniform(-6, 6, (5, 3, 1))).astype(np.float32)
    x[0, 0] = 0
    codes, scales = quantise(jnp.asarray(x), "int4")
    assert (codes.dtype, codes.shape, scales.shape) == (jnp.uint8, (5, 3, 8), (5, 3))
    step = np.asarray(scales, np.float32)[..., None]
    np.testing.assert_allclose(step[..., 0], np.abs(x).max(axis=-1) / 15, rtol=2**-8)
    low, high = np.asarray(codes) % 16, np.asarray(codes) // 16  # of the first half of a head, and of the second
    numbers = 2.0 * np.concatenate([low, high], axis=-1) - 15
    # The largest may be half a unit in the last place of its scale beyond 15 steps.
    assert (np.abs(numbers * step - x) <= (1 + 16 * 2**-8) * step).all()
    np.testing.assert_array_equal(codes_numbers(codes, jnp.bfloat16).astype(np.float32), numbers)


@pytest.mark.parametrize("dtype", FIELDS_OF_BYTES)
def test_what_the_assembly_multiplies_and_adds(dtype: str) -> None:
    """The instructions' constants, exact in bfloat16, make of every byte what `records.numbers` does."""
    every = np.arange(256, dtype=np.uint8)
    want = np.asarray(codes_numbers(jnp.asarray(every.view(dtype)[:, None]), jnp.float32), np.float64)
    for i, field in enumerate(FIELDS_OF_BYTES[dtype]):
        for constant in (field.factor, field.added):
            assert float(np.asarray(constant, jnp.bfloat16)) == constant
        bits = ((every ^ field.flip) & field.mask).astype(np.float64) * 2.0**-133
        got = bits * field.factor + field.added
        np.testing.assert_array_equal(got, got.astype(jnp.bfloat16).astype(np.float64))
        np.testing.assert_array_equal(got * UNIT, want[:, i])


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_none(bad: float, kind: str) -> None:
    x = np.ones((2, 8), np.float32)
    x[1, 3] = bad
    _, scales = quantise(jnp.asarray(x), kind)
    np.testing.assert_array_equal(np.isfinite(np.asarray(scales, np.float32)), [True, False])


@pytest.mark.parametrize(
    ("kv_dtype", "pair"), [("int8", 2 * 130), ("k8v4", 130 + 66), ("int4", 2 * 66), ("fp8", 2 * 130)]
)
def test_bytes(kv_dtype: str, pair: int) -> None:
    assert pair_bytes(128, 2) == 512
    assert pair_bytes(128, 2, kv_dtype) == pair
    dense, paged = (
        DenseCache.create(CONFIG, 3, 20, kv_dtype),
        PagedCache.create(CONFIG, 3, 20, kv_dtype, page_size=16),
    )
    for cache, slots in ((dense, 3 * 20), (paged, 3 * 32)):
        held = sum(x.nbytes for name in FIELDS for x in getattr(cache, name))
        assert held == CONFIG.num_layers * CONFIG.num_kv_heads * slots * pair_bytes(CONFIG.head_dim, 4, kv_dtype)
        assert cache.dtype == stored_dtype(kv_dtype, jnp.float32) == kv_dtype
    assert dense.grow(30).k_scale[0].shape == (3, CONFIG.num_kv_heads, 30)


def test_heads_that_do_not_fill_bytes() -> None:
    with pytest.raises(RequestError, match="heads of 7 numbers") as caught:
        shapes((1, 2, 3, 7), "k8v4")
    assert caught.value.hint == "choose int8"


@pytest.mark.parametrize(
    ("target", "flavour"),
    [("mi300x", "fp8_fnuz"), ("mi355x", "fp8"), ("rx9070xt", "fp8"), ("h200", "fp8"), ("cpu", "fp8")],
)
def test_floats_of_the_flavour_that_a_device_has(target: str, flavour: str) -> None:
    assert stored_dtype("fp8", jnp.bfloat16, find(target)) == flavour
    kind = CODES[flavour]
    assert shapes((2, 8), flavour)["k"] == jax.ShapeDtypeStruct((2, 8), jnp.dtype(kind.dtype))


@pytest.mark.parametrize("target", ["mi210", "rx7900xtx", "a100"])
def test_devices_without_floats_of_eight_bits(target: str) -> None:
    for ask in (
        lambda: stored_dtype("fp8", jnp.bfloat16, find(target)),
        lambda: make_plan(preset("llama-3.2-1b"), find(target), None, Workload(kv_dtype="fp8")),
    ):
        with pytest.raises(RequestError, match="no floats of eight bits") as caught:
            ask()
        assert "int8" in caught.value.hint
    result = CliRunner().invoke(cli, ["plan", "llama-3.2-1b", "--target", target, "--kv-dtype", "fp8"])
    assert result.exit_code == 2


def test_floats_of_both_flavours_are_the_nearest() -> None:
    x = np.random.default_rng(3).standard_normal((200, 64)).astype(np.float32)
    found = {kind: [np.asarray(a, np.float32) for a in quantise(jnp.asarray(x), kind)] for kind in ("fp8", "fp8_fnuz")}
    for codes, scales in found.values():
        np.testing.assert_allclose(scales, np.abs(x).max(axis=-1), rtol=2**-8)
        wrong = np.abs(codes * scales[:, None] - x) / scales[:, None]
        assert (wrong <= np.maximum(np.abs(x / scales[:, None]) * 2**-4, 2**-10) * 1.001).all()
    large = np.abs(found["fp8"][0]) > 1 / 64
    np.testing.assert_array_equal(found["fp8"][0][large], found["fp8_fnuz"][0][large])


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


MAKERS: dict[str, Callable[[int, str], Any]] = {
    "dense": lambda rows, scheme: DenseCache.create(CONFIG, rows, 48, scheme),
    "paged": lambda rows, scheme: PagedCache.create(CONFIG, rows, 48, scheme, page_size=16),
}
SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "scheme", "backend"),
    [
        ("dense", "int8", "auto"),
        ("paged", "int4", "auto"),
        ("paged", "fp8", "auto"),
        ("dense", "fp8", "pallas_interpret"),
        ("paged", "int8", "auto"),
        ("dense", "k8v4", "auto"),
        ("dense", "int8", "pallas_interpret"),
        ("paged", "k8v4", "pallas_interpret"),
        ("dense", "int4", "pallas_interpret"),
    ],
)
def test_whole_or_in_pieces(kind: str, scheme: str, backend: str) -> None:
    text = random_tokens(CONFIG, 2, 21)
    want = rounded_logits(CONFIG, PARAMS, text, arange_positions(2, 21), scheme)
    unquantised, _ = run_model(PARAMS, CONFIG, text, arange_positions(2, 21))
    named = {} if backend == "auto" else dict.fromkeys(("flash_attention", "decode_attention"), backend)
    for cuts in ((21,), (17, 1, 3)):
        got, cache = in_pieces(MAKERS[kind](2, scheme), text, cuts, **named)
        assert error(got, want) < SAME
    assert cache.dtype == scheme
    assert 50 * SAME < error(unquantised, want) < {"int8": 0.03}.get(scheme, 0.5)


@pytest.mark.parametrize("scheme", ["int8", pytest.param("k8v4", marks=SLOW), pytest.param("int4", marks=SLOW)])
def test_packed_tokens(scheme: str) -> None:
    """Rows of 1, 12 and 20 tokens, in any order."""
    texts = [np.asarray(random_tokens(CONFIG, 1, n, seed=n)) for n in (1, 12, 20)]
    rows = np.repeat([0, 1, 2], [1, 12, 20])
    positions = np.concatenate([np.arange(n) for n in (1, 12, 20)])
    order = np.random.default_rng(0).permutation(33)
    packed = np.concatenate([text[0] for text in texts])[order][None]
    got, _ = run_model(
        PARAMS, CONFIG, packed, positions[order][None], MAKERS["paged"](3, scheme), rows=rows[order][None]
    )
    alone = [rounded_logits(CONFIG, PARAMS, text, arange_positions(*text.shape), scheme)[0] for text in texts]
    want = np.concatenate(alone)
    assert error(got[0], want[order]) < SAME


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        ("dense", "k8v4"),
        ("paged", "int8"),
        pytest.param("dense", "fp8", marks=SLOW),
        pytest.param("dense", "int8", marks=SLOW),
        pytest.param("paged", "int4", marks=SLOW),
    ],
)
def test_scales_go_where_their_codes_go(kind: str, scheme: str) -> None:
    """Select, put, fork, truncate and grow; then each row goes on as its own text does."""
    text = random_tokens(CONFIG, 1, 24)
    spread = np.concatenate([text[:, :18], np.zeros((2, 18), np.int32)])
    positions = np.concatenate([arange_positions(1, 18), np.full((2, 18), -1)])
    _, cache = run_model(PARAMS, CONFIG, spread, positions, MAKERS[kind](3, scheme))
    cache = cache.fork(jnp.array([0, 0]), jnp.array([2, 1])).truncate(jnp.array([18, 18, 17])).grow(64)
    part = cache.select(jnp.array([1]))
    _, part = run_model(PARAMS, CONFIG, text[:, 18:19], np.array([[18]]), part)
    cache = cache.put(jnp.array([1]), part)
    tokens = np.stack([text[0, 18], text[0, 19], text[0, 17]])[:, None]
    got, _ = run_model(PARAMS, CONFIG, tokens, np.array([[18], [19], [17]]), cache)
    want = rounded_logits(CONFIG, PARAMS, text, arange_positions(1, 24), scheme)[0]
    assert error(got[:, 0], want[[18, 19, 17]]) < SAME


def test_cleared_pages_have_no_scales() -> None:
    state = new_state(CONFIG, small_settings(), "k8v4")
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


@pytest.fixture(params=["int8", pytest.param("k8v4", marks=SLOW), pytest.param("int4", marks=SLOW)])
def scheme(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A scheme, in which `engines.alone` computes through a new dense cache for each token."""
    name: str = request.param

    def whole(params: Any, config: Any, ids: Any, positions: Any, **options: Any) -> Any:
        return forward(params, config, ids, positions, DenseCache.create(config, 1, ids.shape[1], name), **options)

    monkeypatch.setattr(engines, "_forward", jax.jit(whole, static_argnames="config"))
    return name


def stored(model: Model, scheme: str = "int8") -> Model:
    return dataclasses.replace(model, kv_dtype=scheme)


def test_an_engine_draws_what_each_would_draw_alone(scheme: str) -> None:
    """With prefixes found, prompts in pieces, and too few pages for all, so that rows are preempted."""
    model = stored(tiny_model(), scheme)
    core = Core(model, small_settings(pages=7))
    check(model, core, 14)
    check(model, core, 14)  # with the cache warm
    counts = core.snapshot().counts
    assert counts.preemptions > 0
    assert counts.prefix_hit_tokens > 0
    assert core.snapshot().kv_dtype == scheme
    nothing_is_held(core)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8"], indirect=True)
@pytest.mark.parametrize("changes", [{"prefix_cache": False}, {"steps": 4}, {"drafts": 3, "draft_rows": 2}], ids=str)
@pytest.mark.parametrize("case", ["llama3.1-rope", "mistral-sliding"])
def test_sizes_change_nothing(case: str, changes: dict[str, Any], scheme: str) -> None:
    model = stored(golden_model(case), scheme)
    core = Core(model, small_settings(**changes))
    asked = some_requests(model, 9)
    for request, news in zip(asked, run(core, asked), strict=True):
        assert tokens(news) == alone(model, request).tokens


# ---- how far from the unquantised


@pytest.mark.parametrize(
    ("case", "scheme", "most"),
    [
        ("llama3.1-rope", "int8", 0.05),
        ("llama-mqa", "int8", 0.05),
        ("qwen2-bias", "int8", 0.05),
        ("llama-mqa", "k8v4", 0.2),
        ("llama-mqa", "int4", 0.2),
        ("llama-mqa", "fp8", 0.1),
    ],
)
def test_logits_of_golden_models(case: str, scheme: str, most: float) -> None:
    """Against transformers. Scales of another token or head, or one for all tokens, give errors of 0.5 and more."""
    g = load_golden(case)
    batch, length = g.tokens.shape
    cache = DenseCache.create(g.config, batch, length, scheme)
    got, _ = run_model(g.params, g.config, g.tokens, g.positions, cache, rope_lengths=g.lengths)
    assert error(got, g.logits, g.mask) < most


# ---- what users see


def test_only_what_caches_can_store() -> None:
    tiny = tiny_model()
    asked: list[Callable[[], Any]] = [
        lambda: lj.load("nothing-of-this-name", kv_dtype="int2"),
        lambda: dataclasses.replace(tiny, kv_dtype="float64"),
        lambda: lj.LLM(tiny, kv_dtype="int2"),
        lambda: lj.generate(tiny, None, [3, 4], kv_dtype="fp8_fnuz"),
        lambda: Workload(kv_dtype="int3").check(preset("llama-3.2-1b")),
    ]
    for ask in asked:
        with pytest.raises(RequestError, match="a cache cannot store") as caught:
            ask()
        assert caught.value.param == "kv_dtype"
        assert all(name in caught.value.hint for name in KV_DTYPES)
    for command in (["generate", "x"], ["plan", "llama-3.2-1b"], ["bench"]):
        result = CliRunner().invoke(cli, [*command, "--kv-dtype", "int2"])
        assert (result.exit_code, all(f"'{name}'" in result.output for name in KV_DTYPES)) == (2, True)


def test_nothing_is_trained_through_it() -> None:
    def loss(params: Any) -> jax.Array:
        cache = DenseCache.create(CONFIG, 1, 4, "k8v4")
        return forward(params, CONFIG, jnp.zeros((1, 4), jnp.int32), arange_positions(1, 4), cache)[0].sum()

    with pytest.raises(RequestError, match="no gradient") as caught:
        jax.grad(loss)(PARAMS)
    assert caught.value.param == "kv_dtype"
    codes, scales = quantise(jnp.ones((1, 2, 16, 8)), "int8")
    kv = KeysValues(codes, codes, jnp.zeros((1, 1), jnp.int32), scales, scales)
    places = Places(jnp.full((1, 4), 3), jnp.arange(16)[None])
    for backend in ("pallas_interpret", "blocked"):

        def attended(q: jax.Array, backend: str = backend) -> jax.Array:
            return attention(q, kv, places, Rule(Visibility(), 1.0), backend=backend).sum()

        with pytest.raises(KernelError, match="no gradient"):
            jax.grad(attended)(jnp.ones((1, 4, 2, 8)))


@pytest.mark.slow
def test_the_answer_says_what_the_model_says() -> None:
    model = tiny_model()
    asked: Any = {"max_tokens": 5, "ignore_eos": True}
    by_model = lj.generate(stored(model), None, [3, 4, 5], **asked)
    llm = lj.LLM(model, kv_dtype="int8", rows=1)
    assert by_model == lj.generate(model, None, [3, 4, 5], kv_dtype="int8", **asked)
    assert [by_model] == [output.text for output in llm.generate([[3, 4, 5]], **asked)]
    assert (llm.snapshot().kv_dtype, lj.LLM(model, rows=1).snapshot().kv_dtype) == ("int8", "float32")
    assert min(time_static(stored(model), [[3, 4, 5]], [4])) > 0


def test_pages_for_the_memory_that_there_is() -> None:
    config = preset("llama-3.1-8b")
    pages = {
        kv_dtype: settings_for(config, jnp.bfloat16, None, on_cpu=False, free=20 << 30, kv_dtype=kv_dtype).pages
        for kv_dtype in (None, "int8", "k8v4", "int4")
    }
    assert pages["int8"] == pytest.approx(pages[None] * 512 / 260, rel=1e-3)
    assert pages["k8v4"] == pytest.approx(pages[None] * 512 / 196, rel=1e-3)
    assert pages["int4"] == pytest.approx(pages[None] * 512 / 132, rel=1e-3)
    small = preset("llama-3.2-1b")
    most = settings_for(small, jnp.bfloat16, None, on_cpu=False, free=130 << 30, kv_dtype="int8").pages
    assert 2**31 - 2**16 < most * 8 * 64 * 64 < 2**31  # kernels address no larger array
    with pytest.raises(DoesNotFit, match="there is memory for") as caught:
        settings_for(config, jnp.bfloat16, None, on_cpu=False, free=18 << 30)
    assert "--kv-dtype int8" in caught.value.hint


@pytest.mark.slow
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
    assert per_token == {
        "float32": 2**18,
        "bfloat16": 2**17,
        "int8": 32 * 8 * 260,
        "k8v4": 32 * 8 * 196,
        "int4": 32 * 8 * 132,
        "fp8": 32 * 8 * 260,
    }
