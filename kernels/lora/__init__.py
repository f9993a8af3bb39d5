"""Low-rank adapters in slots, added to a projection, or to several that share an input."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from llama_jax.kernels.dispatch import Backend, Operation
from llama_jax.kernels.lora.cases import lora_candidates, lora_cases, lora_models, lora_shape
from llama_jax.kernels.lora.reference import Activation, Part, Slots, add_lora_reference

__all__ = ["add_lora", "add_lora_op", "add_lora_reference"]

add_lora_op = Operation(
    "add_lora",
    {
        "reference": Backend(add_lora_reference),
        "pallas_triton": Backend.at(f"{__name__}.pallas_triton", candidates=lora_candidates),
        "pallas_interpret": Backend.at(f"{__name__}.pallas_triton", interpreted=True, interpret=True),
    },
    shape=lora_shape,
    cases=lora_cases,
    models=lora_models,
)


def add_lora(
    out: jax.Array,
    x: jax.Array,
    slots: Sequence[Slots],
    ids: jax.Array,
    *,
    parts: Sequence[Part],
    activation: Activation | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Adds scale * x a^T b^T (arXiv:2106.09685) of each token's slot to projections of x.

    Products accumulate in float32; x a^T, times the scale, is rounded to x's dtype.

    Args:
      out: [..., n, columns] or [..., heads, n, columns], the projections of x in one array.
      x: [..., in].
      slots: of each projection {"a" [slots, rank, in], "b" [slots, rank, size], "scale" [slots]}. Slot 0 is none.
      ids: int32, the slot of each token, [...] of x, or [batch, 1] for whole rows. Ids that are no slot are as 0.
      parts: of each of these projections, the first and one past the last index on the axis of n; of each head, in
        order, size / heads numbers.
      activation: for n = 2 with slots of both: the result is activation(first) * second.
      backend: "auto" or the name of one backend.

    Returns:
      As `out`; with an activation [..., columns].

    Raises:
      KernelError: the named backend does not exist, or cannot run this here.
    """
    result: jax.Array = add_lora_op(out, x, slots, ids, parts=parts, activation=activation, backend=backend)
    return result
