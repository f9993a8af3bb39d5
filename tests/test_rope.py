"""Rotary embeddings against formulas in float64, written from the papers and not from the code."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    arange_positions,
    error,
    random_params,
    random_tokens,
    run,
    tiny_config,
)

from llama_jax.cache import DenseCache
from llama_jax.config import LlamaConfig, RopeSpec
from llama_jax.errors import RequestError
from llama_jax.kernels.rope import rotate
from llama_jax.model.rope import rope_angles, rope_frequencies

THETAS = st.floats(10.0, 5e6)
HEAD_DIMS = st.integers(2, 64).map(lambda n: 2 * n)
FACTORS = st.floats(1.0, 64.0)
LENGTHS = st.integers(16, 32768)


def plain(theta: float, dim: int) -> list[float]:
    """RoFormer (arXiv:2104.09864): theta_i = base^(-2i/d)."""
    return [theta ** (-2 * i / dim) for i in range(dim // 2)]


def llama3(theta: float, dim: int, factor: float, old: int, low: float, high: float) -> list[float]:
    """`apply_scaling` of Meta's llama-models, reference implementation of Llama 3.1."""
    out = []
    for freq in plain(theta, dim):
        wavelength = 2 * math.pi / freq
        if wavelength < old / high:
            out.append(freq)
        elif wavelength > old / low:
            out.append(freq / factor)
        else:
            smooth = (old / wavelength - low) / (high - low)
            out.append((1 - smooth) * freq / factor + smooth * freq)
    return out


def yarn(theta: float, dim: int, factor: float, old: int, fast: float, slow: float, truncate: bool) -> list[float]:
    """YaRN (arXiv:2309.00071), section 3.2, with the ramp over dimensions that its authors' code has."""

    def dimension(rotations: float) -> float:
        # The dimension whose wavelength fits `rotations` times into the old context.
        return dim * math.log(old / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low, high = dimension(fast), dimension(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    out = []
    for i, freq in enumerate(plain(theta, dim)):
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        out.append(freq * (1 - ramp) + freq / factor * ramp)
    return out


def dynamic_base(theta: float, dim: int, factor: float, old: int, length: int) -> float:
    """NTK-aware scaling (bloc97, emozilla 2023): the base grows once the text is longer than the old context."""
    if length <= old:
        return theta
    return theta * (factor * length / old - (factor - 1)) ** (dim / (dim - 2))


def frequencies(spec: RopeSpec, dim: int) -> np.ndarray:
    freq, _ = rope_frequencies(spec, dim)
    assert freq.dtype == np.float32
    assert freq.shape == (dim // 2,)
    return freq


@hypothesis.given(THETAS, HEAD_DIMS, FACTORS)
def test_default_and_linear(theta: float, dim: int, factor: float) -> None:
    np.testing.assert_allclose(frequencies(RopeSpec(theta), dim), plain(theta, dim), rtol=3e-6)
    linear = frequencies(RopeSpec(theta, "linear", factor), dim)
    np.testing.assert_allclose(linear, np.array(plain(theta, dim)) / factor, rtol=3e-6)


@hypothesis.given(THETAS, HEAD_DIMS, FACTORS, LENGTHS, st.floats(0.5, 4.0), st.floats(1.1, 8.0))
def test_llama3(theta: float, dim: int, factor: float, old: int, low: float, ratio: float) -> None:
    spec = RopeSpec(theta, "llama3", factor, old, low_freq_factor=low, high_freq_factor=low * ratio)
    expected = llama3(theta, dim, factor, old, low, low * ratio)
    np.testing.assert_allclose(frequencies(spec, dim), expected, rtol=3e-4)


@hypothesis.given(THETAS, HEAD_DIMS, FACTORS, LENGTHS, st.floats(0.5, 4.0))
def test_llama3_without_a_middle(theta: float, dim: int, factor: float, old: int, both: float) -> None:
    """Equal low and high factors, as Llama 4 Scout has them: a step and no division by zero."""
    spec = RopeSpec(theta, "llama3", factor, old, low_freq_factor=both, high_freq_factor=both)
    edge = np.array([2 * math.pi / freq * both / old for freq in plain(theta, dim)])
    hypothesis.assume((np.abs(edge - 1) > 1e-4).all())
    expected = np.where(edge > 1, np.array(plain(theta, dim)) / factor, plain(theta, dim))
    np.testing.assert_allclose(frequencies(spec, dim), expected, rtol=3e-6)


@hypothesis.given(THETAS, HEAD_DIMS, FACTORS, LENGTHS, st.floats(8.0, 64.0), st.floats(0.5, 4.0), st.booleans())
def test_yarn(theta: float, dim: int, factor: float, old: int, fast: float, slow: float, truncate: bool) -> None:
    spec = RopeSpec(theta, "yarn", factor, old, beta_fast=fast, beta_slow=slow, truncate=truncate)
    expected = yarn(theta, dim, factor, old, fast, slow, truncate)
    np.testing.assert_allclose(frequencies(spec, dim), expected, rtol=2e-4)
    assert rope_frequencies(spec, dim)[1] == pytest.approx(0.1 * math.log(factor) + 1)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, 0.1 * math.log(8) + 1),
        ({"attention_factor": 0.7}, 0.7),
        ({"attention_factor": 0.7, "mscale": 1.0, "mscale_all_dim": 1.0}, 0.7),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, (0.0707 * math.log(8) + 1) / (0.1 * math.log(8) + 1)),
        ({"mscale": 0.707}, 0.1 * math.log(8) + 1),
        ({"factor": 1.0}, 1.0),
    ],
)
def test_yarn_attention_factor(keys: dict, expected: float) -> None:
    spec = RopeSpec(**{"theta": 1e4, "kind": "yarn", "factor": 8.0, "original_max_positions": 2048} | keys)
    assert rope_frequencies(spec, 16)[1] == pytest.approx(expected)
    cos, sin = rope_angles(spec, 16, jnp.array([[0, 5]]), jnp.array([[6]]))
    np.testing.assert_allclose(cos**2 + sin**2, np.full(cos.shape, expected**2), rtol=1e-5)


