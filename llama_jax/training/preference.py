"""Direct preference optimisation: a loss of pairs of texts, one of which is preferred (arXiv:2305.18290)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError
from llama_jax.params import Params
from llama_jax.training.batch import Batch, targets
from llama_jax.training.loss import LOGITS, loss_of_entropies


@dataclass(frozen=True)
class Dpo:
    """The mean over pairs of -log sigmoid(chosen - rejected), where a text's reward is beta times the logarithm of how
    much likelier its learned tokens are by the model than by the reference.

    It reports the means of "chosen" and "rejected" (rewards), of "margin" (their difference) and of "accuracy" (whether
    it is positive).

    A batch has a `reference`, and segments 2i and 2i + 1 of each row are the chosen and the rejected text of a pair.

    Attributes:
      beta: how strongly the model is held to the reference; less lets it move further.
    """

    beta: float = 0.1

    def count(self, batch: Batch) -> jax.Array:
        """The number of pairs: those with something learned in both texts. Errors as for a call."""
        return jnp.sum(_whole(batch), dtype=jnp.float32)

    def __call__(
        self, params: Params, config: LlamaConfig, batch: Batch, *, remat: str = "none", logits: int = LOGITS
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The sum over pairs, and the sums of what is reported.

        Raises:
          RequestError: the batch has no segments or no reference.
        """
        learned, whole = targets(batch)[1], _whole(batch)

        def of(entropies: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            gains = jnp.where(learned, batch.reference - entropies, 0)
            chosen, rejected = jnp.moveaxis(self.beta * _by_pair(gains, batch.segments), -1, 0)
            margin = chosen - rejected
            total = jnp.sum(jnp.where(whole, jax.nn.softplus(-margin), 0))
            means = {"chosen": chosen, "rejected": rejected, "margin": margin, "accuracy": margin > 0}
            return total, {name: jnp.sum(jnp.where(whole, x, 0), dtype=jnp.float32) for name, x in means.items()}

        return loss_of_entropies(of, params, config, batch, remat=remat, logits=logits)


def _whole(batch: Batch) -> jax.Array:
    """Marks the pairs of each row with something learned in both texts: bool [batch, pairs]."""
    if batch.segments is None or batch.reference is None:
        raise RequestError(
            "a batch of pairs needs segments and a reference",
            param="batch",
            hint="Rows of Pair gives the segments, `with_reference` the other model's numbers",
        )
    return jnp.all(_by_pair(targets(batch)[1].astype(jnp.float32), batch.segments) > 0, axis=-1)


def _by_pair(x: jax.Array, segments: jax.Array) -> jax.Array:
    """Sums over the texts of each pair, [batch, pairs, 2], of [batch, len].

    A sum under a mask and not a scatter, whose order on a GPU is not the same twice.
    """
    most = x.shape[-1] // 4 + 1  # a text with something learned has two tokens; one more is padding
    own = segments[..., None] == jnp.arange(2 * most, dtype=jnp.int32)
    return jnp.sum(jnp.where(own, x[..., None], 0), axis=1).reshape(len(x), most, 2)
