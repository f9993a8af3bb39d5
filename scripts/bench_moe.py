#!/usr/bin/env python
"""Routed experts on one GPU: Pallas kernels beside `jax.lax.ragged_dot`, with the least time that the card allows.

For each shape and number of tokens: first fresh random inputs through each backend, against sums in float32 for some of
the tokens; then the time of a call, the median of several programs that each make many calls one after another, with
other experts every time. The floor is the longer of reading the experts' weights once, at the read rate, and computing,
at the rate of a large matrix product, both measured in the same run as `llama-jax bench` measures them. Without
arguments the cases are those of the table in docs/kernels.md.

The rule: a kernel that is at least 1.5 times as fast as ragged_dot is worth choosing; otherwise ragged_dot stays.

    python scripts/bench_moe.py --json moe.json
    python scripts/bench_moe.py --shapes e8k2h4096i14336 --tokens 1 64 --sweep 12
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from bench_shared import UNTUNED, ceilings, seconds, write

from llama_jax.errors import KernelError
from llama_jax.kernels.moe import pallas_triton, routed_experts
from llama_jax.kernels.moe.products import DTYPES
from llama_jax.kernels.moe.shapes import DECODE_TOKENS, PREFILL_TOKENS, SHAPES, MoeShape
from llama_jax.measure.bench import Ceilings
from llama_jax.targets import current

WORTH_IT = 1.5
ERROR_LIMIT = 2.0
"""Largest relative error, in units of the dtype's epsilon."""


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, default=SHAPES, help="names, or E,K,HIDDEN,WIDTH,SCALED"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=(*DECODE_TOKENS, *PREFILL_TOKENS))
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--backends", nargs="+", default=("reference", "pallas_triton"))
    parser.add_argument("--sweep", type=int, default=0, metavar="N", help="also measure the first N candidate tiles")
    parser.add_argument("--calls", type=int, help="calls in a program; by default as many as take about 20 ms")
    parser.add_argument("--repeats", type=int, default=7, help="programs that are timed")
    parser.add_argument("--ceiling-size", type=int, help="side of the matrices that the rates come from")
    parser.add_argument("--json", type=Path, dest="out", help="write the numbers to this file, after each case")
    args = parser.parse_args(argv)

    dtype = jnp.dtype(args.dtype)
    limits = ceilings(args.dtype, args.ceiling_size)
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        if too_large(shape, dtype.itemsize, jax.devices()[0]):
            print(f"{shape.name}: left out, its weights take more than half of the memory")
            continue
        weights = None  # freed before the next shape's are made
        weights = shape.example(jax.random.key(1), 1, dtype)
        weights = {name: weights[name] for name in ("gate", "up", "down")}
        for tokens in args.tokens:
            for row in measure(shape, tokens, weights, args, limits):
                rows.append(row)
                print(line(row), flush=True)
            write(args.out, rows, {args.dtype: limits})
    return rows


def parse_shape(text: str) -> MoeShape:
    """A shape by its name, or from its numbers."""
    for shape in SHAPES:
        if shape.name == text:
            return shape
    try:
        *numbers, scaled = text.split(",")
        experts, top_k, hidden, intermediate = map(int, numbers)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(s.name for s in SHAPES)}") from None
    return MoeShape(experts, top_k, hidden, intermediate, scaled)


def too_large(shape: MoeShape, itemsize: int, device: jax.Device) -> bool:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit is not None and shape.read_bytes(shape.experts, itemsize) > limit / 2


