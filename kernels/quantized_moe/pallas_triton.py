"""Routed experts with quantised weights through Pallas-Triton: two grouped products that read the codes of used experts
alone, each once for every tile of rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.moe.reference import Activation
from llama_jax.kernels.moe.schedule import schedule
from llama_jax.kernels.pallas import MAX_ELEMENTS
from llama_jax.kernels.quantized_matmul.operands import Weight
from llama_jax.kernels.quantized_matmul.unpack import WORD_BYTES, words_for
from llama_jax.kernels.quantized_moe.kernel import Call, grouped_product, takes
from llama_jax.kernels.quantized_moe.reference import quantized_experts_reference
from llama_jax.kernels.quantized_moe.tiles import MOST_ROWS, Tiles, default_tiles, rows_of
from llama_jax.quantized import Layout
from llama_jax.targets import Target, current

__all__ = ["Tiles", "run", "unsupported"]

DTYPES = ("bfloat16", "float16")
LEAST_STEP = 64
"""Bytes of a row that a step should be able to read."""
Members = Mapping[str, jax.Array]


def unsupported(
    target: Target,
    x: jax.Array,
    expert_ids: jax.Array,
    gate: Members,
    up: Members,
    down: Members,
    *,
    layouts: tuple[Layout, Layout],
    activation: Activation,
    interpret: bool = False,
    **scales: Any,
) -> str | None:
    """The reason this backend cannot run a call on `target`, or None."""
    if target.vendor == "cpu" and not interpret:
        return "Pallas-Triton compiles for GPUs only; pallas_interpret runs the same kernels"
    if not expert_ids.size:
        return "there are no tokens"
    if x.dtype.name not in DTYPES:
        return f"dtype {x.dtype.name}, it takes {' and '.join(DTYPES)}"
    rows = rows_of(target, expert_ids.size, len(gate[layouts[0].name]))
    if rows > MOST_ROWS:
        return f"some {rows // 2} rows for each expert: more than {MOST_ROWS // 2} would decode its weights repeatedly"
    for layout, members in ((layouts[0], gate), (layouts[1], down)):
        codes = members[layout.name]
        if layout.kind == "fp8":
            return "codes are 8-bit floats, it takes integers"
        if layout.group is None and layout.offset is not None:
            return "rows have one scale and are asymmetric"
        if not takes(layout.group, layout.per_byte, codes.shape[-1], LEAST_STEP):
            return f"rows of {codes.shape[-1]} bytes in groups of {layout.group} cannot be cut into equal steps"
        if codes.size // (WORD_BYTES if layout.per_byte > 1 else 1) > MAX_ELEMENTS:
            return f"a stack of weights has more than {MAX_ELEMENTS} elements"
    # Triton's dialect has no error function (gelu without the tanh approximation).
    if not interpret and re.search(r"\berfc?\b", str(jax.make_jaxpr(activation)(jax.ShapeDtypeStruct((), "float32")))):
        return "the activation uses erf"
    return None


def run(
    x: jax.Array,
    expert_ids: jax.Array,
    gate: Members,
    up: Members,
    down: Members,
    *,
    layouts: tuple[Layout, Layout],
    activation: Activation,
    input_scale: jax.Array | None = None,
    output_scale: jax.Array | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `llama_jax.kernels.quantized_moe.quantized_experts`.

    Args:
      tiles: default: `default_tiles` of the current target.
      interpret: runs as plain JAX operations, on any device.
    """
    if tiles is None:
        tiles = default_tiles(current(), **sizes(expert_ids, down, layouts[1]))
    call = _Call(layouts, activation, tiles, interpret)
    return _experts(call, x, expert_ids, dict(gate), dict(up), dict(down), input_scale, output_scale)


def sizes(expert_ids: jax.Array, down: Members, layout: Layout) -> dict[str, int]:
    """The sizes that tiles depend on."""
    experts, hidden, row_bytes = down[layout.name].shape
    return {"pairs": expert_ids.size, "experts": experts, "hidden": hidden, "row_bytes": row_bytes}


@dataclass(frozen=True)
class _Call:
    """The static part of a call."""

    layouts: tuple[Layout, Layout]
    activation: Activation
    tiles: Tiles
    interpret: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(
    call: _Call,
    x: jax.Array,
    expert_ids: jax.Array,
    gate: Members,
    up: Members,
    down: Members,
    input_scale: jax.Array | None,
    output_scale: jax.Array | None,
) -> jax.Array:
    experts, intermediate, _ = gate[call.layouts[0].name].shape
    plan = schedule(expert_ids, experts, call.tiles.rows)
    unpack = words_for(current(), interpret=call.interpret)

    def product(
        name: str, x: jax.Array, layout: Layout, weights: tuple[Members, ...], columns: int, scale: jax.Array | None
    ) -> jax.Array:
        up = len(weights) > 1
        flat = None if scale is None else scale.reshape(-1).astype(jnp.float32)
        return grouped_product(
            Call(name, call.activation if up else None, 1 if up else call.tiles.splits),
            x,
            [Weight.of(layout, members) for members in weights],
            columns,
            plan,
            flat,
            call.tiles,
            unpack,
            interpret=call.interpret,
        )

    (inner,) = product("quantized_moe_gate_up", x, call.layouts[0], (gate, up), intermediate, input_scale)
    out = product("quantized_moe_down", inner, call.layouts[1], (down,), x.shape[-1], output_scale)
    # Over the splits, and over each token's experts.
    return out.reshape(call.tiles.splits, *expert_ids.shape, -1).sum(axis=(0, 2), dtype=jnp.float32).astype(x.dtype)


def _forward(call: _Call, *args: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    return _experts(call, *args), args


def _backward(call: _Call, saved: tuple[Any, ...], gradient: jax.Array) -> tuple[Any, ...]:
    """The gradient of the reference, by x and the scales only: quantised weights are not trained."""
    x, expert_ids, gate, up, down, input_scale, output_scale = saved

    def reference(x: jax.Array, scales: tuple[Any, Any]) -> jax.Array:
        return quantized_experts_reference(
            x,
            expert_ids,
            gate,
            up,
            down,
            layouts=call.layouts,
            activation=call.activation,
            input_scale=scales[0],
            output_scale=scales[1],
        )

    _, pull = jax.vjp(reference, x, (input_scale, output_scale))
    for_x, for_scales = pull(gradient)
    return for_x, None, None, None, None, *for_scales


_experts.defvjp(_forward, _backward)
