#!/usr/bin/env python
"""Products with quantised weights on one GPU: the kernel with several tiles, XLA's plain form, and bfloat16 weights.

Programs are compiled in threads first, with nothing timed meanwhile. Each is then called with one buffer after the
other, together larger than any cache, under the profiler: a time is the median, over calls, of what all kernels of the
call took, without the gaps between them. The error is the largest of a number, relative to the largest of the result,
against a product in float32 with the decoded weight. TB/s count the bytes of the weight and of what lies beside it.

    python scripts/bench_quantized.py --json quantized.json
    python scripts/bench_quantized.py --layouts int4_g128 --shapes 28672x4096 --rows 1 8 --grid cols=16,32 inner=128,256
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from bench_shared import write

from llama_jax.decode.weights_read import MOST_ROWS
from llama_jax.kernels.quantized_matmul import pallas_triton, quantized_matmul_reference
from llama_jax.kernels.quantized_matmul.decoding import decoded
from llama_jax.kernels.quantized_matmul.operands import Weight
from llama_jax.kernels.quantized_matmul.shapes import LLAMA_8B, ProductShape, layout_of
from llama_jax.kernels.quantized_matmul.tiles import Tiles, default_tiles
from llama_jax.measure.profiling import calls_of
from llama_jax.quantized import codes
from llama_jax.targets import current

HEAD = (128256, 4096)
READ_BYTES = 200e6
"""Least total size of one program's buffers: four times the largest L2 cache."""
MOST_BUFFERS = 24


@dataclass(frozen=True)
class Program:
    """One way to compute one product."""

    shape: ProductShape
    backend: str
    tiles: Tiles | None = None

    @property
    def name(self) -> str:
        """That of its kernels' program in a profile."""
        s, tiles = self.shape, vars(self.tiles).values() if self.tiles else ()
        return "_".join(map(str, ("p", s.layout, s.out, s.inner, s.rows, self.backend, *tiles)))

    def __call__(self, x: jax.Array, members: dict[str, jax.Array]) -> jax.Array:
        if self.backend == "bfloat16":
            return pallas_triton.matmul(x, members["weight"], x.dtype)
        layout = layout_of(self.shape.layout)
        if self.backend == "reference":
            return quantized_matmul_reference(x, members, layout=layout)
        interpret = current().vendor == "cpu"
        if self.backend == "decoded":
            weight = decoded(Weight.of(layout, members), x.dtype, interpret=interpret)
            return pallas_triton.matmul(x, weight, x.dtype)
        return pallas_triton.run(x, members, layout=layout, tiles=self.tiles, interpret=interpret)

    def compile(self, x: Any, members: Any) -> Callable[..., jax.Array]:
        def call(x: jax.Array, members: dict[str, jax.Array]) -> jax.Array:
            return self(x, members)

        call.__name__ = self.name
        options: dict[str, bool | str] = {}
        if current().vendor != "cpu":
            options["xla_gpu_enable_command_buffer"] = ""  # kernels one by one, so that the profiler sees each
            if self.backend == "reference" and self.shape.rows <= MOST_ROWS:
                options["xla_gpu_experimental_enable_subchannel_dequantisation_fusion"] = True
        return jax.jit(call).lower(x, members).compile(options)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=("int4_g128", "int4_g64_min", "int8"))
    parser.add_argument("--shapes", nargs="+", type=_pair, default=LLAMA_8B, metavar="OUTxIN")
    parser.add_argument("--rows", nargs="+", type=int, default=(1, 2, 4, 8, 16, 32, 64))
    parser.add_argument("--backends", nargs="+", default=("pallas_triton", "reference", "bfloat16"))
    parser.add_argument("--grid", nargs="*", default=(), help="tiles beside the default: field=number,number ...")
    parser.add_argument("--calls", type=int, default=MOST_BUFFERS, help="calls of a program that are timed")
    parser.add_argument("--threads", type=int, default=16, help="that compile")
    parser.add_argument("--json", type=Path, dest="out", help="write the numbers to this file")
    args = parser.parse_args(argv)

    return bench(list(programs(args)), calls=args.calls, threads=args.threads, out=args.out)


def bench(
    found: Sequence[Program], *, calls: int = MOST_BUFFERS, threads: int = 16, out: Path | None = None
) -> list[dict[str, Any]]:
    """Compiles and times programs, and prints a line of each. Those that fail are printed with their error."""
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        compiled = dict(zip(found, pool.map(_compiled, found), strict=True))
    print(f"{len(found)} programs compiled in {time.perf_counter() - began:.0f} s", flush=True)
    for program, call in compiled.items():
        if isinstance(call, Exception):
            print(f"{program.name}: {type(call).__name__}: {(str(call).splitlines() or [''])[0][:160]}", flush=True)
    rows: list[dict[str, Any]] = []
    works = [program for program in found if callable(compiled[program])]
    for _, group in itertools.groupby(sorted(works, key=_weight), _weight):
        for row in measure(list(group), compiled, calls):
            rows.append(row)
            print(_line(row), flush=True)
        write(out, rows, {})
    return rows


