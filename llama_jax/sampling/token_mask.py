"""Token sets as bitmasks, in llguidance's layout: token t is bit t % 32 of word t // 32, set if it is allowed.

On the host uint32 [ceil(vocab / 32)] for one row, on the device uint32 [batch, ceil(vocab / 32)]. Bits past the last
token of the vocabulary are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

WORD = 32


def all_allowed(vocab_size: int) -> np.ndarray:
    """The mask that forbids nothing."""
    return np.full(-(-vocab_size // WORD), 0xFFFFFFFF, np.uint32)


def only(tokens: Iterable[int], vocab_size: int) -> np.ndarray:
    """The mask that allows only these tokens."""
    mask = np.zeros_like(all_allowed(vocab_size))
    ids = np.fromiter(tokens, np.int64)
    np.bitwise_or.at(mask, ids // WORD, np.uint32(1) << (ids % WORD).astype(np.uint32))
    return mask


def forbid(mask: np.ndarray, token: int) -> None:
    """Clears a token's bit."""
    mask[token // WORD] &= ~np.uint32(1 << token % WORD)


def allows(mask: np.ndarray, token: int) -> bool:
    """Whether a token's bit is set; False outside the vocabulary."""
    return 0 <= token < WORD * len(mask) and bool(mask[token // WORD] >> np.uint32(token % WORD) & 1)


def columns(mask: jax.Array, first: jax.Array | int, width: int) -> jax.Array:
    """Unpacks a mask to bool [batch, width]: whether each token from `first` on is allowed."""
    token = first + jnp.arange(width, dtype=jnp.int32)
    return (jnp.take(mask, token // WORD, axis=1) >> (token % WORD).astype(jnp.uint32)) & 1 != 0


def any_allowed(mask: jax.Array, vocab_size: int) -> jax.Array:
    """bool [batch]: whether a mask allows a token of the vocabulary."""
    return jnp.any(mask & only(range(vocab_size), vocab_size) != 0, axis=1)