def test_scaled_kinds_differ_from_plain_ones() -> None:
    base = frequencies(RopeSpec(1e4), 64)
    for kind in ("linear", "yarn", "llama3"):
        spec = RopeSpec(1e4, kind, 8.0, 2048)
        assert not np.allclose(frequencies(spec, 64), base), kind


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40, 1000])
def test_dynamic_angles(length: int) -> None:
    spec = RopeSpec(1e4, "dynamic", 3.0, 16)
    positions = jnp.arange(8)[None]
    cos, sin = rope_angles(spec, 12, positions, jnp.array([[length]]))
    freq = np.array(plain(dynamic_base(1e4, 12, 3.0, 16, length), 12))
    np.testing.assert_allclose(cos[0], np.cos(np.arange(8)[:, None] * freq), atol=3e-6)
    np.testing.assert_allclose(sin[0], np.sin(np.arange(8)[:, None] * freq), atol=3e-6)


def test_dynamic_lengths_of_rows_and_tokens() -> None:
    spec, positions = RopeSpec(1e4, "dynamic", 3.0, 16), jnp.array([[0, 3, 9], [1, 2, 5]])
    by_row = rope_angles(spec, 12, positions, jnp.array([[10], [50]]))
    by_token = rope_angles(spec, 12, positions, jnp.array([[10, 10, 10], [50, 50, 50]]))
    for row, token in zip(by_row, by_token, strict=True):
        np.testing.assert_array_equal(row, token)
    mixed = rope_angles(spec, 12, positions, jnp.array([[10, 50, 10], [50, 50, 50]]))[1]
    assert not np.allclose(mixed[0, 1], by_row[1][0, 1])
    np.testing.assert_array_equal(mixed[0, 2], by_row[1][0, 2])


def test_angles_far_out() -> None:
    """At position 100,000 the float32 angle of the fastest pair is still right to 0.01 rad."""
    spec = RopeSpec(500_000.0)
    positions = np.array([[100_000, 131_071]])
    cos, sin = rope_angles(spec, 128, jnp.asarray(positions), jnp.array([[131_072]]))
    angle = positions[0][:, None] * np.array(plain(5e5, 128))
    np.testing.assert_allclose(cos[0], np.cos(angle), atol=1e-2)
    np.testing.assert_allclose(sin[0], np.sin(angle), atol=1e-2)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_multiplication_of_complex_numbers(interleaved: bool) -> None:
    rng = np.random.default_rng(0)
    x, dim = rng.standard_normal((2, 5, 3, 8)), 8
    positions = rng.integers(0, 50, (2, 5))
    cos, sin = rope_angles(RopeSpec(100.0), dim, jnp.asarray(positions), jnp.array([[50]]))
    out = np.asarray(rotate(jnp.asarray(x, jnp.float32), cos, sin, interleaved=interleaved))

    def pairs(y: np.ndarray) -> np.ndarray:
        return y[..., 0::2] + 1j * y[..., 1::2] if interleaved else y[..., : dim // 2] + 1j * y[..., dim // 2 :]

    turn = np.exp(1j * positions[:, :, None, None] * np.array(plain(100.0, dim)))
    np.testing.assert_allclose(pairs(out), pairs(x) * turn, atol=3e-5)


def test_products_depend_on_the_distance_only() -> None:
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.standard_normal(8), jnp.float32)[None, None, None] for _ in range(2))

    def product(m: int, n: int) -> float:
        def at(x: jnp.ndarray, position: int) -> jnp.ndarray:
            angles = rope_angles(RopeSpec(50.0), 8, jnp.array([[position]]), jnp.array([[1]]))
            return rotate(x, *angles, interleaved=False)

        return float(jnp.vdot(at(q, m), at(k, n)))

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert product(7, 3) != pytest.approx(product(7, 2), abs=1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rotation_is_computed_in_float32(dtype: str) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 2, 8)), dtype)
    angles = rope_angles(RopeSpec(100.0), 8, jnp.arange(4)[None], jnp.array([[4]]))
    out = rotate(x, *angles, interleaved=False)
    assert out.dtype == x.dtype
    exact = rotate(x.astype(jnp.float32), *angles, interleaved=False)
    np.testing.assert_array_equal(out, exact.astype(dtype))


