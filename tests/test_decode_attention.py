"""Decode attention on Pallas: its partition, and kernels against the reference in float32, interpreted or on a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_calls import flat, visible
from helpers import error
from tiny_models import LLAMA, random_leaves

from llama_jax.config import config_from_hf
from llama_jax.errors import KernelError
from llama_jax.kernels.attention import Visibility
from llama_jax.kernels.attention import attention as attention_of_records
from llama_jax.kernels.attention import attention_reference as reference_of_records
from llama_jax.kernels.attention import decode_attention as decode_of_records
from llama_jax.kernels.attention.assembly import BYTE, Field, made_of
from llama_jax.kernels.attention.cases import arguments as arguments_of
from llama_jax.kernels.attention.codes import Decoder
from llama_jax.kernels.attention.decode import pairs, pallas_triton, partition
from llama_jax.kernels.attention.decode.tiles import Tiles, candidates, default_tiles, padded_rows
from llama_jax.kernels.attention.records import SCHEMES
from llama_jax.kernels.attention.shapes import DECODES, MEASURED_DECODES, AttentionShape
from llama_jax.kernels.dispatch import using
from llama_jax.model import forward
from llama_jax.params import unflatten
from llama_jax.targets import TARGETS, find

# The GPU runs the compiled kernels, the CPU the same ones interpreted.
BACKENDS = ["pallas_interpret", pytest.param("pallas_triton", marks=pytest.mark.gpu)]
EXAMPLES = hypothesis.settings(max_examples=8)
attention, attention_reference, decode_attention = map(
    flat, (attention_of_records, reference_of_records, decode_of_records)
)
VISIBILITIES = [Visibility(), Visibility("sliding", 1), Visibility("sliding", 20), Visibility("chunked", 16)]


def random_call(
    seed: int,
    *,
    batch: int,
    q_len: int,
    slots: int,
    q_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    page_size: int = 0,
    dtype: str = "float32",
    lengths: list[int] | None = None,
    left: bool = False,
) -> dict[str, Any]:
    """Rows of random lengths, padded on either side; pages in any order, nonsense in the table behind a row's end."""
    rng = np.random.default_rng(seed)
    length = np.array(lengths if lengths is not None else rng.integers(q_len, slots + 1, batch))
    slot = np.arange(slots)
    position = slot - (slots - length[:, None]) if left else slot + 0 * length[:, None]
    kv_positions = np.where((position >= 0) & (position < length[:, None]), position, -1).astype(np.int32)
    k, v = (rng.standard_normal((batch, kv_heads, slots, head_dim)).astype(dtype) for _ in range(2))
    call: dict[str, Any] = {
        "q": (2 * rng.standard_normal((batch, q_len, q_heads, head_dim))).astype(dtype),
        "q_positions": (length[:, None] - q_len + np.arange(q_len)).astype(np.int32),
        "kv_positions": kv_positions,
    }
    if page_size:
        per_row = slots // page_size
        spare = 3
        table = rng.permutation(batch * per_row + spare)[: batch * per_row].reshape(batch, per_row).astype(np.int32)
        pages = rng.standard_normal((2, batch * per_row + spare, kv_heads, page_size, head_dim)).astype(dtype)
        for into, rows in zip(pages, (k, v), strict=True):
            into[table] = rows.reshape(batch, kv_heads, per_row, page_size, head_dim).swapaxes(1, 2)
        used = (kv_positions.reshape(batch, per_row, page_size) >= 0).any(axis=2)
        nonsense = rng.choice([-(2**31), -1, 10**6, 2**31 - 1], table.shape)
        call |= {"k": pages[0], "v": pages[1], "page_table": np.where(used, table, nonsense).astype(np.int32)}
    else:
        call |= {"k": k, "v": v}
    return call


def expected(call: dict[str, Any], **options: Any) -> np.ndarray:
    """The reference in float32."""
    wide = {n: jnp.asarray(x, jnp.float32) if n in ("q", "k", "v") else jnp.asarray(x) for n, x in call.items()}
    return np.asarray(attention_reference(**wide, **options))


