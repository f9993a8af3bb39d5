"""The flash attention kernels against the reference in float32: forward and gradients, on the CPU in Pallas' interpret
mode, and on a GPU for real (`gpu`)."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_calls import flat, visible
from tiny_models import LLAMA, random_leaves

from llama_jax.cache import DenseCache
from llama_jax.config import config_from_hf
from llama_jax.errors import KernelError
from llama_jax.kernels.attention import KeysValues, Places, Rule, Visibility
from llama_jax.kernels.attention import attention as attention_of_records
from llama_jax.kernels.attention import attention_reference as reference_of_records
from llama_jax.kernels.attention import flash_attention as flash_of_records
from llama_jax.kernels.attention.cases import arguments as arguments_of
from llama_jax.kernels.attention.flash import cudnn, pallas_triton
from llama_jax.kernels.attention.flash.spans import block_pairs, spans
from llama_jax.kernels.attention.flash.tiles import Tiles, pieces_of
from llama_jax.kernels.attention.shapes import MEASURED_PREFILLS, PREFILLS, AttentionShape
from llama_jax.kernels.dispatch import using
from llama_jax.kernels.pallas import dot, narrow, rounds_to_bfloat16, tile_width
from llama_jax.model import forward
from llama_jax.params import abstract_params, unflatten
from llama_jax.targets import TARGETS, find

attention, attention_reference, flash_attention = map(
    flat, (attention_of_records, reference_of_records, flash_of_records)
)
run_kernels = flat(pallas_triton.run)
SMALL = Tiles(block_q=16, block_k=16, dq_block_q=16, dq_block_k=32, dkv_block_q=32, dkv_block_k=16)
PACKED = replace(SMALL, block_k=32, heads=3, dq_block_q=32, dq_pieces=2, dkv_block_k=32, dkv_pieces=2)
FULL, SLIDING, CHUNKED = Visibility(), Visibility("sliding", 11), Visibility("chunked", 13)

# (what is special, tiles): few, as each is compiled; odd lengths, head sizes and groups all the same.
CALLS = [
    (AttentionShape("plain", 2, 48, 64, 4, 2, 16, FULL, dtype="float32"), SMALL),
    (AttentionShape("ragged", 2, 37, 53, 3, 1, 20, FULL, segments=True, dtype="float32"), SMALL),
    (AttentionShape("sliding", 1, 50, 50, 6, 2, 24, SLIDING, sinks=True, dtype="float32"), PACKED),
    (AttentionShape("chunked", 2, 33, 41, 2, 2, 8, CHUNKED, soft_cap=3.0, dtype="float32"), SMALL),
    (AttentionShape("small pages", 2, 20, 56, 6, 2, 16, FULL, page_size=8, dtype="float32"), PACKED),
    (
        AttentionShape(
            "large pages", 2, 35, 96, 2, 1, 16, SLIDING, page_size=32, sinks=True, soft_cap=2.0, dtype="float32"
        ),
        SMALL,
    ),
]
OFTEN = ("sliding", "chunked", "small pages")
"""Calls that the fast tests try with many arrays: between them they have all that is special."""


@functools.cache
def compiled(
    case: AttentionShape, tiles: Tiles | None, interpret: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Output and gradients by floating arguments of the kernels, and of the reference in float32."""

    def both(f: Callable[..., Any], arrays: dict[str, Any], out_grad: Any) -> tuple[Any, Any]:
        floats = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        out, pull = jax.vjp(lambda moved: f(**(arrays | moved), **case.options()), floats)
        return out, pull(out_grad.astype(out.dtype))[0]

    def exact(arrays: dict[str, Any], out_grad: Any) -> tuple[Any, Any]:
        wide = {name: x.astype(jnp.float32) if x.dtype.kind != "i" else x for name, x in arrays.items()}
        return both(attention_reference, wide, out_grad)

    run = functools.partial(run_kernels, tiles=tiles, interpret=interpret)
    return jax.jit(functools.partial(both, run)), jax.jit(exact)