# ---- dynamic rope through the model: the base is that of each row's length, then frozen

FACTOR, OLD = 2.0, 6
DYNAMIC = tiny_config(rope=RopeSpec(100.0, "dynamic", FACTOR, OLD))
PARAMS = random_params(DYNAMIC)


def frozen_at(length: int) -> LlamaConfig:
    """A model whose plain rope has the base of a text of this length."""
    return DYNAMIC.replace(rope=RopeSpec(dynamic_base(100.0, DYNAMIC.head_dim, FACTOR, OLD, length)))


def test_each_row_has_the_base_of_its_own_length() -> None:
    tokens, lengths = random_tokens(DYNAMIC, 3, 15), (15, 9, 4)
    index = np.arange(15)
    left = np.stack([np.where(index >= 15 - n, index - (15 - n), -1) for n in lengths]).astype(np.int32)
    logits, _ = run(PARAMS, DYNAMIC, tokens, left)
    for row, n in enumerate(lengths):
        alone, _ = run(PARAMS, frozen_at(n), tokens[row : row + 1], left[row : row + 1])
        assert error(logits[row, -n:], alone[0, -n:]) < 1e-5, n
    other, _ = run(PARAMS, frozen_at(9), tokens[:1], left[:1])
    assert error(logits[:1], other) > 1e-3


@pytest.mark.parametrize("prompt", [4, 11])
def test_decoding_keeps_the_base_of_the_prompt(prompt: int) -> None:
    """Cached keys were rotated with it, so the base must not grow with the text, from either side of the old length."""
    tokens, positions = random_tokens(DYNAMIC, 2, 15), arange_positions(2, 15)
    cache = DenseCache.create(DYNAMIC, 2, 15, jnp.float32)
    lengths = jnp.full((2,), prompt, jnp.int32)
    out, cache = run(PARAMS, DYNAMIC, tokens[:, :prompt], positions[:, :prompt], cache, rope_lengths=lengths)
    parts = [out]
    for i in range(prompt, 15):
        one = slice(i, i + 1)
        out, cache = run(PARAMS, DYNAMIC, tokens[:, one], positions[:, one], cache, rope_lengths=lengths)
        parts.append(out)
    expected, _ = run(PARAMS, frozen_at(prompt), tokens, positions)
    assert error(jnp.concatenate(parts, axis=1), expected) < 1e-5
    whole, _ = run(PARAMS, DYNAMIC, tokens, positions)
    assert error(jnp.concatenate(parts, axis=1), whole) > 1e-3


def test_chunks_of_a_prompt_whose_length_is_known() -> None:
    tokens, positions = random_tokens(DYNAMIC, 2, 12), arange_positions(2, 12)
    whole, _ = run(PARAMS, DYNAMIC, tokens, positions)
    for lengths, equal in (([12, 12], True), ([4, 4], False)):
        cache = DenseCache.create(DYNAMIC, 2, 12, jnp.float32)
        parts = []
        for i in range(0, 12, 4):
            part = tokens[:, i : i + 4], positions[:, i : i + 4], cache
            out, cache = run(PARAMS, DYNAMIC, *part, rope_lengths=jnp.array(lengths))
            parts.append(out)
        assert (error(jnp.concatenate(parts, axis=1), whole) < 1e-5) is equal


def test_a_cache_with_dynamic_rope_needs_the_lengths() -> None:
    cache = DenseCache.create(DYNAMIC, 2, 12, jnp.float32)
    with pytest.raises(RequestError) as caught:
        run(PARAMS, DYNAMIC, random_tokens(DYNAMIC, 2, 4), arange_positions(2, 4), cache)
    assert caught.value.param == "rope_lengths"