def compile_call(function: Any, backend: str, **options: Any) -> Any:
    """`function` of a dict of arrays, compiled."""
    run = partial(function, **options, backend=backend)
    return jax.jit(lambda call: run(**call))


def compute(call: dict[str, Any], backend: str, **options: Any) -> np.ndarray:
    out = compile_call(decode_attention, backend, **options)(call)
    assert out.shape == call["q"].shape
    assert out.dtype == call["q"].dtype
    return np.asarray(out, np.float32)


def seen(call: dict[str, Any], visibility: Visibility) -> np.ndarray:
    """bool [batch, q_len], where a query sees anything; elsewhere the result means nothing."""
    see = visible(jnp.asarray(call["q_positions"]), jnp.asarray(call["kv_positions"]), visibility)
    return np.asarray(see.any(axis=2) & (call["q_positions"] >= 0))


# ---- the partition

visible_slots = jax.jit(partition.visible_slots, static_argnums=2)


@jax.jit
def all_shares(first: jax.Array, end: jax.Array, block_k: jax.Array, wanted: jax.Array) -> tuple[jax.Array, ...]:
    """Row, start and stop of shares 0 .. 31; first and last share of each row."""
    return partition.shares(first, end, partition.Cut(block_k, wanted), 32)


@st.composite
def positions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Positions of queries and slots, with padding anywhere and slots in any order."""
    batch, q_len, slots = draw(st.sampled_from([(3, 1, 24), (2, 3, 11)]))

    def rows(length: int) -> np.ndarray:
        row = st.lists(st.integers(-1, 20), min_size=length, max_size=length)
        return np.array(draw(st.lists(row, min_size=batch, max_size=batch)), np.int32)

    return rows(q_len), rows(slots)


@hypothesis.given(positions(), st.sampled_from(VISIBILITIES))
def test_ranges_hold_all_that_is_seen(at: tuple[np.ndarray, np.ndarray], visibility: Visibility) -> None:
    q_positions, kv_positions = map(jnp.asarray, at)
    first, end = visible_slots(q_positions, kv_positions, visibility)
    see = np.asarray(visible(q_positions, kv_positions, visibility) & (q_positions >= 0)[:, :, None]).any(axis=1)
    slot = np.arange(see.shape[1])
    inside = (slot >= np.asarray(first)[:, None]) & (slot < np.asarray(end)[:, None])
    assert not np.any(see & ~inside)


def test_ranges_hold_no_more_than_needed() -> None:
    slots = jnp.arange(100, dtype=jnp.int32)[None].repeat(2, axis=0)
    kv_positions = jnp.where(slots < jnp.array([[70], [30]]), slots, -1)
    for visibility, first, end in [
        (Visibility(), [0, 0], [70, 30]),
        (Visibility("sliding", 8), [61, 21], [70, 30]),
        (Visibility("chunked", 16), [64, 16], [70, 30]),
    ]:
        ranges = partition.visible_slots(jnp.array([[68, 69], [28, 29]]), kv_positions, visibility)
        np.testing.assert_array_equal(ranges, [first, end])
    # A row that sees nothing has no slots; left padding is left out.
    first, end = partition.visible_slots(jnp.array([[-1, -1], [-1, 9]]), kv_positions[:, ::-1], Visibility())
    assert first[0] >= end[0]
    assert (first[1], end[1]) == (90, 100)


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=5, max_size=5),
    st.integers(1, 20),
    st.sampled_from([1, 4, 16]),
)
def test_shares_cover_each_block_once(rows: list[tuple[int, int]], wanted: int, block_k: int) -> None:
    first, end = (jnp.array(x, jnp.int32) for x in zip(*rows, strict=True))
    row, start, stop, low, high = map(np.asarray, all_shares(first, end, block_k, wanted))
    found = [(int(r), b) for r, begin, until in zip(row, start, stop, strict=True) for b in range(begin, until)]
    blocks = [(r, b) for r, (f, e) in enumerate(rows) for b in range(f // block_k, -(-e // block_k))]
    assert found == blocks
    assert (stop - start).max() <= max(-(-len(blocks) // wanted), 1)
    used = np.flatnonzero(stop > start)
    assert used.size <= wanted + len(rows) - 1
    np.testing.assert_array_equal(used, np.arange(used.size))
    for r in range(len(rows)):
        mine = used[row[used] == r]
        np.testing.assert_array_equal(mine, np.arange(low[r], high[r]))
        assert not mine.size or np.ptp((stop - start)[mine]) <= 1


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=4, max_size=4), st.integers(1, 5)
)
def test_shares_of_fixed_length_follow_from_their_row(rows: list[tuple[int, int]], length: int) -> None:
    cut = partition.Cut(4, 1, length)
    row, start, stop = (np.asarray(x) for x in fixed_shares(*rows_of(rows), cut))
    assert (stop > start).sum() <= cut.most_shares(len(rows), 60)
    for r, alone in enumerate(rows):
        _, begin, until = (np.asarray(x) for x in fixed_shares(*rows_of([alone]), cut))
        found = (row == r) & (stop > start)
        some = until > begin
        np.testing.assert_array_equal(start[found], begin[some])
        np.testing.assert_array_equal(stop[found], until[some])
        assert (np.diff(start[found]) == length).all()


def rows_of(rows: list[tuple[int, int]]) -> tuple[jax.Array, jax.Array]:
    first, end = (jnp.array(x, jnp.int32) for x in zip(*rows, strict=True))
    return first, end


@partial(jax.jit, static_argnums=2)
def fixed_shares(first: jax.Array, end: jax.Array, cut: partition.Cut) -> tuple[jax.Array, ...]:
    return partition.shares(first, end, cut, 64)[:3]


def test_tiles_of_every_target() -> None:
    for target in TARGETS:
        for rows in (1, 4, 16, 32, 256):
            for head_dim in (64, 80, 128, 256):
                tiles = default_tiles(target, rows=rows, head_dim=head_dim, itemsize=2, slots=4096)
                for size in (tiles.block_k, tiles.block_rows, tiles.num_warps):
                    assert size & (size - 1) == 0
                assert tiles.block_k >= 16  # the matrix instructions' least
                assert tiles.block_rows >= 16
                assert tiles.num_warps * target.wave_size <= 1024
                assert padded_rows(rows, tiles.block_rows) <= tiles.block_rows


def test_candidates() -> None:
    for target in TARGETS:
        if target.vendor == "cpu":
            continue
        shape = {"rows": 4, "head_dim": 128, "itemsize": 2, "slots": 32768}
        found = list(candidates(target, **shape))
        assert found[0] == default_tiles(target, **shape)
        assert len(set(found)) == len(found) > 10
        for tiles in found:
            assert 2 * tiles.block_k * 256 * tiles.num_stages <= target.lds_bytes
            assert tiles.block_k >= 16


# ---- the kernels


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fixed", [True, False], ids=["batch-invariant", "by-bytes"])
def test_whether_a_row_depends_on_its_company(backend: str, fixed: bool) -> None:
    """One row of 1500 slots beside a short and beside a long one, at either place: the bits of its result."""
    options = {"visibility": Visibility(), "scale": 0.3, "batch_invariant": fixed}
    run = compile_call(decode_attention, backend, **options)
    shape: dict[str, Any] = {"batch": 2, "q_len": 1, "slots": 1536, "page_size": 64, "dtype": "bfloat16"}
    found = set()
    for other in (1, 700, 1536):
        call = random_call(0, **shape, lengths=[1500, other])
        turned = call | {name: call[name][::-1] for name in ("q", "q_positions", "kv_positions", "page_table")}
        found |= {np.asarray(run(call))[0].tobytes(), np.asarray(run(turned))[1].tobytes()}
    assert (len(found) == 1) == fixed


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """Few shapes, so that little is compiled; any lengths, page tables and options."""
    shape = draw(
        st.sampled_from(
            [
                {"batch": 3, "q_len": 1, "slots": 96, "page_size": 16},
                {"batch": 2, "q_len": 8, "slots": 64, "page_size": 64},
                {"batch": 2, "q_len": 3, "slots": 70},
            ]
        )
    )
    lengths = draw(st.lists(st.integers(shape["q_len"], shape["slots"]), min_size=3, max_size=3))[: shape["batch"]]
    call = random_call(draw(st.integers(0, 2**31)), **shape, lengths=lengths, left=draw(st.booleans()))
    if draw(st.booleans()):  # some queries are padding
        call["q_positions"][0, : draw(st.integers(0, shape["q_len"]))] = -1
    return call, {"visibility": draw(st.sampled_from(VISIBILITIES)), "scale": 0.3}


@pytest.mark.parametrize("backend", BACKENDS)
@EXAMPLES
@hypothesis.given(drawn=calls())
@pytest.mark.slow
def test_against_the_reference(backend: str, drawn: tuple[dict[str, Any], dict[str, Any]]) -> None:
    call, options = drawn
    out = compute(call, backend, **options)
    assert np.isfinite(out).all()
    some = seen(call, options["visibility"])
    np.testing.assert_allclose(out[some], expected(call, **options)[some], rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        pytest.param({"q_heads": 8, "kv_heads": 1, "q_len": 8, "page_size": 32}, {}, id="64-rows"),
        pytest.param({"q_heads": 24, "kv_heads": 1, "q_len": 4}, {}, id="96-rows"),
        pytest.param({"q_heads": 3, "kv_heads": 3, "head_dim": 80}, {"soft_cap": 3.0}, id="head80-soft-cap"),
        pytest.param({"head_dim": 96, "page_size": 16}, {"sinks": True}, id="head96-sinks"),
        pytest.param({"head_dim": 256, "q_len": 2}, {"sinks": True, "soft_cap": 2.0}, id="head256-sinks-soft-cap"),
        pytest.param({"q_len": 4}, {"segments": True}, id="segments"),
    ],
)
def test_variants(backend: str, shape: dict[str, Any], options: dict[str, Any]) -> None:
    call = random_call(1, **{"batch": 2, "q_len": 1, "slots": 96, **shape})
    rng = np.random.default_rng(2)
    more: dict[str, Any] = {"visibility": Visibility("sliding", 40), "scale": 0.2, "soft_cap": options.get("soft_cap")}
    if "sinks" in options:
        call["sinks"] = rng.standard_normal(call["q"].shape[2]).astype(np.float32)
    if "segments" in options:
        # Every token sees at least itself: it is of its own segment.
        call["kv_segments"] = rng.integers(0, 2, call["kv_positions"].shape).astype(np.int32)
        at = (call["kv_positions"][:, None, :] == call["q_positions"][:, :, None]).argmax(axis=2)
        call["q_segments"] = np.take_along_axis(call["kv_segments"], at, axis=1)
    np.testing.assert_allclose(compute(call, backend, **more), expected(call, **more), rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(backend: str, dtype: str) -> None:
    call = random_call(3, batch=3, q_len=2, slots=160, head_dim=64, page_size=32, dtype=dtype)
    options = {"visibility": Visibility(), "scale": 64**-0.5}
    error = np.abs(compute(call, backend, **options) - expected(call, **options))
    bounds = np.array([0.004, 0.02]) / (1 if dtype == "bfloat16" else 8)
    assert (np.quantile(error, [0.95, 1.0]) < bounds).all(), np.quantile(error, [0.95, 1.0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_narrower_cache(backend: str) -> None:
    call = random_call(4, batch=2, q_len=1, slots=64)
    call |= {name: call[name].astype(np.float16) for name in "kv"}
    options = {"visibility": Visibility(), "scale": 0.25}
    np.testing.assert_allclose(compute(call, backend, **options), expected(call, **options), rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_cut_gives_the_same(backend: str) -> None:
    from llama_jax.kernels.attention.decode import pallas_triton

    call = random_call(5, batch=3, q_len=1, slots=192, page_size=64, lengths=[192, 1, 75])
    options = {"visibility": Visibility(), "scale": 0.25}
    want = expected(call, **options)
    for tiles in (Tiles(16, 16, 1, 1, 1), Tiles(16, 32, 4, 1, 9), Tiles(64, 64, 2, 2, 200)):

        def run(backend: str, tiles: Tiles = tiles, **call: Any) -> jax.Array:
            return flat(pallas_triton.run)(**call, tiles=tiles, interpret=backend == "pallas_interpret")

        out = compile_call(run, backend, **options)(call)
        np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size", [0, 16])
def test_gradients(backend: str, page_size: int) -> None:
    """Those of the reference; queries that see nothing have none."""
    call = random_call(9, batch=2, q_len=3, slots=48, page_size=page_size, lengths=[41, 20])
    call["q_positions"][1, 0] = -1
    rng = np.random.default_rng(10)
    out_grad = rng.standard_normal(call["q"].shape).astype(np.float32)
    floats = {n: jnp.asarray(call.pop(n)) for n in ("q", "k", "v")}
    floats["sinks"] = jnp.asarray(rng.standard_normal(4).astype(np.float32))
    options = {"visibility": Visibility("sliding", 30), "scale": 0.3, "soft_cap": 4.0}

    def gradients(function: Any, out_grad: np.ndarray) -> dict[str, jax.Array]:
        return jax.jit(lambda x: jax.vjp(lambda x: function(**x, **call, **options), x)[1](out_grad)[0])(floats)

    found = gradients(partial(decode_attention, backend=backend), out_grad)
    out_grad[1, 0] = 0
    want = gradients(attention_reference, out_grad)
    assert found.keys() == want.keys()
    for name, gradient in found.items():
        assert np.abs(want[name]).max() > 0.01
        np.testing.assert_allclose(gradient, want[name], rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow
def test_a_model_is_trained_on_a_short_text(backend: str) -> None:
    """Four tokens are few enough to be decode attention."""
    config = config_from_hf(LLAMA)
    params = jax.tree.map(jnp.asarray, unflatten(random_leaves(config)))
    tokens = jnp.array([[1, 7, 11, 3], [1, 2, 40, 5]])

    def gradients() -> Any:
        def loss(params: Any) -> jax.Array:
            chances = jax.nn.log_softmax(forward(params, config, tokens)[0][:, :-1])
            return -jnp.take_along_axis(chances, tokens[:, 1:, None], axis=2).mean()

        return jax.jit(jax.grad(loss))(params)

    want = gradients()
    with using(decode_attention=backend):
        found = gradients()
    unequal = 0
    # The first layer's queries and keys hardly matter here: their gradients are what rounding leaves of larger numbers.
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * largest, rtol=2e-4)
        unequal += not np.array_equal(a, b)
    assert unequal  # something else did run


def test_slots_before_a_window_are_not_read() -> None:
    """Numbers there that would spoil any sum they took part in."""
    call = random_call(6, batch=2, q_len=1, slots=128, lengths=[128, 100])
    options = {"visibility": Visibility("sliding", 20), "scale": 0.25}
    want = expected(call, **options)
    for name in "kv":
        call[name][0, :, : 128 - 20 - 32] = np.nan  # 32: at most a block more than the window
        call[name][1, :, : 100 - 20 - 32] = np.nan
        call[name][1, :, 128:] = np.nan
    np.testing.assert_allclose(compute(call, "pallas_interpret", **options), want, rtol=2e-5, atol=2e-5)


def test_layers_share_the_partition() -> None:
    """It depends on positions only: three layers, one pass over them."""
    call = random_call(7, batch=2, q_len=1, slots=64)

    def passes(layers: int) -> int:
        def model(call: dict[str, Any]) -> list[Any]:
            at = call["q_positions"], call["kv_positions"]
            ranges = [partition.visible_slots(*at, Visibility()) for _ in range(layers)]
            cuts = [partition.shares(*x, partition.Cut(16, 4), 5) for x in ranges]
            return [jax.tree.map(lambda x, i=i: x * i, cut) for i, cut in enumerate(cuts, 2)]

        return jax.jit(model).lower(call).compile().as_text().count(" reduce(")

    assert passes(3) == passes(1) > 0


# ---- what it takes


def test_what_is_not_supported() -> None:
    call = random_call(8, batch=1, q_len=1, slots=16)
    options = {"visibility": Visibility(), "scale": 1.0}
    many = call | {"q": np.zeros((1, 9, 4, 16), np.float32), "q_positions": np.zeros((1, 9), np.int32)}
    empty = call | {n: np.zeros((1, 2, 0, 16), np.float32) for n in "kv"} | {"kv_positions": np.zeros((1, 0), np.int32)}
    wide = call | {n: np.zeros((*call[n].shape[:3], 512), np.float32) for n in "qkv"}
    bytes_ = call | {n: call[n].astype(np.int8) for n in "kv"}
    for bad, reason in [(many, "9 queries"), (empty, "no slots"), (wide, "head_dim 512"), (bytes_, "dtype int8")]:
        with pytest.raises(KernelError, match=reason):
            decode_attention(**bad, **options, backend="pallas_interpret")
    unsupported = decode_of_records.backends["pallas_triton"].unsupported
    arguments = arguments_of(**call, **options)
    assert "GPUs only" in str(unsupported(find("cpu"), **arguments))
    assert "float32" in str(unsupported(find("gfx1100"), **arguments))
    assert unsupported(find("mi300x"), **arguments) is None


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "fp8_fnuz"])  # those of NVIDIA's GPUs
def test_by_pairs_of_bytes(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The computation of the kernel of NVIDIA's GPUs with codes, with plain operations in place of their instructions:
    several queries, a head of 80 numbers, a last block that is not full, and pages in any order."""

    def numbers(words: jax.Array, field: Field, which: str) -> jax.Array:
        byte = words.astype(jnp.int32) >> 8 * pairs.BYTES.index(which)
        return (((byte ^ field.flip) & field.mask) * (BYTE * field.factor) + field.added).astype(jnp.bfloat16)

    def floats(words: jax.Array, asm: str, dtype: Any) -> jax.Array:
        byte = words >> 8 * [pairs._FLOATS.format(which=which) for which in "ab"].index(asm)
        return jax.lax.bitcast_convert_type(byte.astype(jnp.int8), jnp.float8_e4m3fn).astype(dtype)

    def decoder(kv: Any, *_: Any, **__: Any) -> Decoder:
        return Decoder(*made_of(kv.k.dtype), by_assembly=True, apart=False)

    monkeypatch.setattr(pairs, "_numbers", numbers)
    monkeypatch.setattr(pairs, "_converted", floats)
    monkeypatch.setattr(Decoder, "of", decoder)
    for case in (
        AttentionShape("", 2, 4, 80, 4, 2, 80, scheme=scheme),
        AttentionShape("", 3, 1, 128, 4, 2, 64, page_size=16, scheme=scheme),
    ):
        arguments = arguments_of(**case.example(jax.random.key(0)), **case.options())
        found = pallas_triton.run(**arguments, tiles=Tiles(16, 32, 4, 2, 1), interpret=True)
        want = reference_of_records(**arguments | {"q": arguments["q"].astype(jnp.float32)})
        assert error(found, want) < 1e-2
    assert isinstance(pairs.reader(arguments["kv"], decoder(arguments["kv"])), pairs.ByPairs)