def lookers(case: AttentionShape, arrays: dict[str, Any]) -> np.ndarray:
    """bool [batch, q_len]: the queries that see something."""
    see = visible(
        arrays["q_positions"],
        arrays["kv_positions"],
        case.visibility,
        arrays.get("q_segments"),
        arrays.get("kv_segments"),
    )
    return np.asarray(see.any(axis=2))


def check(
    case: AttentionShape,
    tiles: Tiles | None,
    arrays: dict[str, Any],
    key: jax.Array,
    close: Callable[..., None],
    interpret: bool,
) -> None:
    """Forward and backward; queries that see nothing give zeros, and no gradient."""
    run, exact = compiled(case, tiles, interpret)
    some = lookers(case, arrays)
    out_grad = jax.random.normal(key, arrays["q"].shape) * some[:, :, None, None]
    (out, grads), (expected, expected_grads) = run(arrays, out_grad), exact(arrays, out_grad)
    assert out.dtype == arrays["q"].dtype
    chex.assert_tree_all_finite((out, grads))
    close(out, np.where(some[:, :, None, None], expected, 0), "out")
    for name, grad in grads.items():
        assert grad.dtype == arrays[name].dtype
        close(grad, expected_grads[name], name)


def close_float32(actual: Any, expected: Any, name: str) -> None:
    """Rounding of float32 only: a wrong mask, scale or head is thousands of times further off."""
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5, err_msg=name)


def close_16_bits(actual: Any, expected: Any, name: str) -> None:
    """Inputs and weights have 8 bits (bfloat16): nearly all numbers within 1% (of a typical one at least). Of a few
    numbers (sinks) one decides the norm, and quantiles say nothing."""
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    error = np.abs(actual - expected) / (np.abs(expected) + np.sqrt(np.mean(expected**2)))
    many = error.size >= 100
    if many:
        assert np.quantile(error, 0.5) < 0.003, name
        assert np.quantile(error, 0.99) < 0.012, name
    assert error.max() < 0.05, name
    assert np.linalg.norm(actual - expected) < (0.006 if many else 0.012) * np.linalg.norm(expected), name


