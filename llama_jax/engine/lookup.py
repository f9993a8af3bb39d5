"""Drafts that the device finds in the texts themselves.

"Prompt lookup decoding" (https://github.com/apoorvumang/prompt-lookup-decoding): where the last tokens of a text have
occurred before, what followed them then is likely to follow now.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LENGTHS = (4, 3, 2)
"""Tokens that have to occur again, the most first."""


def find(texts: jax.Array, counts: jax.Array, most: int) -> jax.Array:
    """Tokens that are likely to follow texts: those behind the longest end of a text that has occurred in it before,
    the last time that it has.

    Args:
      texts: int32 [rows, context], of which the first `counts` int32 [rows] tokens are a text.
      most: tokens to find.

    Returns:
      int32 [rows, most], filled up with -1.
    """
    place = jnp.arange(texts.shape[1], dtype=jnp.int32)
    same = jnp.ones(texts.shape, bool)
    alike = jnp.zeros(texts.shape, jnp.int32)  # tokens before each place that are those at the end
    for back in range(1, LENGTHS[0] + 1):
        last = jnp.take_along_axis(texts, jnp.maximum(counts - back, 0)[:, None], axis=1)
        before = jnp.pad(texts, ((0, 0), (back, 0)), constant_values=-1)[:, : texts.shape[1]]
        same &= (before == last) & (place >= back)
        alike += same
    alike = jnp.where(place < counts[:, None], alike, 0)
    longest = jnp.max(alike, axis=1)
    at = jnp.max(jnp.where(alike == longest[:, None], place, -1), axis=1)[:, None] + jnp.arange(most)
    tokens = jnp.take_along_axis(texts, at, axis=1, mode="clip")
    return jnp.where((longest >= LENGTHS[-1])[:, None] & (at < counts[:, None]), tokens, -1)


def remember(texts: jax.Array, row: jax.Array, text: jax.Array) -> jax.Array:
    """The texts int32 [rows, context] with another one, int32 [context], in a row int32 []."""
    return texts.at[row].set(text)
