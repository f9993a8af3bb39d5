"""Kinds of calls of the routed experts, for the tables, and small cases that expose a wrong row or scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.kernels.dispatch.cases import Case
from llama_jax.kernels.moe import shapes
from llama_jax.kernels.moe.reference import Activation
from llama_jax.targets import Target


def moe_shape(
    x: jax.Array, expert_ids: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, **kwargs: object
) -> str:
    """For example "e8 top2 r64": experts, experts a token, rows of all experts up to a power of two."""
    rows = 1 << (x.shape[0] * expert_ids.shape[1] - 1).bit_length()
    return f"e{gate.shape[0]} top{expert_ids.shape[1]} r{rows}"


def moe_candidates(
    target: Target, x: jax.Array, expert_ids: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, **kwargs: Any
) -> Iterator[Any]:
    """Tiles worth measuring for a call."""
    from llama_jax.kernels.moe.tiles import candidates

    experts, intermediate, hidden = gate.shape
    return candidates(
        target,
        pairs=expert_ids.shape[0] * expert_ids.shape[1],
        experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        itemsize=x.dtype.itemsize,
    )


def moe_models(numbers: Mapping[str, Any] | None = None) -> Sequence[Case]:
    """Decode steps and prefills of common models, or of the one with these numbers."""
    models: Sequence[shapes.MoeShape] = shapes.SHAPES
    if numbers is not None:
        if not numbers.get("experts"):
            return ()
        model = shapes.MoeShape(
            experts=numbers["experts"],
            top_k=numbers["top_k"],
            hidden=numbers["hidden"],
            intermediate=numbers["intermediate"],
            scaled=numbers["scaled"],
        )
        models = (model,)
    return tuple(
        Case(
            f"{model.name}, {tokens} tokens",
            partial(model.example, tokens=tokens),
            {"activation": jax.nn.silu},
            flops=model.flops(tokens),
            bytes=model.read_bytes(1) * model.expected_experts(tokens),
        )
        for model in models
        for tokens in (*shapes.DECODE_TOKENS, *shapes.PREFILL_TOKENS)
    )


def moe_cases() -> Sequence[Case]:
    """Few and many tokens, experts without a token, scales before and after."""
    return (
        _case("7 tokens", tokens=7, experts=8, top_k=2, scale="output_scale", quick=True),
        _case("300 tokens", tokens=300, experts=4, top_k=2, scale="output_scale", differentiate=("x", "gate", "down")),
        _case("one expert a token", tokens=130, experts=16, top_k=1, scale="input_scale", quick=True),
    )


def _case(
    name: str,
    *,
    tokens: int,
    experts: int,
    top_k: int,
    scale: str,
    hidden: int = 128,
    intermediate: int = 192,
    activation: Activation = jax.nn.silu,
    quick: bool = False,
    differentiate: tuple[str, ...] = (),
) -> Case:
    def arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
        def normal(*shape: int, width: int = 1) -> np.ndarray:
            return (rng.standard_normal(shape, np.float32) * width**-0.5).astype(jnp.bfloat16)

        # The last expert gets no token.
        chosen = np.argsort(rng.random((tokens, experts - 1)), axis=1)[:, :top_k]
        return {
            "x": normal(tokens, hidden),
            "expert_ids": chosen.astype(np.int32),
            "gate": normal(experts, intermediate, hidden, width=hidden),
            "up": normal(experts, intermediate, hidden, width=hidden),
            "down": normal(experts, hidden, intermediate, width=intermediate),
            scale: rng.uniform(0.1, 1.0, (tokens, top_k)).astype(np.float32),
        }

    static = {"activation": activation}
    return Case(name, arrays, static, quick=quick, differentiate=differentiate, numpy=True)
