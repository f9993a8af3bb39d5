#!/usr/bin/env python
"""The residual sum and the norm behind it on one GPU: the kernel beside what XLA makes of plain operations.

For each shape and backend: first fresh random inputs against float32; then the time of a call, the median of several
programs that each make many calls. Each call's delta is the norm before, and its x the sum before, so that no call can
begin before the last has ended; no program has a product, so that XLA fuses the reference as it likes. Each
program's loop is unrolled by UNROLL calls: starting a step of a loop takes longer than such a kernel.

    python scripts/bench_norm.py --json norm.json
    python scripts/bench_norm.py --rows 1 64 --hidden 4096 --sweep 8
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from bench_shared import seconds, write

from llama_jax.errors import KernelError
from llama_jax.kernels.norm import add_rms_norm, pallas_triton
from llama_jax.kernels.norm.shapes import MEASURED, NormShape
from llama_jax.kernels.norm.tiles import candidates
from llama_jax.targets import current

ERROR_LIMIT = 2.0
"""Largest relative error, in units of the dtype's epsilon."""
UNROLL = 32
EPS = 1e-5
Call = Callable[..., tuple[jax.Array, jax.Array]]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=sorted({shape.rows for shape in MEASURED}))
    parser.add_argument("--hidden", nargs="+", type=int, default=sorted({shape.hidden for shape in MEASURED}))
    parser.add_argument("--dtype", default="bfloat16", choices=pallas_triton.DTYPES)
    parser.add_argument("--backends", nargs="+", default=("reference", "pallas_triton"))
    parser.add_argument("--sweep", type=int, default=0, metavar="N", help="also measure the first N candidate tiles")
    parser.add_argument("--calls", type=int, default=2048, help=f"calls in a program; rounded up to {UNROLL}")
    parser.add_argument("--repeats", type=int, default=9, help="programs that are timed")
    parser.add_argument("--json", type=Path, dest="out", help="write the numbers to this file")
    args = parser.parse_args(argv)

    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    rows = []
    for count, hidden in itertools.product(args.rows, args.hidden):
        for row in measure(NormShape(count, hidden, args.dtype), args):
            rows.append(row)
            print(line(row), flush=True)
            write(args.out, rows, {})
    return rows


def measure(shape: NormShape, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each backend, and for each tile of a sweep."""
    arrays = shape.example(jax.random.key(time.time_ns() % 2**32))
    for backend in args.backends:
        call = partial(add_rms_norm, eps=EPS, backend=backend)
        yield timed(shape, arrays, call, args, {"backend": backend})
        if not backend.startswith("pallas"):
            continue
        found = candidates(current(), rows=shape.rows, hidden=shape.hidden)
        for tiles in itertools.islice(found, args.sweep):
            run = partial(pallas_triton.run, eps=EPS, tiles=tiles, interpret=backend == "pallas_interpret")
            yield timed(shape, arrays, run, args, {"backend": backend, "tiles": vars(tiles)})


def timed(
    shape: NormShape, arrays: dict[str, jax.Array], call: Call, args: argparse.Namespace, about: dict[str, Any]
) -> dict[str, Any]:
    """The row of one backend."""
    result = {"rows": shape.rows, "hidden": shape.hidden, "dtype": shape.dtype} | about
    try:
        error = relative_error(jax.jit(call)(**arrays), arrays)
        if not error <= ERROR_LIMIT * float(jnp.finfo(shape.dtype).eps):
            return result | {"failed": f"relative error {error:.2e}"}
        steps = -(-args.calls // UNROLL)
        once = seconds(jax.jit(partial(many, call, steps)), arrays, repeats=args.repeats) / (steps * UNROLL)
    except (KernelError, NotImplementedError, RuntimeError, ValueError) as problem:
        return result | {"failed": str(problem).splitlines()[0][:200]}
    return result | {"relative_error": error, "us": once * 1e6, "TB_per_s": shape.bytes() / once / 1e12}


def relative_error(found: tuple[jax.Array, jax.Array], arrays: dict[str, jax.Array]) -> float:
    """Of the sum and of the norm, the larger; the norm is that of the sum that was found."""
    x, delta, weight = (arrays[name].astype(jnp.float32) for name in ("x", "delta", "weight"))
    total = found[0].astype(jnp.float32)
    normed = total * jax.lax.rsqrt(jnp.mean(total**2, axis=-1, keepdims=True) + EPS) * weight

    def error(value: jax.Array, exact: jax.Array) -> float:
        return float(jnp.linalg.norm(value.astype(jnp.float32) - exact) / jnp.linalg.norm(exact))

    return max(error(found[0], x + delta), error(found[1], normed))


def many(call: Call, steps: int, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """`steps` times UNROLL calls in a row. The barrier keeps XLA from joining one call with the next."""

    def step(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        for _ in range(UNROLL):
            state = jax.lax.optimization_barrier(call(*state, arrays["weight"]))
        return state

    return jax.lax.fori_loop(0, steps, step, (arrays["x"], arrays["delta"]))


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    tiles = "/".join(str(n) for n in row.get("tiles", {}).values())
    name = f"{row['rows']:5} x {row['hidden']:5} {row['backend']:17} {tiles:6}"
    if "failed" in row:
        return f"{name} {row['failed']}"
    return f"{name} {row['us']:9.2f} us {row['TB_per_s']:6.2f} TB/s  error {row['relative_error']:.1e}"


if __name__ == "__main__":
    main()
