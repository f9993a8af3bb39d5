"""Routed experts with quantised weights as real models make them: to compile for every target, and to measure."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from llama_jax.kernels.moe.shapes import MoeShape
from llama_jax.kernels.quantized_matmul.shapes import ProductShape, layout_of

MIXTRAL = MoeShape(8, 2, 4096, 14336, "output")
SCOUT = MoeShape(16, 1, 5120, 8192, "input")


@dataclass(frozen=True)
class ExpertsShape:
    """One call: `tokens` through a layer's routed experts in one layout."""

    model: MoeShape
    layout: str
    tokens: int
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """Such as "int4_g64_min e8k2h4096i14336, 1 tokens"."""
        other = "" if self.dtype == "bfloat16" else f", {self.dtype}"
        return f"{self.layout} {self.model.name}, {self.tokens} tokens{other}"

    def example(self, key: jax.Array) -> dict[str, jax.Array]:
        """Random arrays for a call, the members of weights as "gate.scales"."""
        keys = jax.random.split(key, 6)
        model, tokens = self.model, self.tokens
        rows = (tokens, model.top_k)
        chosen = jax.lax.top_k(jax.random.uniform(keys[0], (tokens, model.experts)), model.top_k)[1]
        made = {
            "x": jax.random.normal(keys[1], (tokens, model.hidden), self.dtype),
            "expert_ids": chosen.astype("int32"),
            f"{model.scaled}_scale": jax.random.uniform(keys[2], rows, "float32", 0.1, 1),
        }
        up = (model.intermediate, model.hidden)
        for key, (name, (out, inner)) in zip(keys[3:], {"gate": up, "up": up, "down": up[::-1]}.items(), strict=True):
            members = ProductShape(self.layout, 1, model.experts * out, inner).members(key)
            made |= {f"{name}.{m}": a.reshape(model.experts, out, *a.shape[1:]) for m, a in members.items()}
        return made

    def bytes(self) -> float:
        """The codes, scales and offsets of the experts that some token goes to, on average, each read once."""
        made = jax.eval_shape(self.example, jax.random.key(0))
        stored = sum(a.size * a.dtype.itemsize for name, a in made.items() if "." in name)
        return stored / self.model.experts * self.model.expected_experts(self.tokens)

    def flops(self) -> int:
        """A multiplication and an addition for each weight of each pair."""
        return self.model.flops(self.tokens)

    def fits(self) -> bool:
        """Returns whether the layout can store both kinds of rows."""
        layout = layout_of(self.layout)
        return layout.fits(self.model.hidden) and layout.fits(self.model.intermediate)


TOKENS = (1, 8, 64)
"""Decode steps."""
LAYOUTS = ("int8", "int4_g128", "int4_g64_min")
SHAPES = (
    *(ExpertsShape(model, layout, tokens) for model in (MIXTRAL, SCOUT) for layout in LAYOUTS for tokens in (1, 8)),
    ExpertsShape(MIXTRAL, "int4_g64_min", 64),
    ExpertsShape(MIXTRAL, "int8", 64),
    ExpertsShape(MIXTRAL, "int4_g32", 1),
    ExpertsShape(MIXTRAL, "int4_g128_zero", 1),
    ExpertsShape(MIXTRAL, "int8_g32", 8),
    ExpertsShape(SCOUT, "int4_g64_min", 8, "float16"),
)
"""Calls that the kernels are compiled for."""
