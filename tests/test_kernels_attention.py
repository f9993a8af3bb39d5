"""The attention reference against a loop in float64, written from the definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_calls import flat, visible

from llama_jax.errors import KernelError
from llama_jax.kernels.attention import (
    KeysValues,
    Places,
    Rule,
    Visibility,
    attention_reference,
    decode_attention,
    flash_attention,
)
from llama_jax.kernels.attention import attention as attention_of_records
from llama_jax.kernels.dispatch import Operation, jax_triton
from llama_jax.targets import find

attention = flat(attention_of_records)
run = jax.jit(attention, static_argnums=5, static_argnames=("visibility", "scale", "backend"))

# (query heads, key/value heads, head_dim): MHA, GQA, MQA, odd sizes
HEADS = [(2, 2, 4), (6, 2, 3), (3, 1, 5)]
VISIBILITIES = [
    Visibility(),
    Visibility("sliding", 1),
    Visibility("sliding", 3),
    Visibility("chunked", 1),
    Visibility("chunked", 4),
]


def sees(q: int, kv: int, visibility: Visibility) -> bool:
    """Whether the token at position q sees that at position kv."""
    if kv < 0 or kv > q:
        return False
    if visibility.kind == "sliding":
        return kv > q - visibility.window
    if visibility.kind == "chunked":
        return any(start <= kv <= q < start + visibility.window for start in range(0, q + 1, visibility.window))
    return True


def brute_force(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_pos: np.ndarray,
    kv_pos: np.ndarray,
    visibility: Visibility,
    scale: float,
    q_seg: np.ndarray | None = None,
    kv_seg: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Output [batch, q_len, q_heads, head_dim] in float64, and bool [batch, q_len] where a query sees anything."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, some = np.zeros(q.shape), np.zeros(q.shape[:2], bool)
    group = q.shape[2] // k.shape[1]
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            seen = [
                s
                for s in range(k.shape[2])
                if sees(q_pos[b, t], kv_pos[b, s], visibility) and (q_seg is None or q_seg[b, t] == kv_seg[b, s])
            ]
            some[b, t] = bool(seen)
            for h in range(q.shape[2]) if seen else ():
                logits = np.array([q[b, t, h] @ k[b, h // group, s] for s in seen]) * scale
                weights = np.exp(logits - logits.max())
                out[b, t, h] = weights @ v[b, h // group, seen] / weights.sum()
    return out, some


@st.composite
def cases(draw: st.DrawFn) -> dict:
    """Few shapes, so that little is compiled; any positions, with padding anywhere and slots in any order."""
    heads, kv_heads, head_dim = draw(st.sampled_from(HEADS))
    batch, q_len, kv_len = draw(st.sampled_from([(1, 1, 7), (2, 5, 5)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def positions(length: int) -> np.ndarray:
        row = st.lists(st.integers(-1, 9), min_size=length, max_size=length)
        return np.array(draw(st.lists(row, min_size=batch, max_size=batch)), np.int32)

    case = {
        "q": 3 * rng.standard_normal((batch, q_len, heads, head_dim)),
        "k": 3 * rng.standard_normal((batch, kv_heads, kv_len, head_dim)),
        "v": rng.standard_normal((batch, kv_heads, kv_len, head_dim)),
        "q_positions": positions(q_len),
        "kv_positions": positions(kv_len),
        "visibility": draw(st.sampled_from(VISIBILITIES)),
        "scale": draw(st.sampled_from([1.0, 0.3])),
    }
    if draw(st.booleans()):
        case["q_segments"] = rng.integers(0, 2, (batch, q_len)).astype(np.int32)
        case["kv_segments"] = rng.integers(0, 2, (batch, kv_len)).astype(np.int32)
    return case | {name: case[name].astype(np.float32) for name in "qkv"}


@hypothesis.given(cases())
def test_against_the_definition(case: dict) -> None:
    out = run(**case)
    assert out.dtype == case["q"].dtype
    expected, some = brute_force(*case.values())
    np.testing.assert_allclose(np.asarray(out)[some], expected[some], rtol=2e-5, atol=2e-5)
    chex.assert_tree_all_finite(out)  # also where there is nothing to see


@hypothesis.given(
    st.integers(-3, 60), st.integers(-3, 60), st.sampled_from(["full", "sliding", "chunked"]), st.integers(1, 12)
)
def test_visible(q: int, kv: int, kind: str, window: int) -> None:
    visibility = Visibility(kind, window)
    see = visible(np.array([[q]]), np.array([[kv]]), visibility)
    assert bool(see[0, 0, 0]) == sees(q, kv, visibility)


def test_windows_include_the_token_itself() -> None:
    position = jnp.arange(6)[None]
    sliding = visible(position, position, Visibility("sliding", 2))[0]
    chunked = visible(position, position, Visibility("chunked", 3))[0]
    np.testing.assert_array_equal(np.sum(sliding, axis=1), [1, 2, 2, 2, 2, 2])
    np.testing.assert_array_equal(np.sum(chunked, axis=1), [1, 2, 3, 1, 2, 3])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(dtype: str) -> None:
    """Softmax in float32 over many slots: in 16 bits the sum of 4096 weights would be far off."""
    rng = np.random.default_rng(0)
    shape, position = (1, 1, 4096, 8), np.arange(4096, dtype=np.int32)[None]
    q, k, v = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((1, 1, 2, 8), shape, shape))
    v = v + 1  # a mean that differs from zero
    out = run(q, k, v, position[:, -1:], position, Visibility(), scale=0.35)
    assert out.dtype == jnp.dtype(dtype)
    arrays = (np.asarray(x, np.float32) for x in (q, k, v))
    expected, _ = brute_force(*arrays, position[:, -1:], position, Visibility(), 0.35)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=1e-2, atol=1e-2)


def test_large_logits() -> None:
    """The largest weight wins, and nothing overflows."""
    q = jnp.full((1, 1, 1, 2), 1e3)
    k = jnp.array([[[[1.0, 1.0], [-1e3, 0.0], [1e3, 1e3]]]])
    v = jnp.arange(6.0).reshape(1, 1, 3, 2)
    out = run(q, k, v, jnp.array([[2]]), jnp.arange(3)[None], Visibility(), scale=1.0)
    np.testing.assert_allclose(out[0, 0, 0], [4.0, 5.0])


def test_gradient_with_rows_that_see_nothing() -> None:
    q = k = v = jnp.ones((1, 2, 2, 4))
    position = jnp.array([[-1, 0]])

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = attention(q, k, v, position, position, Visibility(), scale=1.0)
        return out[:, 1].sum()

    grads = jax.grad(loss, argnums=(0, 1, 2))(q, k, v)
    chex.assert_tree_all_finite(grads)
    np.testing.assert_allclose(grads[2][0, 0], [[0] * 4, [1] * 4])  # only the visible slot's value counts


def test_an_unknown_backend_is_refused() -> None:
    x, position = jnp.ones((1, 1, 1, 2)), jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(KernelError, match="'decode_attention' has no backend 'none'") as caught:
        attention(x, x, x, position, position, Visibility(), scale=1.0, backend="none")
    assert "auto, " in caught.value.hint
    assert "reference" in caught.value.hint
    named = attention(x, x, x, position, position, Visibility(), scale=1.0, backend="reference")
    np.testing.assert_array_equal(named, x)


@pytest.mark.parametrize("given", ["q_segments", "kv_segments", "q_spans", "kv_spans"])
def test_half_a_pair_is_refused(given: str) -> None:
    x, position = jnp.ones((1, 1, 1, 2)), jnp.zeros((1, 1), jnp.int32)
    places = replace(Places(position, position), **{given: position})
    with pytest.raises(KernelError, match=f"{given} without") as caught:
        attention_of_records(x, KeysValues(x, x), places, Rule(Visibility(), 1.0))
    assert caught.value.hint == "give both or neither"


def test_soft_cap() -> None:
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((1, 2, 5, 4)).astype(np.float32) * 3 for _ in range(3))
    position = np.arange(5, dtype=np.int32)[None]
    out = attention(q.swapaxes(1, 2), k, v, position, position, Visibility(), scale=0.5, soft_cap=2.0)
    logits = 2.0 * np.tanh(np.einsum("bhqd,bhkd->bhqk", q, k) * 0.5 / 2.0)
    weights = np.where(np.tri(5, dtype=bool), np.exp(logits), 0)
    expected = np.einsum("bhqk,bhkd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_sinks_take_part_in_the_softmax_only() -> None:
    """A sink is a key with this logit and a value of zeros."""
    rng = np.random.default_rng(4)
    q = rng.standard_normal((1, 3, 4, 8)).astype(np.float32)
    k, v = (rng.standard_normal((1, 2, 3, 8)).astype(np.float32) for _ in range(2))
    sinks = np.array([-2.0, 0.0, 1.0, 3.0], np.float32)
    position = np.arange(3, dtype=np.int32)[None]
    out = attention(q, k, v, position, position, Visibility(), scale=0.3, sinks=sinks)
    logits = np.einsum("bqhd,bhkd->bqhk", q, k.repeat(2, axis=1)) * 0.3
    weights = np.where(np.tri(3, dtype=bool)[None, :, None], np.exp(logits), 0)
    weights /= weights.sum(-1, keepdims=True) + np.exp(sinks)[:, None]
    np.testing.assert_allclose(out, np.einsum("bqhk,bhkd->bqhd", weights, v.repeat(2, axis=1)), rtol=1e-5, atol=1e-5)


def test_pages_are_slots_in_another_order() -> None:
    rng = np.random.default_rng(5)
    k, v = (rng.standard_normal((2, 3, 12, 4)).astype(np.float32) for _ in range(2))
    q = rng.standard_normal((2, 2, 6, 4)).astype(np.float32)
    table = np.array([[5, 0, 2], [4, 1, 99]], np.int32)  # 99: no page, and not read
    kv_positions = np.arange(12, dtype=np.int32)[None].repeat(2, 0)
    kv_positions[1, 8:] = -1
    q_positions = np.array([[10, 11], [6, 7]], np.int32)

    def pages(rows: np.ndarray) -> np.ndarray:
        out = np.full((6, 3, 4, 4), np.nan, np.float32)
        for b in range(2):
            for i, page in enumerate(table[b]):
                if page < 6:
                    out[page] = rows[b, :, 4 * i : 4 * i + 4]
        return np.nan_to_num(out)

    call = partial(attention, q_positions=q_positions, kv_positions=kv_positions, visibility=Visibility(), scale=0.5)
    dense = call(q, k, v, backend="reference")
    paged = partial(call, q, pages(k), pages(v), page_table=table)
    np.testing.assert_array_equal(paged(backend="reference"), dense)
    np.testing.assert_allclose(paged(backend="blocked"), dense, rtol=1e-6, atol=1e-6)


def random_calls(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [2, 5, 4, 8], k and v [2, 2, 6, 8]."""
    rng = np.random.default_rng(seed)
    k, v = (rng.standard_normal((2, 2, 6, 8)).astype(np.float32) for _ in range(2))
    return rng.standard_normal((2, 5, 4, 8)).astype(np.float32), k, v