def test_cases() -> None:
    assert len({case.name for case in DECODES + MEASURED_DECODES}) == len(set(DECODES + MEASURED_DECODES))
    pallas = decode_of_records.backends["pallas_triton"]
    for case in DECODES + MEASURED_DECODES:
        structs = case.arguments()
        chip = find("mi355x" if case.scheme == "fp8" else "mi300x")
        assert pallas.unsupported(chip, **arguments_of(**structs, **case.options())) is None
        out = jax.eval_shape(lambda structs, case=case: attention_reference(**structs, **case.options()), structs)
        assert out.shape == structs["q"].shape
    window = next(case for case in DECODES if case.name == "llama-3.1-8b-window-4096")
    assert window.bytes() == 2 * 8 * (4096 * 8 + 32) * 128 * 2
    long = next(case for case in MEASURED_DECODES if case.name == "llama-3.1-8b-b1-s131072")
    assert long.bytes() == 2 * (131072 * 8 + 32) * 128 * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_example_case(backend: str) -> None:
    case = AttentionShape("small", 2, 1, 128, 4, 2, 64, page_size=16, sinks=True, dtype="float32")
    call = case.example(jax.random.key(0))
    out = compile_call(attention, backend, **case.options())(call)
    np.testing.assert_allclose(out, attention_reference(**call, **case.options()), rtol=2e-5, atol=2e-5)
