"""The angles of rotary position embedding in all its variants, from a `RopeSpec`."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import RopeSpec


def rope_frequencies(spec: RopeSpec, head_dim: int) -> tuple[np.ndarray, float]:
    """Angles per position and the factor on cos and sin.

    The arithmetic is float32, step by step as in Hugging Face's modeling_rope_utils.py, since an angle at position
    100,000 magnifies a rounding difference of the frequency by as much.

    Returns:
      float32 [head_dim / 2] radians per position, and the attention factor (1 except for "yarn"). For "dynamic" these
      are the frequencies within the original context.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.float32(spec.theta) ** exponents
    inv_freq = (np.float32(1.0) / powers).astype(np.float32)
    if spec.kind == "linear":
        return inv_freq / np.float32(spec.factor), 1.0
    if spec.kind == "llama3":
        return _llama3(spec, inv_freq), 1.0
    if spec.kind == "yarn":
        return _yarn(spec, powers, head_dim)
    return inv_freq, 1.0


def _llama3(spec: RopeSpec, inv_freq: np.ndarray) -> np.ndarray:
    """Long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    old = spec.original_max_positions
    assert old is not None
    wavelen = np.float32(2 * math.pi) / inv_freq
    scaled = inv_freq / np.float32(spec.factor)
    out = np.where(wavelen > old / spec.low_freq_factor, scaled, inv_freq)
    if spec.high_freq_factor == spec.low_freq_factor:  # nothing lies between
        return out
    smooth = (np.float32(old) / wavelen - np.float32(spec.low_freq_factor)) / np.float32(
        spec.high_freq_factor - spec.low_freq_factor
    )
    between = (1 - smooth) * scaled + smooth * inv_freq
    is_between = (wavelen >= old / spec.high_freq_factor) & (wavelen <= old / spec.low_freq_factor)
    return np.where(is_between, between, out).astype(np.float32)


def _yarn(spec: RopeSpec, powers: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
    """NTK by parts (arXiv:2309.00071): a ramp over the dimensions between interpolation and extrapolation."""
    old = spec.original_max_positions
    assert old is not None

    def dim_of(rotations: float) -> float:
        return (head_dim * math.log(old / (rotations * 2 * math.pi))) / (2 * math.log(spec.theta))

    low, high = dim_of(spec.beta_fast), dim_of(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    extrapolate = 1 - ramp
    inv_freq = (1 / (np.float32(spec.factor) * powers)) * (1 - extrapolate) + (1 / powers) * extrapolate

    def mscale(scale: float, m: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

    factor = spec.attention_factor
    if factor is None:
        factor = mscale(spec.factor)
        if spec.mscale and spec.mscale_all_dim:
            factor = mscale(spec.factor, spec.mscale) / mscale(spec.factor, spec.mscale_all_dim)
    return inv_freq.astype(np.float32), factor


def rope_angles(
    spec: RopeSpec, head_dim: int, positions: jax.Array, rope_length: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every rotation.

    Args:
      positions: int32 [batch, len].
      rope_length: int32 [batch, 1] or [batch, len], the text length that "dynamic" takes its base from; other kinds
        ignore it.

    Returns:
      cos, sin: float32 [batch, len, head_dim / 2].
    """
    inv_freq, factor = rope_frequencies(spec, head_dim)
    freq = jnp.asarray(inv_freq)
    if spec.kind == "dynamic":
        assert spec.original_max_positions is not None
        length = jnp.maximum(rope_length, spec.original_max_positions).astype(jnp.float32)
        stretch = spec.factor * length / spec.original_max_positions - (spec.factor - 1)
        base = spec.theta * stretch ** (head_dim / (head_dim - 2))
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        freq = 1.0 / base[..., None] ** exponents
    angles = positions.astype(jnp.float32)[..., None] * freq
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor
