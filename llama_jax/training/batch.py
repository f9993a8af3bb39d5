"""Batches: several texts packed into rows of one length, and which of their tokens are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

IGNORED = -100
"""The label of a token that is not learned, as in Hugging Face's and PyTorch's losses."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows of one length.

    Attributes:
      tokens: int32 [batch, len].
      labels: int32 [batch, len], each token itself where the model learns to predict it from those before it, else
        `IGNORED`.
      segments: int32 [batch, len], the text of the row that each token belongs to, in ascending order; texts do not see
        each other. Padding is one more, of which nothing is learned. None: each row is one text.
      reference: float32 [batch, len], the `entropies` of another model, for losses that compare with it.
    """

    tokens: Any
    labels: Any
    segments: Any = None
    reference: Any = None


def targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns what each token has to predict, int32 [batch, len], and whether it is learned, bool [batch, len].

    A token predicts the next one of its own text; the last of a text nothing.
    """
    following = jnp.roll(batch.labels, -1, axis=1)
    learned = (following != IGNORED).at[:, -1].set(False)
    if batch.segments is not None:
        learned &= jnp.roll(batch.segments, -1, axis=1) == batch.segments
    return jnp.where(learned, following, 0).astype(jnp.int32), learned