def placed(case: AttentionShape, data: st.DataObject) -> tuple[dict[str, Any], jax.Array]:
    """Consecutive positions behind a prefix, with padding before, behind or anywhere; or any positions in any order."""
    seed = data.draw(st.integers(0, 2**32 - 1))
    key, rng = jax.random.key(seed), np.random.default_rng(seed)
    kind = data.draw(st.sampled_from(["in order", "padded", "holes", "any"]))
    arrays = {name: np.array(x) for name, x in case.example(key).items()}
    q, kv = arrays["q_positions"], arrays["kv_positions"]
    for row in range(case.batch):
        if kind == "padded":
            left, right = rng.integers(0, 20, 2)
            kv[row] = np.where(np.arange(case.kv_len) < left, -1, np.arange(case.kv_len) - left)
            kv[row, case.kv_len - right :] = -1
            q[row] = kv[row, -case.q_len :]
        elif kind == "holes":
            kv[row, rng.random(case.kv_len) < 0.3] = -1
            q[row, rng.random(case.q_len) < 0.3] = -1
        elif kind == "any":
            kv[row], q[row] = rng.integers(-1, 40, case.kv_len), rng.integers(-1, 40, case.q_len)
        if case.segments:
            arrays["q_segments"][row] = np.sort(rng.integers(0, 3, case.q_len))
            arrays["kv_segments"][row] = np.sort(rng.integers(0, 3, case.kv_len))
    if case.page_size:  # pages that hold nothing visible may have any number
        empty = (kv < 0).reshape(case.batch, -1, case.page_size).all(axis=2)
        arrays["page_table"] = np.where(empty & (rng.random(empty.shape) < 0.5), 10**6, arrays["page_table"])
    return {name: jnp.asarray(x) for name, x in arrays.items()}, key


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [pytest.param(call, id=call[0].name, marks=[] if call[0].name in OFTEN else [pytest.mark.slow]) for call in CALLS],
)
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=6)
def test_against_the_reference(call: tuple[AttentionShape, Tiles], data: st.DataObject) -> None:
    case, tiles = call
    arrays, key = placed(case, data)
    check(case, tiles, arrays, key, close_float32, interpret=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(dtype: str) -> None:
    case = AttentionShape("sixteen", 1, 96, 128, 4, 2, 32, Visibility("sliding", 70), dtype=dtype)
    key = jax.random.key(1)
    check(case, SMALL, case.example(key), key, close_16_bits, interpret=True)


def test_default_tiles_and_the_operation() -> None:
    case = AttentionShape("default", 1, 20, 20, 2, 1, 16, dtype="float32", in_order=True)
    arrays = case.example(jax.random.key(2))
    expected = attention_reference(**arrays, **case.options())
    close_float32(attention(**arrays, **case.options(), backend="pallas_interpret"), expected, "out")
    with using(flash_attention="pallas_interpret"):
        close_float32(jax.jit(functools.partial(attention, **case.options()))(**arrays), expected, "out")


def test_rows_that_see_nothing_of_their_first_block() -> None:
    """A fused multiplication and addition must not leave the rounding of a masked logit, which is as large as 1e22."""
    case = AttentionShape("chunks", 1, 128, 128, 1, 1, 16, Visibility("chunked", 48), dtype="float32")
    arrays = case.example(jax.random.key(6))
    options = case.options() | {"scale": 80**-0.5}
    out = jax.jit(functools.partial(run_kernels, tiles=Tiles(), interpret=True, **options))(**arrays)
    close_float32(out, attention_reference(**arrays, **options), "out")


def test_products_sum_over_enough_numbers() -> None:
    """Of shorter sums of 16-bit numbers Triton makes wrong results on NVIDIA GPUs."""
    tile = jnp.ones((16, 32), jnp.bfloat16)
    assert float(dot(tile, tile, transpose_b=True)[0, 0]) == 32
    assert float(dot(tile[:, :16], tile)[0, 0]) == 16
    for transpose_b in (True, False):
        with pytest.raises(KernelError, match="over 8 numbers"):
            dot(tile[:, :8], tile[:, :8] if transpose_b else tile[:8], transpose_b=transpose_b)
    assert [tile_width(n) for n in (1, 8, 16, 17, 80, 256)] == [16, 16, 16, 32, 128, 256]
    assert [pieces_of(n, 4) for n in (8, 16, 24, 64, 80, 256)] == [1, 1, 2, 4, 4, 4]
    assert pieces_of(256, 16) == 16
    case = AttentionShape("short blocks", 1, 16, 16, 1, 1, 16)
    with pytest.raises(KernelError, match="over 8 numbers") as caught:
        run_kernels(
            **case.example(jax.random.key(7)), **case.options(), tiles=replace(SMALL, block_k=8), interpret=True
        )
    assert "at least 16" in caught.value.hint


def test_extreme_logits() -> None:
    """Weights that overflow float32, a sink that takes all, and one that takes nothing."""
    case = AttentionShape("extreme", 1, 16, 16, 3, 1, 16, dtype="float32", sinks=True)
    arrays = case.example(jax.random.key(3))
    arrays |= {"q": arrays["q"] * 1e4, "sinks": jnp.array([1e6, -1e6, 0.0])}
    out = run_kernels(**arrays, **case.options(), tiles=SMALL, interpret=True)
    close_float32(out, attention_reference(**arrays, **case.options()), "out")
    assert not np.asarray(out[:, :, 0]).any()


@functools.cache
def compiled_spans(visibility: Visibility) -> Callable[..., Any]:
    """Jitted `visible`, and `spans` of blocks of 4 queries and 3 slots."""
    pairs = functools.partial(block_pairs, block_q=4, block_k=3)
    return jax.jit(
        lambda q, kv, *segments: (visible(q, kv, visibility, *segments), pairs(Places(q, kv, *segments), visibility))
    )


@hypothesis.given(
    st.sampled_from([FULL, SLIDING, CHUNKED, Visibility("sliding", 1), Visibility("chunked", 1)]),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.booleans(),
)
@hypothesis.settings(max_examples=100)
def test_spans_hold_all_that_is_visible(visibility: Visibility, seed: int, in_order: bool, packed: bool) -> None:
    """Blocks outside of a span hold nothing visible, those within its whole part only what is visible."""
    block_q, block_k, q_len, kv_len = 4, 3, 30, 29
    rng = np.random.default_rng(seed)
    start, width = rng.integers(0, 30), rng.integers(1, 30)

    def positions(length: int) -> np.ndarray:
        row = np.arange(length) if in_order else rng.integers(start - 1, start + width, length)
        if rng.random() < 0.5:  # padding before and behind
            row[: rng.integers(0, 10)] = row[length - rng.integers(0, 10) :] = -1
        return row.astype(np.int32)[None]

    def segments(length: int) -> np.ndarray:
        return np.sort(rng.integers(0, 3 if packed else 1, (1, length))).astype(np.int32)

    q, kv = positions(q_len), positions(kv_len)
    see, (some, every) = compiled_spans(visibility)(q, kv, segments(q_len), segments(kv_len))
    see, table, real = np.asarray(see)[0], np.asarray(spans(some, every))[0], q[0] >= 0
    for i, (first, whole_first, whole_last, last) in enumerate(table):
        assert 0 <= first <= whole_first <= whole_last <= last <= -(-kv_len // block_k)
        rows, theirs = see[block_q * i :][:block_q], real[block_q * i :][:block_q]
        pairs = [rows[:, block_k * j :][:, :block_k] for j in range(-(-kv_len // block_k))]
        assert not any(x.any() for j, x in enumerate(pairs) if not first <= j < last)
        assert all(x[theirs].all() and x.shape[1] == block_k for x in pairs[whole_first:whole_last])
        if in_order and not packed and theirs.all() and (kv >= 0).all():  # nothing in vain, no mask without need
            assert [first <= j < last for j in range(len(pairs))] == [x.any() for x in pairs]
            whole = [x.all() and x.shape[1] == block_k for x in pairs]
            assert [whole_first <= j < whole_last for j in range(len(pairs))] == whole


def test_rounding_by_hand() -> None:
    """To the nearest bfloat16, ties away from zero."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(10_000) * 10.0 ** rng.integers(-30, 30, 10_000), jnp.float32)
    x = jnp.concatenate([x, jnp.array([0.0, -0.0, jnp.inf, -jnp.inf, 1.0, -2.5, 1 + 2**-8, 1 + 2**-8 + 2**-20])])
    hand = np.asarray(narrow(x, jnp.bfloat16, by_hand=True))
    nearest = np.asarray(x.astype(jnp.bfloat16))
    tie = np.asarray(jax.lax.bitcast_convert_type(x, jnp.int32)) & 0xFFFF == 0x8000
    np.testing.assert_array_equal(hand[~tie], nearest[~tie])
    np.testing.assert_array_equal(hand[-2:], np.array([1 + 2**-7] * 2, hand.dtype))
    assert np.isnan(np.asarray(narrow(jnp.array([jnp.nan]), jnp.bfloat16, by_hand=True), np.float32))
    assert narrow(x, jnp.float16, by_hand=True).dtype == jnp.float16
    assert {target.arch for target in TARGETS if target.vendor == "amd" and rounds_to_bfloat16(target)} == {"gfx950"}


def arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of a call that every GPU backend takes, and changes to it."""
    made: dict[str, Any] = prefill_case().arguments() | prefill_case().options()
    return arguments_of(**(made | changes))


def prefill_case() -> AttentionShape:
    return AttentionShape("prefill", 1, 64, 64, 4, 2, 64, in_order=True)


def struct(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"q": struct(1, 64, 4, 64, dtype="float32")}, "different types"),
        ({name: struct(1, 2, 64, 64, dtype="float8_e4m3fn") for name in "qkv"}, "float8_e4m3fn is not one of"),
        ({"q": struct(1, 64, 4, 512)}, "head_dim 512"),
        ({"scale": -1.0}, "not positive"),
        ({"k": struct(1, 2, 2**27, 64)}, "elements"),
    ],
)
def test_what_the_kernels_refuse(changes: dict[str, Any], reason: str) -> None:
    for name in ("mi300x", "rx7900xtx", "h100"):
        assert pallas_triton.unsupported(find(name), **arguments()) is None
        assert reason in (pallas_triton.unsupported(find(name), **arguments(**changes)) or "")


def test_tiles_that_do_not_fit_the_heads() -> None:
    with pytest.raises(KernelError, match="3 heads do not divide groups of 2"):
        run_kernels(**prefill_case().example(jax.random.key(0)), **prefill_case().options(), tiles=PACKED)


@pytest.mark.skipif(os.environ.get("JAX_PLATFORMS") != "cpu", reason="on a GPU they run")
def test_the_kernels_are_for_gpus() -> None:
    with pytest.raises(KernelError, match="GPUs only"):
        flash_attention(
            **prefill_case().example(jax.random.key(0)), **prefill_case().options(), backend="pallas_triton"
        )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"in_order": False}, "in order"),
        ({"visibility": CHUNKED}, "chunked"),
        ({"soft_cap": 3.0}, "soft cap"),
        ({"sinks": struct(4)}, "sinks"),
        ({"q_segments": struct(1, 64), "kv_segments": struct(1, 64)}, "segments"),
        ({"page_table": struct(1, 4)}, "pages"),
        ({"k": struct(1, 2, 128, 64)}, "not the same tokens"),
        ({name: struct(*prefill_case().arguments()[name].shape, dtype="float32") for name in "qkv"}, "float32"),
        ({"q": struct(1, 64, 4, 100)}, "head_dim 100"),
        ({"q": struct(1, 64, 4, 256)}, "head_dim 256"),
    ],
)
def test_what_cudnn_refuses(changes: dict[str, Any], reason: str) -> None:
    assert cudnn.unsupported(find("h100"), **arguments()) is None
    assert reason in (cudnn.unsupported(find("h100"), **arguments(**changes)) or "")
    assert "NVIDIA" in (cudnn.unsupported(find("mi300x"), **arguments()) or "")


