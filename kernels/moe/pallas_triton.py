"""Routed experts through Pallas-Triton: two grouped products, tokens gathered and results scattered inside of them.

The first product multiplies by gate and up at once and writes activation(gate) * up; the second multiplies by down.
Weights are read where they lie, and each expert's only if a token goes there. The backward pass recomputes: it is that
of the reference, with `jax.lax.ragged_dot`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.moe.grouped import grouped_product
from llama_jax.kernels.moe.reference import Activation, routed_experts_reference
from llama_jax.kernels.moe.schedule import schedule, tile_count
from llama_jax.kernels.pallas import next_power_of_2
from llama_jax.targets import Target, current

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Tiles:
    """How the two products are cut; powers of two, at least 16.

    Attributes:
      rows: pairs of one token and one of its experts that a program computes.
      up_cols, up_inner: columns of gate and of up, and how much of the inner axis a step of the loop reads.
      down_cols, down_inner: likewise of down.
      down_splits: programs that share the inner axis of down, where there would be too few.
      num_warps, num_stages: waves of a program, and steps of the loop that overlap.
    """

    rows: int
    up_cols: int
    up_inner: int
    down_cols: int
    down_inner: int
    down_splits: int
    num_warps: int
    num_stages: int

    def lds_bytes(self, target: Target, itemsize: int) -> int:
        """About what the larger of the two kernels takes: AMD's compiler keeps one step in registers."""
        buffers = max(self.num_stages - (target.vendor == "amd"), 1)
        up = (self.rows + 2 * self.up_cols) * self.up_inner
        down = (self.rows + self.down_cols) * self.down_inner
        return buffers * max(up, down) * itemsize

    def fits(self, target: Target, itemsize: int) -> bool:
        """Whether the target has that much; a CPU, which only interprets, has no limit."""
        return not target.lds_bytes or self.lds_bytes(target, itemsize) <= target.lds_bytes


# By vendor and wave size, then by rows: what compiles for gfx90a, gfx942, gfx950, gfx1100, gfx1151 and gfx1201 without
# spills, with the largest share of matrix instructions (many rows) or the most bytes in flight (few rows).
_CDNA = {
    16: Tiles(16, 32, 128, 32, 128, 1, num_warps=2, num_stages=2),
    32: Tiles(32, 64, 64, 64, 64, 1, num_warps=4, num_stages=2),
    64: Tiles(64, 64, 64, 128, 64, 1, num_warps=4, num_stages=2),
    128: Tiles(128, 128, 64, 256, 64, 1, num_warps=8, num_stages=2),
}
_RDNA = {
    16: Tiles(16, 64, 64, 64, 64, 1, num_warps=4, num_stages=1),
    32: Tiles(32, 64, 64, 64, 64, 1, num_warps=4, num_stages=1),
    64: Tiles(64, 64, 32, 128, 32, 1, num_warps=8, num_stages=1),
    128: Tiles(128, 64, 32, 128, 32, 1, num_warps=8, num_stages=1),
}
_NVIDIA = {
    16: Tiles(16, 64, 64, 64, 64, 1, num_warps=4, num_stages=4),
    32: Tiles(32, 64, 64, 64, 64, 1, num_warps=4, num_stages=4),
    64: Tiles(64, 64, 64, 128, 64, 1, num_warps=4, num_stages=3),
    128: Tiles(128, 128, 64, 256, 64, 1, num_warps=8, num_stages=3),
}