def measure(
    shape: MoeShape, tokens: int, weights: dict[str, jax.Array], args: argparse.Namespace, limits: Ceilings
) -> list[dict[str, Any]]:
    """A row for each backend, and for each tile of a sweep."""
    dtype = jnp.dtype(args.dtype)
    bandwidth, rate = limits.read_bytes_per_s, limits.matmul_flops_per_s
    bound = shape.floor_seconds(tokens, shape.expected_experts(tokens), bandwidth, rate, dtype.itemsize)
    calls = args.calls or max(4, math.ceil(0.02 / max(bound, 1e-5)))
    ids = jax.jit(jax.vmap(lambda key: routing(key, shape, tokens)))(jax.random.split(jax.random.key(2), calls))
    touched = sum(len(set(row)) for row in ids.reshape(calls, -1).tolist()) / calls
    floor = shape.floor_seconds(tokens, touched, bandwidth, rate, dtype.itemsize)
    small = {
        "x": jax.random.normal(jax.random.key(time.time_ns() % 2**32), (tokens, shape.hidden), dtype),
        f"{shape.scaled}_scale": jax.random.uniform(jax.random.key(3), (tokens, shape.top_k)),
    }
    expected = exact(ids[0], small, weights)

    def row(backend: str, tiles: pallas_triton.Tiles | None = None) -> dict[str, Any]:
        call = partial(routed_experts, activation=jax.nn.silu, backend=backend)
        if tiles is not None:
            interpret = backend == "pallas_interpret"
            call = partial(pallas_triton.run, activation=jax.nn.silu, tiles=tiles, interpret=interpret)
        result = {"operation": "moe", "case": f"{shape.name}, {tokens} tokens", "shape": shape.name, "tokens": tokens}
        result |= {"dtype": args.dtype, "backend": backend, "experts": touched}
        result |= {"tiles": vars(tiles)} if tiles else {}
        try:
            out = jax.jit(call)(**small, expert_ids=ids[0], **weights)
            got = out[: len(expected)].astype(jnp.float32)
            error = float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))
            if not error <= ERROR_LIMIT * float(jnp.finfo(dtype).eps):
                return result | {"failed": f"relative error {error:.2e}"}
            result |= {"relative_error": error}
            once = seconds(jax.jit(loop(call)), small, ids, weights, repeats=args.repeats) / calls
        except (KernelError, jax.errors.JaxRuntimeError) as problem:
            return result | {"failed": str(problem).splitlines()[0][:200]}
        read = shape.read_bytes(1, dtype.itemsize) * touched
        flops = shape.flops(tokens)
        return result | {
            "us": once * 1e6,
            "floor_us": floor * 1e6,
            "share_of_ceiling": floor / once,
            "TB_per_s": read / once / 1e12,
            "TFLOP_per_s": flops / once / 1e12,
        }

    rows = [row(backend) for backend in args.backends]
    if args.sweep and (swept := [name for name in args.backends if name.startswith("pallas")]):
        experts, intermediate, hidden = weights["gate"].shape
        sizes = {"pairs": ids[0].size, "experts": experts, "hidden": hidden, "intermediate": intermediate}
        choices = list(pallas_triton.candidates(current(), **sizes, itemsize=dtype.itemsize))
        rows += [row(swept[0], tiles) for tiles in choices[: args.sweep]]
    base = next((r["us"] for r in rows if r["backend"] == "reference" and "us" in r), None)
    for r in rows:
        if base and "us" in r and r["backend"] != "reference":
            r["speedup"] = base / r["us"]
            r["worth_it"] = r["speedup"] >= WORTH_IT
    return rows


def routing(key: jax.Array, shape: MoeShape, tokens: int) -> jax.Array:
    """Experts of each token, all equally likely: int32 [tokens, top_k]."""
    logits = jax.random.uniform(key, (tokens, shape.experts))
    return jax.lax.top_k(logits, shape.top_k)[1].astype(jnp.int32)


def exact(ids: jax.Array, small: dict[str, jax.Array], weights: dict[str, jax.Array], most: int = 16) -> jax.Array:
    """float32 results of the first tokens, expert by expert, without sorting anything."""
    ids, small = ids[:most], {name: array[:most].astype(jnp.float32) for name, array in small.items()}
    ones = jnp.ones(ids.shape)

    def pair(weights: dict[str, jax.Array], args: tuple[jax.Array, ...]) -> jax.Array:
        row, expert, before, after = args
        gate, up, down = (weights[name][expert].astype(jnp.float32) for name in ("gate", "up", "down"))

        def times(weight: jax.Array, vector: jax.Array) -> jax.Array:
            return jnp.matmul(weight, vector, precision="highest")

        return times(down, jax.nn.silu(times(gate, row * before)) * times(up, row * before)) * after

    rows = jnp.repeat(small["x"], ids.shape[1], axis=0)
    scales = (small.get(f"{side}_scale", ones).reshape(-1) for side in ("input", "output"))
    # The weights are an argument: a constant of gigabytes takes the compiler minutes.
    every = jax.jit(lambda weights, *a: jax.lax.map(partial(pair, weights), a), compiler_options=UNTUNED)
    out = every(weights, rows, ids.reshape(-1), *scales)
    return out.reshape(*ids.shape, -1).sum(1)


def loop(call: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """One program with a call for each routing; each waits for the one before."""

    def program(small: dict[str, jax.Array], ids: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
        def step(x: jax.Array, ids: jax.Array) -> tuple[jax.Array, None]:
            out = call(**small | {"x": x}, expert_ids=ids, **weights)
            return x + out * jnp.asarray(1e-6, x.dtype), None

        return jax.lax.scan(step, small["x"], ids)[0]

    return program


def line(row: dict[str, Any]) -> str:
    name = f"{row['shape']:18} {row['tokens']:5} tokens {row['backend']:16}"
    if "failed" in row:
        return f"{name} FAILED: {row['failed']}"
    tiles = " " + "/".join(map(str, row["tiles"].values())) if "tiles" in row else ""
    speedup = f", {row['speedup']:.2f} x ragged_dot" if "speedup" in row else ""
    return (
        f"{name} {row['us']:9.1f} us, {row['share_of_ceiling']:4.0%} of the ceiling, {row['TB_per_s']:.2f} TB/s, "
        f"{row['TFLOP_per_s']:.0f} TFLOP/s, error {row['relative_error']:.1e}{speedup}{tiles}"
    )


if __name__ == "__main__":
    main()