def by_definition(q: np.ndarray, k: np.ndarray, v: np.ndarray, see: np.ndarray, scale: float) -> np.ndarray:
    """In float64; see: bool [batch, q_len, kv_len]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[1]
    logits = np.einsum("bqhd,bhkd->bhqk", q, k.repeat(group, axis=1)) * scale
    weights = np.where(see[:, None], np.exp(logits), 0)
    return np.einsum("bhqk,bhkd->bqhd", weights / weights.sum(-1, keepdims=True), v.repeat(group, axis=1))


PLACES = Places(np.array([[1, 2, 3, 4, 5], [0, 1, 2, 3, 4]], np.int32), np.arange(6, dtype=np.int32)[None].repeat(2, 0))


def test_tokens_of_a_span_see_each_other() -> None:
    """Whatever the window; not those of another span or segment, and no empty slot."""
    q, k, v = random_calls(6)
    kv_spans = np.array([[-1, 0, 0, 0, 1, 1], [-1, -1, 3, 3, 3, -1]], np.int32)
    q_spans = np.array([kv_spans[0, 1:], kv_spans[1, :5]], np.int32)
    kv_positions = PLACES.kv_positions.copy()
    kv_positions[1, 4] = -1
    kv_segments = np.array([[0, 0, 0, 1, 1, 1], [0] * 6], np.int32)
    q_segments = np.array([kv_segments[0, 1:], kv_segments[1, :5]], np.int32)
    places = Places(PLACES.q_positions, kv_positions, q_segments, kv_segments, q_spans=q_spans, kv_spans=kv_spans)
    see = np.zeros((2, 5, 6), bool)
    for b, t, s in np.ndindex(*see.shape):
        near = 0 <= places.q_positions[b, t] - kv_positions[b, s] < 2
        together = q_spans[b, t] >= 0 and q_spans[b, t] == kv_spans[b, s]
        see[b, t, s] = (near or together) and kv_positions[b, s] >= 0 and q_segments[b, t] == kv_segments[b, s]
    rule = Rule(Visibility("sliding", 2), 0.4)
    out = attention_of_records(q, KeysValues(k, v), places, rule)
    np.testing.assert_allclose(out, by_definition(q, k, v, see, 0.4), rtol=2e-5, atol=2e-5)


def test_cross_attention_sees_all_that_is_there() -> None:
    q, k, v = random_calls(7)
    kv_positions = np.array([[0, 1, 2, 3, -1, -1], [9, 8, -1, 0, 3, 70]], np.int32)
    rule = Rule(Visibility("all"), 0.4)
    out = attention_of_records(q, KeysValues(k, v), Places(PLACES.q_positions, kv_positions), rule)
    see = (kv_positions >= 0)[:, None].repeat(5, axis=1)
    np.testing.assert_allclose(out, by_definition(q, k, v, see, 0.4), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("paged", [False, True])
def test_quantised_keys_and_values(paged: bool) -> None:
    q, k, v = random_calls(8)
    scales = [np.abs(x).max(axis=-1) / 127 for x in (k, v)]
    small = [np.round(x / s[..., None]).astype(np.int8) for x, s in zip((k, v), scales, strict=True)]
    exact = [x * s[..., None].astype(np.float64) for x, s in zip(small, scales, strict=True)]
    see = PLACES.kv_positions[:, None] <= PLACES.q_positions[..., None]
    kv = KeysValues(*small, k_scale=scales[0], v_scale=scales[1])
    if paged:  # pages of 3 slots, the last one first
        in_pages = [
            x.reshape(2, 2, 2, 3, *x.shape[3:]).swapaxes(1, 2).reshape(4, 2, 3, *x.shape[3:]) for x in (*small, *scales)
        ]
        kv = KeysValues(
            *(x[::-1] for x in in_pages[:2]), np.array([[3, 2], [1, 0]], np.int32), *(x[::-1] for x in in_pages[2:])
        )
    out = attention_of_records(q, kv, PLACES, Rule(Visibility(), 0.4))
    np.testing.assert_allclose(out, by_definition(q, *exact, see, 0.4), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("f", [attention_of_records, attention_reference])
def test_packed_queries_see_their_own_row(f: Callable[..., jax.Array], paged: bool) -> None:
    """Rows in any order; a row beyond the last is padding."""
    q, k, v = random_calls(9)
    rows, at = np.array([1, 0, 2, 1, 0], np.int32), np.array([3, 5, -1, 1, 0], np.int32)
    kv = KeysValues(k, v)
    if paged:
        pages = [x.reshape(2, 2, 2, 3, 8).swapaxes(1, 2).reshape(4, 2, 3, 8)[::-1] for x in (k, v)]
        kv = KeysValues(*pages, np.array([[3, 2], [1, 0]], np.int32))
    out = f(q[:1], kv, Places(at[None], PLACES.kv_positions, rows=rows[None]), Rule(Visibility(), 0.4))
    assert out.shape == q[:1].shape
    chex.assert_tree_all_finite(out)
    for i in (0, 1, 3, 4):
        b = slice(rows[i], rows[i] + 1)
        see = (PLACES.kv_positions[b] <= at[i])[:, None]
        np.testing.assert_allclose(
            out[:, i : i + 1], by_definition(q[:1, i : i + 1], k[b], v[b], see, 0.4), rtol=2e-5, atol=2e-5
        )


@pytest.mark.parametrize("op", [decode_attention, flash_attention])
def test_kernels_refuse_what_they_do_not_know(op: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one of them, with a reason; jax-triton as if it were installed."""
    monkeypatch.setattr(jax_triton, "unsupported", lambda target: None)
    length = 4 if op is decode_attention else 16
    q, k = jax.ShapeDtypeStruct((1, length, 2, 64), "bfloat16"), jax.ShapeDtypeStruct((1, 2, length, 64), "bfloat16")
    at, scale = jax.ShapeDtypeStruct((1, length), "int32"), jax.ShapeDtypeStruct((1, 2, length), "float32")
    kv, places, rule = KeysValues(k, k), Places(at, at), Rule(Visibility(), 1.0, in_order=True)
    calls = {
        "": (kv, places, rule),
        "codes": (replace(kv, k_scale=scale, v_scale=scale), places, rule),
        "packed": (kv, replace(places, rows=at), rule),
        "spans": (kv, replace(places, q_spans=at, kv_spans=at), rule),
        "see all": (kv, places, replace(rule, visibility=Visibility("all"))),
    }
    for reason, call in calls.items():
        for name, backend in op.backends.items():
            of_pages = replace(call[0], page_table=at) if name == "blocked" else call[0]
            said = backend.unsupported(find("h100"), q, of_pages, *call[1:]) or ""
            assert reason in said if name != "reference" and reason else not said, (name, said)