def default_tiles(
    target: Target, *, pairs: int, experts: int, hidden: int, intermediate: int, itemsize: int = 2
) -> Tiles:
    """The best tiles known for a target, by its budgets.

    Args:
      pairs: tokens times experts of each.
      itemsize: bytes of an element.
    """
    family = _NVIDIA if target.vendor == "nvidia" else _RDNA if target.wave_size == 32 else _CDNA
    # Twice the mean, so that most experts need one tile and their weights are read once.
    tiles = family[min(max(next_power_of_2(2 * pairs // min(pairs, experts)), 16), 128)]
    if itemsize > 2:
        tiles = replace(tiles, up_inner=tiles.up_inner // 2, down_inner=tiles.down_inner // 2)
    while tiles.num_stages > 1 and not tiles.fits(target, itemsize):
        tiles = replace(tiles, num_stages=tiles.num_stages - 1)
    # Eight waves for every compute unit, if need be by splitting, as long as each program has eight steps to do.
    waves = tile_count(pairs, experts, tiles.rows) * -(-hidden // tiles.down_cols) * tiles.num_warps
    splits = 1
    while waves * splits < 8 * target.compute_units and intermediate >= 16 * splits * tiles.down_inner:
        splits *= 2
    return replace(tiles, down_splits=splits)


def candidates(
    target: Target, *, pairs: int, experts: int, hidden: int, intermediate: int, itemsize: int = 2
) -> Iterator[Tiles]:
    """Tiles worth measuring on a target: the default first, then its neighbours that fit."""
    default = default_tiles(
        target, pairs=pairs, experts=experts, hidden=hidden, intermediate=intermediate, itemsize=itemsize
    )
    seen = set()
    stages = (1, 2) if target.vendor == "amd" else (2, 3, 4)
    for rows in (default.rows, default.rows // 2, default.rows * 2):
        for cols in (default.up_cols, default.up_cols // 2, default.up_cols * 2):
            for inner in (default.up_inner, default.up_inner // 2, default.up_inner * 2):
                for num_stages in (default.num_stages, *stages):
                    down_cols = cols * default.down_cols // default.up_cols
                    tiles = replace(
                        default,
                        rows=rows,
                        up_cols=cols,
                        up_inner=inner,
                        down_cols=down_cols,
                        down_inner=inner,
                        num_stages=num_stages,
                    )
                    if (
                        tiles not in seen
                        and tiles.fits(target, itemsize)
                        and 16 <= rows <= 256
                        and min(cols, inner) >= 16
                    ):
                        seen.add(tiles)
                        yield tiles


def unsupported(
    target: Target,
    x: jax.Array,
    expert_ids: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    activation: Activation,
    tiles: Tiles | None = None,
    **scales: Any,
) -> str | None:
    """Why this backend cannot run a call on `target`, or None."""
    if target.vendor == "cpu":
        return "it needs a GPU"
    if reason := interpret_unsupported(target, x, expert_ids, gate, up, down):
        return reason
    if x.dtype == jnp.float32 and target.vendor == "amd" and target.wave_size == 32:
        return "RDNA has no matrix instructions for float32"
    # Triton's dialect has no error function (gelu without the tanh approximation).
    if re.search(r"\berfc?\b", str(jax.make_jaxpr(activation)(jax.ShapeDtypeStruct((), jnp.float32)))):
        return "the activation uses erf"
    if tiles is not None and not tiles.fits(target, x.dtype.itemsize):
        return (
            f"the tiles take {tiles.lds_bytes(target, x.dtype.itemsize)} bytes of local memory, of {target.lds_bytes}"
        )
    return None


def interpret_unsupported(
    target: Target, x: jax.Array, expert_ids: jax.Array, *weights: jax.Array, **options: Any
) -> str | None:
    """Why not even interpret mode can run a call, or None."""
    if expert_ids.size == 0:
        return "there are no tokens"
    if x.dtype not in DTYPES or any(weight.dtype != x.dtype for weight in weights):
        dtypes = ", ".join(str(array.dtype) for array in (x, *weights))
        return f"tokens and weights need one dtype of {', '.join(DTYPES)}; they have {dtypes}"
    return None


def run(
    x: jax.Array,
    expert_ids: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    activation: Activation,
    input_scale: jax.Array | None = None,
    output_scale: jax.Array | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `llama_jax.kernels.moe.routed_experts`.

    Args:
      tiles: how to cut the products; by default those of `default_tiles` for the current target.
      interpret: runs the kernels as plain JAX operations, on any device.
    """
    if tiles is None:
        experts, intermediate, hidden = gate.shape
        tiles = default_tiles(
            current(),
            pairs=expert_ids.size,
            experts=experts,
            hidden=hidden,
            intermediate=intermediate,
            itemsize=x.dtype.itemsize,
        )
    return _experts(activation, tiles, interpret, x, expert_ids, gate, up, down, input_scale, output_scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _experts(
    activation: Activation,
    tiles: Tiles,
    interpret: bool,
    x: jax.Array,
    expert_ids: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    input_scale: jax.Array | None,
    output_scale: jax.Array | None,
) -> jax.Array:
    tokens, top_k = expert_ids.shape
    plan = schedule(expert_ids, gate.shape[0], tiles.rows)
    product = functools.partial(
        grouped_product,
        schedule=plan,
        block_rows=tiles.rows,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
    )
    inner = product(
        "moe_gate_up",
        x,
        (gate, up),
        combine=lambda g, u: activation(g) * u,
        scale=None if input_scale is None else input_scale.reshape(-1).astype(jnp.float32),
        block_cols=tiles.up_cols,
        block_inner=tiles.up_inner,
        splits=1,
    )[0]
    out = product(
        "moe_down",
        inner,
        (down,),
        combine=lambda total: total,
        scale=None if output_scale is None else output_scale.reshape(-1).astype(jnp.float32),
        block_cols=tiles.down_cols,
        block_inner=tiles.down_inner,
        splits=tiles.down_splits,
    )
    return out.reshape(tiles.down_splits, tokens, top_k, -1).sum(axis=(0, 2), dtype=jnp.float32).astype(x.dtype)


def _forward(activation: Activation, tiles: Tiles, interpret: bool, *args: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    return _experts(activation, tiles, interpret, *args), args


def _backward(
    activation: Activation, tiles: Tiles, interpret: bool, args: tuple[Any, ...], gradient: jax.Array
) -> tuple[Any, ...]:
    x, expert_ids, gate, up, down, input_scale, output_scale = args

    def reference(x: jax.Array, weights: tuple[jax.Array, ...], scales: tuple[Any, Any]) -> jax.Array:
        return routed_experts_reference(
            x, expert_ids, *weights, activation=activation, input_scale=scales[0], output_scale=scales[1]
        )

    _, pull = jax.vjp(reference, x, (gate, up, down), (input_scale, output_scale))
    for_x, for_weights, for_scales = pull(gradient)
    return for_x, None, *for_weights, *for_scales


_experts.defvjp(_forward, _backward)