def _weight(program: Program) -> tuple[str, int, int]:
    return program.shape.layout, program.shape.out, program.shape.inner


def programs(args: argparse.Namespace) -> Iterator[Program]:
    """All that is asked for, each once. Weights in bfloat16 are the same for all layouts."""
    grid = {name: [int(n) for n in numbers.split(",")] for name, _, numbers in (g.partition("=") for g in args.grid)}
    seen = set()
    for name, (out, inner), rows in itertools.product(args.layouts, args.shapes, args.rows):
        shape = ProductShape(name, rows, out, inner)
        for backend in args.backends:
            for tiles in _tiles(shape, grid) if backend == "pallas_triton" else (None,):
                program = Program(replace(shape, layout="bf16") if backend == "bfloat16" else shape, backend, tiles)
                if program not in seen:
                    seen.add(program)
                    yield program


def _tiles(shape: ProductShape, grid: dict[str, list[int]]) -> Iterator[Tiles]:
    layout = layout_of(shape.layout)
    row_bytes = shape.inner // layout.per_byte
    default = default_tiles(current(), rows=shape.rows, out=shape.out, row_bytes=row_bytes, layout=layout)
    yield default
    for numbers in itertools.product(*grid.values()) if grid else ():
        changes: dict[str, Any] = dict(zip(grid, numbers, strict=True))
        tiles = replace(default, **changes)
        if tiles.inner * tiles.splits <= row_bytes:
            yield tiles


def _members(shape: ProductShape, key: jax.Array) -> dict[str, jax.Array]:
    if shape.layout == "bf16":
        return {"weight": jax.random.normal(key, (shape.out, shape.inner), jnp.bfloat16) * shape.inner**-0.5}
    return shape.members(key)


def _decoded(shape: ProductShape, members: dict[str, jax.Array]) -> jax.Array:
    if shape.layout == "bf16":
        return members["weight"].astype(jnp.float32)
    return codes.decode(layout_of(shape.layout), members, jnp.float32)


def _compiled(program: Program) -> Callable[..., jax.Array] | Exception:
    x = jax.ShapeDtypeStruct((program.shape.rows, program.shape.inner), jnp.bfloat16)
    try:
        return program.compile(x, jax.eval_shape(partial(_members, program.shape), jax.random.key(0)))
    except Exception as error:  # a compiler's
        return error


def measure(found: list[Program], compiled: dict[Program, Any], calls: int) -> Iterator[dict[str, Any]]:
    """Times programs that multiply with one weight."""
    shape = found[0].shape
    make = jax.jit(partial(_members, shape))
    buffers = [make(jax.random.key(0))]
    size = sum(member.nbytes for member in buffers[0].values())
    count = min(max(2, math.ceil(READ_BYTES / size)), MOST_BUFFERS)
    buffers += [jax.block_until_ready(make(jax.random.key(n))) for n in range(1, count)]
    weight = jax.jit(partial(_decoded, shape))(buffers[0])
    inputs, wrong = {}, {}
    for program in found:
        rows = program.shape.rows
        if rows not in inputs:
            x = jax.random.normal(jax.random.key(rows), (rows, shape.inner), jnp.bfloat16)
            inputs[rows] = x, jnp.matmul(x.astype(jnp.float32), weight.T, precision=jax.lax.Precision.HIGHEST)
        x, expected = inputs[rows]
        off = jnp.abs(compiled[program](x, buffers[0]).astype(jnp.float32) - expected)
        wrong[program.name] = float(off.max() / jnp.abs(expected).max())

    def run() -> None:
        for program in found:
            x, _ = inputs[program.shape.rows]
            kept = [compiled[program](x, buffers[n % count]) for n in range(calls)]
            jax.block_until_ready(kept)

    times = calls_of(run)
    for program in found:
        kernels = times.get(f"jit_{program.name}") or times.get(program.name, {})
        seconds = sum(statistics.median(each) * len(each) / calls for each in kernels.values())
        yield {
            "layout": program.shape.layout,
            "shape": f"{shape.out}x{shape.inner}",
            "rows": program.shape.rows,
            "backend": program.backend,
            "tiles": vars(program.tiles) if program.tiles else {},
            "us": seconds * 1e6,
            "tb_per_s": size / seconds / 1e12 if seconds else 0.0,
            "error": wrong[program.name],
            "kernels": {name: len(each) / calls for name, each in kernels.items()},
        }


def _line(row: dict[str, Any]) -> str:
    tiles = " ".join(f"{name}={number}" for name, number in row["tiles"].items())
    return (
        f"{row['layout']:14} {row['shape']:12} {row['rows']:3} rows {row['backend']:13} {row['us']:8.1f} us "
        f"{row['tb_per_s']:5.2f} TB/s  error {row['error']:.1e}  {len(row['kernels'])} kernels  {tiles}"
    )


def _pair(text: str) -> tuple[int, int]:
    if text == "head":
        return HEAD
    out, _, inner = text.partition("x")
    return int(out), int(inner)


if __name__ == "__main__":
    main()