@pytest.mark.parametrize("visibility", [FULL, SLIDING])
def test_cudnn_is_asked_for_the_same(visibility: Visibility, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that goes to cuDNN, computed by XLA."""
    plain = jax.nn.dot_product_attention
    asked = []

    def by_xla(*args: Any, implementation: str, **kwargs: Any) -> jax.Array:
        asked.append(implementation)
        return plain(*args, **kwargs, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    case = AttentionShape("cudnn", 2, 24, 24, 6, 2, 16, visibility, dtype="float32", in_order=True)
    arrays = case.example(jax.random.key(4))
    with jax.default_matmul_precision("highest"):
        out = flat(cudnn.run)(**arrays, **case.options())
    close_float32(out, attention_reference(**arrays, **case.options()), "out")
    assert asked == ["cudnn"]


def device(name: str) -> Any:
    """A context in which programs are traced for a GPU that is not there."""
    target = find(name)
    abstract = jax.sharding.AbstractDevice(device_kind=target.arch, num_cores=target.compute_units, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=abstract))


@pytest.mark.slow
@pytest.mark.parametrize("case", PREFILLS, ids=lambda case: case.name)
def test_cases_lower_for_amd(case: AttentionShape) -> None:
    """Triton's language has all that the kernels use, forward and backward."""
    names = list(case.arguments())

    def call(*arrays: jax.Array) -> jax.Array:
        return flash_attention(**dict(zip(names, arrays, strict=True)), **case.options(), backend="pallas_triton")

    def train(*arrays: jax.Array) -> Any:
        return jax.grad(lambda *a: call(*a).astype(jnp.float32).sum(), argnums=(0, 1, 2))(*arrays)

    with device("mi350x" if case.scheme == "fp8" else "mi300x"):  # the fp8 of each
        traced = jax.jit(train if case.backward else call).trace(*case.arguments().values())
        text = traced.lower(lowering_platforms=("rocm",)).as_text()
    assert "flash_attention_forward" in text
    assert ("flash_attention_backward_slots" in text) == case.backward


def test_measured_cases() -> None:
    """The costs that speeds are computed from, for one case by hand."""
    case = next(case for case in MEASURED_PREFILLS if case.name == "llama-3.1-8b-b4-t4096")
    assert case.flops() == 4 * (4096 * 4097 // 2) * 32 * 128 * 2 * 2
    assert case.bytes() == 2 * 2 * 4 * 4096 * (32 + 8) * 128
    window = AttentionShape("window", 1, 3, 10, 1, 1, 1, Visibility("sliding", 4))
    assert window.pairs() == 4 + 4 + 4
    chunk = AttentionShape("chunk", 2, 3, 10, 1, 1, 1, Visibility("chunked", 4))
    assert chunk.pairs() == 2 * (4 + 1 + 2)
    packed = AttentionShape("packed", 1, 5, 5, 1, 1, 1, segments=True)
    assert packed.pairs() == (1 + 2 + 3) + (1 + 2)
    windows = AttentionShape("packed windows", 1, 6, 6, 1, 1, 1, Visibility("sliding", 2), segments=True)
    assert windows.pairs() == 2 * (1 + 2 + 2)
    names = [case.name for case in (*PREFILLS, *MEASURED_PREFILLS)]
    assert len(set(names)) == len(names)


@pytest.mark.gpu
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0].name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_on_the_gpu(call: tuple[AttentionShape, Tiles], dtype: str) -> None:
    """The same calls for real, with the small tiles and with those of the target."""
    case = replace(call[0], dtype=dtype)
    key = jax.random.key(5)
    close = close_float32 if dtype == "float32" else close_16_bits
    for tiles in (call[1], None):
        check(case, tiles, case.example(key), key, close, interpret=False)


@pytest.mark.slow
def test_forward_says_when_positions_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a call whose positions `forward` made itself may go to a backend that reads none."""
    seen: list[bool] = []

    def spy(q: jax.Array, kv: KeysValues, places: Places, rule: Rule) -> jax.Array:
        seen.append(rule.in_order)
        return reference_of_records(q, kv, places, rule)

    monkeypatch.setattr("llama_jax.model.transformer.attention", spy)
    config, tokens = config_from_hf(LLAMA), jnp.ones((1, 3), jnp.int32)

    def in_order(**more: Any) -> set[bool]:
        jax.clear_caches()  # a layer that was traced before would not call the spy
        seen.clear()
        jax.eval_shape(lambda params: forward(params, config, tokens, **more), abstract_params(config))
        return set(seen)

    assert in_order() == {True}
    assert in_order(positions=jnp.array([[-1, 0, 1]])) == {False}
    assert in_order(segment_ids=jnp.array([[0, 0, 1]])) == {False}


@pytest.mark.slow
def test_a_model_with_the_kernels() -> None:
    """Prefill of left-padded rows in two chunks, through a dense cache."""
    config = config_from_hf(LLAMA)
    params = jax.tree.map(jnp.asarray, unflatten(random_leaves(config)))
    tokens = jnp.arange(48).reshape(2, 24)
    positions = jnp.arange(24) - jnp.array([[0], [5]])

    @jax.jit
    def prefill(params: Any) -> tuple[jax.Array, jax.Array]:
        first, cache = forward(
            params, config, tokens[:, :12], positions[:, :12], DenseCache.create(config, 2, 32, "float32")
        )
        return first, forward(params, config, tokens[:, 12:], positions[:, 12:], cache)[0]

    expected = prefill(params)
    with using(flash_attention="pallas_interpret"):
        logits = prefill(params)
    seen = np.asarray(positions >= 0)
    scale = np.abs(np.asarray(expected[1])).max()
    np.testing.assert_allclose(logits[0][seen[:, :12]] / scale, expected[0][seen[:, :12]] / scale, atol=2e-5)
    np.testing.assert_allclose(logits[1] / scale, expected[1] / scale, atol=2e-5)
    assert not np.array_equal(logits[1], expected[1])  # something else did run
