"""Prompt lookup: drafts that the device finds in the texts themselves.

"Prompt lookup decoding" (https://github.com/apoorvumang/prompt-lookup-decoding): if the last tokens of a text have
occurred before, the tokens that followed them then are likely to follow now.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LENGTHS = (4, 3, 2)
"""Lengths of the n-grams to match, longest first."""


def find(texts: jax.Array, counts: jax.Array, most: int) -> jax.Array:
    """Tokens likely to follow texts: those after the latest earlier occurrence of the text's longest repeated suffix.

    Args:
      texts: int32 [rows, context]; the first `counts` int32 [rows] tokens of each row are a text.
      most: number of tokens to find.

    Returns:
      int32 [rows, most], padded with -1.
    """
    place = jnp.arange(texts.shape[1], dtype=jnp.int32)
    same = jnp.ones(texts.shape, bool)
    alike = jnp.zeros(texts.shape, jnp.int32)  # number of tokens before each place that equal those at the end
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
    """The texts int32 [rows, context] with row int32 [] replaced by a text int32 [context]."""
    return texts.at[row].set(text)
