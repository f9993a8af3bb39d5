#!/usr/bin/env python
"""Attention on one GPU: our kernels beside XLA, JAX's own Pallas kernels and cuDNN, as shares of what the card can do.

Needs jax alone, on an AMD or NVIDIA GPU. For each case and backend: first fresh random inputs against float32 sums for
some of the queries; then the time of a call, the median of several programs that each make many calls in a row. The
ceilings are measured in the same run: a large matrix product (prefill is bound by it) and reading a large array
(decoding is bound by that).

    python scripts/bench_attention.py --json attention.json
    python scripts/bench_attention.py --cases prefill --backward
    python scripts/bench_attention.py --cases llama-3.1-8b-b4-t4096 --backends pallas_triton --sweep 40
    python scripts/bench_attention.py --shape 4,4096,4096,32,8,128 --shape 8,1,4096,32,8,128,16

A shape is batch, queries and slots of a row, query heads, key/value heads, head_dim and, with pages, their size.
Backends are those of the operations, and "stock": mha (keys and values repeated for each query head beforehand) and gqa
of jax.experimental.pallas.ops.gpu.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.errors import KernelError
from llama_jax.kernels.attention import attention, attention_reference
from llama_jax.kernels.attention.decode import MAX_QUERIES
from llama_jax.kernels.attention.decode import shapes as decode_shapes
from llama_jax.kernels.attention.flash import pallas_triton, shapes
from llama_jax.kernels.attention.reference import Visibility
from llama_jax.kernels.precision import matmul_precision
from llama_jax.targets import current

Case = shapes.Case | decode_shapes.Case
ERROR_LIMIT = 2.0
"""Largest relative error, in units of the dtype's epsilon."""
CHECKED_QUERIES = 64
PREFILL, DECODE = shapes.MEASURED_PREFILL, decode_shapes.MEASURED


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["prefill", "decode"], help="prefill, decode, or names")
    parser.add_argument("--shape", action="append", type=parse_shape, default=[], help="a case of your own")
    parser.add_argument("--backends", nargs="+", default=["reference", "stock", "cudnn", "pallas_triton"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--backward", action="store_true", help="also time output and gradients, of the prefill cases")
    parser.add_argument(
        "--sweep", type=int, default=0, metavar="N", help="also time N other tiles of each prefill case"
    )
    parser.add_argument("--calls", type=int, help="calls in a program; by default as many as take about 20 ms")
    parser.add_argument("--repeats", type=int, default=7, help="programs that are timed")
    parser.add_argument("--ceiling-size", type=int, default=8192, help="side of the matrices that the rates come from")
    parser.add_argument("--json", type=Path, dest="out", help="write the numbers to this file")
    args = parser.parse_args(argv)

    rate, bandwidth = ceilings(jnp.dtype(args.dtype), args.ceiling_size, args.repeats)
    device = jax.devices()[0]
    about = {"device": device.device_kind, "jax": jax.__version__, "flops_per_s": rate, "read_bytes_per_s": bandwidth}
    print(f"{device.device_kind}, jax {jax.__version__}: {rate / 1e12:.0f} TFLOP/s, reads {bandwidth / 1e12:.2f} TB/s")
    rows = []
    for case in args.shape or chosen(args.cases):
        for row in measure(replace(case, dtype=args.dtype), args, rate, bandwidth):
            rows.append(row)
            print(line(row), flush=True)
    if args.out:
        args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    return rows


def parse_shape(text: str) -> Case:
    """A case from batch,q_len,kv_len,q_heads,kv_heads,head_dim[,page_size]."""
    numbers = [int(x) for x in text.split(",")]
    if len(numbers) not in (6, 7):
        raise argparse.ArgumentTypeError("six or seven numbers: batch,q_len,kv_len,q_heads,kv_heads,head_dim,page_size")
    batch, q_len, kv_len, q_heads, kv_heads, head_dim, page_size = (*numbers, 0)[:7]
    sizes = (batch, q_len, kv_len, q_heads, kv_heads, head_dim)
    if q_len <= MAX_QUERIES:
        return decode_shapes.Case(text, *sizes, page_size=page_size)
    return shapes.Case(text, *sizes, page_size=page_size, in_order=q_len == kv_len and not page_size)


def chosen(names: Sequence[str]) -> list[Case]:
    """The measured cases of these names.

    Raises:
      SystemExit: there is no case of a name.
    """
    known: dict[str, list[Case]] = {"prefill": list(PREFILL), "decode": list(DECODE)}
    known |= {case.name: [case] for case in known["prefill"] + known["decode"]}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"no case is called {unknown[0]}; known: {', '.join(known)}")
    return [case for name in names for case in known[name]]


def measure(case: Case, args: argparse.Namespace, rate: float, bandwidth: float) -> Iterator[dict[str, Any]]:
    """A row for each backend, and for each tile of a sweep."""
    arrays = case.example(jax.random.key(time.time_ns() % 2**32))
    expected, index = sampled(case, arrays)
    flops = case.flops() if isinstance(case, shapes.Case) else 0
    floor = max(flops / rate, case.bytes() / bandwidth)
    calls = args.calls or max(4, math.ceil(0.02 / max(floor, 1e-5)))

    def row(backend: str, call: Callable[..., jax.Array], more: dict[str, Any], *, backward: bool) -> dict[str, Any]:
        result = {"case": case.name, "dtype": case.dtype, "backend": backend, "backward": backward} | more
        work = flops + (case.flops(backward=True) if backward and isinstance(case, shapes.Case) else 0)
        try:
            out = jnp.take(jax.jit(call)(**arrays), index, axis=1).astype(jnp.float32)
            error = float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))
            if not error <= ERROR_LIMIT * float(jnp.finfo(case.dtype).eps):
                return result | {"failed": f"relative error {error:.2e}"}
            many = jax.jit(gradients(call, calls) if backward else outputs(call, calls))
            once = seconds(many, arrays, repeats=args.repeats) / calls
        except (KernelError, NotImplementedError, RuntimeError, ValueError) as problem:
            return result | {"failed": str(problem).splitlines()[0][:200]}
        rates = {"TFLOP_per_s": work / once / 1e12} if work else {"TB_per_s": case.bytes() / once / 1e12}
        share = (work / rate if work else case.bytes() / bandwidth) / once
        return result | {"relative_error": error, "us": once * 1e6, "share_of_ceiling": share} | rates

    prefill = isinstance(case, shapes.Case)
    for backend in args.backends:
        call = stock(case) if backend == "stock" else partial(attention, **case.options(), backend=backend)
        if call is None or (backend == "reference" and logits_bytes(case) > memory() // 4):
            continue
        yield row(backend, call, {}, backward=False)
        if args.backward and prefill:
            yield row(backend, call, {}, backward=True)
    for backend in args.backends if prefill else ():
        if backend in ("pallas_triton", "pallas_interpret"):
            for tiles in itertools.islice(sweep(case), args.sweep):
                run = partial(pallas_triton.run, **case.options(), tiles=tiles, interpret=backend == "pallas_interpret")
                yield row(backend, run, {"tiles": vars(tiles)}, backward=False)


def sweep(case: Case) -> Iterator[pallas_triton.Tiles]:
    """Tiles of the forward kernel whose operands fit into local memory, those nearest to the default first."""
    target = current()
    group = case.q_heads // case.kv_heads
    best = pallas_triton.default_tiles(target, head_dim=case.head_dim, dtype=case.dtype, q_len=case.q_len, group=group)
    stages = (1, 2) if target.vendor == "amd" else (1, 2, 3, 4)
    grid = itertools.product((32, 64, 128, 256), (16, 32, 64, 128), (4, 8, 16), stages)

    def distance(sizes: tuple[int, ...]) -> float:
        mine = (best.block_q, best.block_k, best.num_warps, best.num_stages)
        return sum(abs(math.log2(a / b)) for a, b in zip(sizes, mine, strict=True))

    for block_q, block_k, num_warps, num_stages in sorted(grid, key=distance):
        row = case.head_dim * jnp.dtype(case.dtype).itemsize
        fits = (block_q + 2 * block_k * num_stages) * row <= (target.lds_bytes or math.inf)
        if fits and best.heads <= block_q <= 32 * num_warps * 2 and num_warps * target.wave_size <= 1024:
            yield replace(best, block_q=block_q, block_k=block_k, num_warps=num_warps, num_stages=num_stages)


def sampled(case: Case, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Exact outputs for some of the queries, and which ones."""
    count = min(case.q_len, CHECKED_QUERIES)
    index = jnp.sort(jax.random.permutation(jax.random.key(time.time_ns() % 2**32), case.q_len)[:count])

    @jax.jit
    def exact(arrays: dict[str, jax.Array]) -> jax.Array:
        few = {name: jnp.take(x, index, axis=1) for name, x in arrays.items() if name.startswith("q")}
        wide: dict[str, Any] = {
            name: x.astype(jnp.float32) for name, x in (arrays | few).items() if x.dtype.kind != "i"
        }
        return attention_reference(**(arrays | few | wide), **case.options())

    return exact(arrays), index


def stock(case: Case) -> Callable[..., jax.Array] | None:
    """JAX's own Pallas kernel for a case, if there is one."""
    if case.page_size or case.visibility != Visibility() or case.soft_cap or case.sinks:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.attention import mha
        from jax.experimental.pallas.ops.gpu.decode_attention import gqa
    scale, group = case.head_dim**-0.5, case.q_heads // case.kv_heads

    def prefill(q: jax.Array, k: jax.Array, v: jax.Array, **positions: jax.Array) -> jax.Array:
        k, v = (jnp.repeat(jnp.swapaxes(x, 1, 2), group, axis=2) for x in (k, v))
        return mha(q, k, v, None, scale, True)

    def decode(q: jax.Array, k: jax.Array, v: jax.Array, **positions: jax.Array) -> jax.Array:
        return gqa(q[:, 0], jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), sm_scale=scale)[:, None]

    if case.q_len == 1:
        return decode
    return prefill if case.q_len == case.kv_len else None


def outputs(call: Callable[..., jax.Array], calls: int) -> Callable[..., jax.Array]:
    """Calls in a row: each one's output is the next one's queries. What depends on k and v alone, XLA does once."""

    def many(arrays: dict[str, jax.Array]) -> jax.Array:
        return jax.lax.fori_loop(0, calls, lambda i, q: call(**(arrays | {"q": q})).astype(q.dtype), arrays["q"])

    return many


def gradients(call: Callable[..., jax.Array], calls: int) -> Callable[..., Any]:
    """Outputs and gradients one after another: gradients are the next arguments."""

    def many(arrays: dict[str, jax.Array]) -> Any:
        def step(i: jax.Array, moved: dict[str, jax.Array]) -> dict[str, jax.Array]:
            out, pull = jax.vjp(lambda moved: call(**(arrays | moved)), moved)
            return pull(out)[0]

        return jax.lax.fori_loop(0, calls, step, {name: arrays[name] for name in "qkv"})

    return many


def logits_bytes(case: Case) -> int:
    """What the reference needs, logits and weights in float32."""
    return 8 * case.batch * case.q_heads * case.q_len * case.kv_len


def memory() -> int:
    """Bytes of the device's memory that JAX may use."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", 16 << 30)


def ceilings(dtype: Any, size: int, repeats: int) -> tuple[float, float]:
    """Operations a second of a large matrix product, and bytes a second of reading a large array."""
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    big = jnp.ones((16, size, size), dtype)
    multiply = partial(jnp.matmul, precision=matmul_precision(dtype))

    @jax.jit
    def product(a: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 8, lambda i, b: multiply(a, b) * jnp.asarray(size**-0.5, dtype), a)

    @jax.jit  # each sum takes another number off, so that no two passes are the same
    def read(big: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 8, lambda i, total: total + jnp.max(big - total.astype(big.dtype)), jnp.float32(0))

    return 16 * size**3 / seconds(product, a, repeats=repeats), 8 * big.nbytes / seconds(read, big, repeats=repeats)


def seconds(f: Callable[..., Any], *args: Any, repeats: int) -> float:
    """Median time of a program, once it is compiled."""
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    sizes = [row["tiles"][name] for name in ("block_q", "block_k", "num_warps", "num_stages")] if "tiles" in row else []
    name = " ".join([row["backend"], *(["backward"] if row["backward"] else []), "/".join(map(str, sizes))])
    if "failed" in row:
        return f"{row['case']:32} {name:32} {row['failed']}"
    unit = "TFLOP" if "TFLOP_per_s" in row else "TB"
    speed = f"{row[unit + '_per_s']:8.2f} {unit}/s {row['share_of_ceiling']:5.0%}"
    return f"{row['case']:32} {name:32} {row['us']:10.1f} us {speed}  error {row['relative_error']:.1e}"


if __name__ == "__main__":
    main()
