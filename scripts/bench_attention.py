#!/usr/bin/env python
"""Attention on one GPU: our kernels beside XLA, JAX's own Pallas kernels and cuDNN, as shares of what the card can do.

Needs an AMD or NVIDIA GPU, and with --peers also torch. For each case and backend: first fresh random inputs
against float32 sums for some of the queries; then the time of a call, the median of several programs that each make
many calls in a row. The ceilings are measured in the same run as `llama-jax bench` measures them: a large matrix
product, and reading a large array. A call's share is that of whichever bounds it.

    python scripts/bench_attention.py --json attention.json
    python scripts/bench_attention.py --cases prefill decode floors --peers --json docs/measured/h100-attention.json
    python scripts/bench_attention.py --cases prefill --backward
    python scripts/bench_attention.py --cases llama-3.1-8b-b4-t4096 --backends pallas_triton --sweep 40
    python scripts/bench_attention.py --shape 4,4096,4096,32,8,128 --shape 8,1,4096,32,8,128,16

A shape is batch, queries and slots of a row, query heads, key/value heads, head_dim and, with pages, their size.
Backends are those of the operations; "stock": mha (keys and values repeated for each query head beforehand) and gqa
of jax.experimental.pallas.ops.gpu; and PyTorch's (`scripts/bench_attention_torch.py`), for full visibility without
pages. A backend that has no such call is left out.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import bench_attention_torch as peers
import jax
import jax.numpy as jnp
from bench_shared import UNTUNED, ceilings, seconds, write

from llama_jax.kernels.attention import attention, attention_reference
from llama_jax.kernels.attention.cases import arguments
from llama_jax.kernels.attention.decode import MAX_QUERIES
from llama_jax.kernels.attention.flash import pallas_triton
from llama_jax.kernels.attention.records import Visibility
from llama_jax.kernels.attention.shapes import (
    DECODES,
    MEASURED_DECODES,
    MEASURED_PREFILLS,
    PREFILLS,
    AttentionShape,
)
from llama_jax.kernels.registry import operation
from llama_jax.measure.bench import Ceilings
from llama_jax.targets import current

ERROR_LIMIT = {"bfloat16": 2.0, "float16": 2.0, "float32": 16.0}
"""Largest relative error, in units of the dtype's epsilon; in float32 the sums round as much as the results."""
CHECKED_QUERIES = 64
LAYERS = 8
"""Calls of decode attention in one step, as a model has layers: what positions alone decide is found once for all."""
FLOORS = (*PREFILLS, *DECODES)
"""The cases of the tables in docs/kernels.md."""
OPERATIONS = ("flash_attention", "decode_attention")


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["prefill", "decode"], help="prefill, decode, floors, or names")
    parser.add_argument("--shape", action="append", type=parse_shape, default=[], help="a case of your own")
    parser.add_argument("--backends", nargs="+", default=["reference", "stock", "cudnn", "pallas_triton"])
    parser.add_argument("--peers", action="store_true", help=f"also {', '.join(peers.BACKENDS)}")
    parser.add_argument("--torch-python", default=sys.executable, help="the interpreter that has torch, if another one")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="by default that of the case")
    parser.add_argument("--backward", action="store_true", help="also time gradients, where training wants them")
    parser.add_argument(
        "--sweep", type=int, default=0, metavar="N", help="also time N other tiles of each prefill case"
    )
    parser.add_argument("--calls", type=int, help="calls in a program; by default as many as take about 20 ms")
    parser.add_argument("--repeats", type=int, default=7, help="programs that are timed")
    parser.add_argument("--ceiling-size", type=int, help="side of the matrices that the rates come from")
    parser.add_argument("--json", type=Path, dest="out", help="write the numbers to this file, after each row")
    args = parser.parse_args(argv)
    args.backends = list(dict.fromkeys([*args.backends, *(peers.BACKENDS if args.peers else ())]))

    cases = [replace(case, dtype=args.dtype or case.dtype) for case in args.shape or chosen(args.cases)]
    theirs = measure_torch(cases, args)  # before JAX takes most of the memory
    torch = next((found["torch"] for _, _, found in itertools.chain(*theirs) if "torch" in found), None)
    rows: list[dict[str, Any]] = []
    known: dict[str, Ceilings] = {}
    for case, measured in zip(cases, theirs, strict=True):
        known[case.dtype] = ceilings(case.dtype, args.ceiling_size)
        for backend, backward, found in itertools.chain(measure(case, args, known[case.dtype]), measured):
            rows.append(row(case, backend, found, known[case.dtype], backward=backward))
            print(line(rows[-1]), flush=True)
            write(args.out, rows, known, torch=torch)
    return rows


def parse_shape(text: str) -> AttentionShape:
    """A case from batch,q_len,kv_len,q_heads,kv_heads,head_dim[,page_size]."""
    numbers = [int(x) for x in text.split(",")]
    if len(numbers) not in (6, 7):
        raise argparse.ArgumentTypeError("six or seven numbers: batch,q_len,kv_len,q_heads,kv_heads,head_dim,page_size")
    batch, q_len, kv_len, q_heads, kv_heads, head_dim, page_size = (*numbers, 0)[:7]
    dense = q_len > MAX_QUERIES and not page_size
    return AttentionShape(
        text,
        *(batch, q_len, kv_len, q_heads, kv_heads, head_dim),
        page_size=page_size,
        in_order=dense and q_len == kv_len,
        backward=dense,
    )


def chosen(names: Sequence[str]) -> list[AttentionShape]:
    """The cases of these names, each once. A few prefills and decode steps share a name.

    Raises:
      SystemExit: there is no case of a name.
    """
    known = {"prefill": list(MEASURED_PREFILLS), "decode": list(MEASURED_DECODES), "floors": list(FLOORS)}
    for case in dict.fromkeys(itertools.chain(*known.values())):
        known.setdefault(case.name, []).append(case)
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"no case is called {unknown[0]}; known: {', '.join(known)}")
    return list(dict.fromkeys(case for name in names for case in known[name]))


Found = tuple[str, bool, dict[str, Any]]
"""A backend; whether gradients are in it; what came out: "relative_error" and "seconds" of a call, or "failed"."""


def measure_torch(cases: Sequence[AttentionShape], args: argparse.Namespace) -> list[list[Found]]:
    """Times of PyTorch for each case, by those of its backends that were asked for."""
    options = {"calls": args.calls, "repeats": args.repeats, "checked": CHECKED_QUERIES}
    found: list[list[Found]] = [[] for _ in cases]
    for backend in peers.BACKENDS:
        if backend not in args.backends:
            continue
        asked = [
            (i, backward)
            for i, case in enumerate(cases)
            if torch_has(backend, case)
            for backward in (False, True)
            if not backward or (args.backward and case.backward)
        ]
        requests = [
            {name: getattr(cases[i], name) for name in peers.SIZES} | {"backward": backward} for i, backward in asked
        ]
        results = peers.results(backend, requests, args.torch_python, **options)
        for (i, backward), result in zip(asked, results, strict=True):
            found[i].append((backend, backward, result))
    return found


def torch_has(backend: str, case: AttentionShape) -> bool:
    """Whether a backend of PyTorch can be asked for a case: without a mask the first query is at the first slot."""
    return is_plain(case) and (backend == peers.FLEX or case.q_len in (1, case.kv_len))


def called(run: Callable[..., jax.Array], case: AttentionShape) -> Callable[..., jax.Array]:
    """An implementation of attention as a function of a case's arrays by name."""
    return lambda **arrays: run(**arguments(**arrays, **case.options()))


def is_plain(case: AttentionShape) -> bool:
    """Whether causal order is all that there is to a case."""
    plain = case.visibility == Visibility() and not (case.soft_cap or case.sinks or case.segments)
    return plain and not (case.page_size or case.scheme)


def measure(case: AttentionShape, args: argparse.Namespace, limits: Ceilings) -> Iterator[Found]:
    """Times of JAX for a case, by each backend, and by each tile of a sweep."""
    arrays = case.example(jax.random.key(time.time_ns() % 2**32))
    expected, index = sampled(case, arrays)
    layers = 1 if is_prefill(case) else LAYERS
    calls = args.calls or max(4, math.ceil(0.02 / max(floor_seconds(case, limits), 1e-5)))
    calls = layers * math.ceil(calls / layers)

    def timed(call: Callable[..., jax.Array], *, backward: bool) -> dict[str, Any]:
        try:
            out = jnp.take(jax.jit(call)(**arrays), index, axis=1).astype(jnp.float32)
            error = float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))
            if not right(error, case):
                return {"relative_error": error}
            many = jax.jit(gradients(call, calls) if backward else outputs(call, calls, layers))
            return {"relative_error": error, "seconds": seconds(many, arrays, repeats=args.repeats) / calls}
        except Exception as problem:  # of whatever kind: it is this backend's result, and the others go on
            return {"failed": next(iter(str(problem).splitlines()), type(problem).__name__)[:200]}

    mine, other = (operation(name).all_backends() for name in OPERATIONS[:: 1 if is_prefill(case) else -1])
    for backend in args.backends:
        if backend in peers.BACKENDS or (backend in other and backend not in mine):
            continue
        call = stock(case) if backend == "stock" else called(partial(attention, backend=backend), case)
        if call is None or (backend == "reference" and logits_bytes(case) > memory() // 4):
            continue
        yield backend, False, timed(call, backward=False)
        if args.backward and case.backward:
            yield backend, True, timed(call, backward=True)
    for backend in args.backends if is_prefill(case) else ():
        if backend in ("pallas_triton", "pallas_interpret"):
            for tiles in itertools.islice(sweep(case), args.sweep):
                kernels = partial(pallas_triton.run, tiles=tiles, interpret=backend == "pallas_interpret")
                run = called(kernels, case)
                yield backend, False, {"tiles": vars(tiles)} | timed(run, backward=False)


def is_prefill(case: AttentionShape) -> bool:
    return case.q_len > MAX_QUERIES


def right(error: float, case: AttentionShape) -> bool:
    """Whether an error is one of rounding; NaN is not."""
    return error <= ERROR_LIMIT[case.dtype] * float(jnp.finfo(case.dtype).eps)


def operations(case: AttentionShape, *, backward: bool = False) -> int:
    """Floating point operations of a call; 0 for a decode step, which they do not bound."""
    if not is_prefill(case):
        return 0
    return case.flops() + (case.flops(backward=True) if backward else 0)


def floor_seconds(case: AttentionShape, limits: Ceilings, *, backward: bool = False) -> float:
    """The least time of a call: computing or reading, whichever is longer."""
    computing = operations(case, backward=backward) / limits.matmul_flops_per_s
    return max(computing, case.bytes() / limits.read_bytes_per_s)


def row(
    case: AttentionShape, backend: str, found: dict[str, Any], limits: Ceilings, *, backward: bool
) -> dict[str, Any]:
    """The line and the entry of one measurement."""
    name = OPERATIONS[0 if is_prefill(case) else 1]
    result: dict[str, Any] = {"operation": name, "case": case.name, "dtype": case.dtype}
    result |= {"backend": backend, "backward": backward}
    result |= {name: found[name] for name in ("tiles", "timing") if name in found}
    if "failed" in found:
        return result | {"failed": found["failed"]}
    if not right(found["relative_error"], case):
        return result | {"failed": f"relative error {found['relative_error']:.2e}"}
    once = found["seconds"]
    work = operations(case, backward=backward)
    rates = {"TFLOP_per_s": work / once / 1e12} if work else {"TB_per_s": case.bytes() / once / 1e12}
    share = floor_seconds(case, limits, backward=backward) / once
    return result | {
        "relative_error": found["relative_error"],
        "us": once * 1e6,
        "share_of_ceiling": share,
        **rates,
    }


def sweep(case: AttentionShape) -> Iterator[pallas_triton.Tiles]:
    """Tiles of the forward kernel whose operands fit into local memory, those nearest to the default first."""
    target = current()
    group = case.q_heads // case.kv_heads
    sizes = {"head_dim": case.head_dim, "q_len": case.q_len, "kv_len": case.kv_len}
    best = pallas_triton.default_tiles(target, dtype=case.dtype, group=group, **sizes)
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


def sampled(case: AttentionShape, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Exact outputs for some of the queries, and which ones."""
    count = min(case.q_len, CHECKED_QUERIES)
    index = jnp.sort(jax.random.permutation(jax.random.key(time.time_ns() % 2**32), case.q_len)[:count])

    @partial(jax.jit, compiler_options=UNTUNED)
    def exact(arrays: dict[str, jax.Array]) -> jax.Array:
        few = {name: jnp.take(x, index, axis=1) for name, x in arrays.items() if name.startswith("q")}
        wide: dict[str, Any] = {
            name: x.astype(jnp.float32) for name, x in (arrays | few).items() if x.dtype.kind != "i"
        }
        return called(attention_reference, case)(**(arrays | few | wide))

    return exact(arrays), index


def stock(case: AttentionShape) -> Callable[..., jax.Array] | None:
    """JAX's own Pallas kernel for a case, if there is one."""
    if not is_plain(case):
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


def outputs(call: Callable[..., jax.Array], calls: int, layers: int) -> Callable[..., jax.Array]:
    """Calls in a row, each one's output the next one's queries.

    What depends on k and v alone, XLA does once; what depends on positions alone, once for `layers` calls.
    """

    def step(i: jax.Array, q: jax.Array, arrays: dict[str, jax.Array]) -> jax.Array:
        for _ in range(layers):
            q = call(**(arrays | {"q": q})).astype(q.dtype)
        return q

    def many(arrays: dict[str, jax.Array]) -> jax.Array:
        return jax.lax.fori_loop(0, calls // layers, partial(step, arrays=arrays), arrays["q"])

    return many


def gradients(call: Callable[..., jax.Array], calls: int) -> Callable[..., Any]:
    """Outputs and gradients one after another: gradients are the next arguments."""

    def many(arrays: dict[str, jax.Array]) -> Any:
        def step(i: jax.Array, moved: dict[str, jax.Array]) -> dict[str, jax.Array]:
            out, pull = jax.vjp(lambda moved: call(**(arrays | moved)), moved)
            return pull(out)[0]

        return jax.lax.fori_loop(0, calls, step, {name: arrays[name] for name in "qkv"})

    return many


def logits_bytes(case: AttentionShape) -> int:
    """Bytes that the reference needs: logits and weights in float32."""
    return 8 * case.batch * case.q_heads * case.q_len * case.kv_len


def memory() -> int:
    """Bytes of the device's memory that JAX may use."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", 16 << 30)


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    sizes = [row["tiles"][name] for name in ("block_q", "block_k", "num_warps", "num_stages")] if "tiles" in row else []
    name = " ".join([row["backend"], *(["backward"] if row["backward"] else []), "/".join(map(str, sizes))])
    if "failed" in row:
        return f"{row['case']:32} {name:32} {row['failed']}"
    unit = "TFLOP" if "TFLOP_per_s" in row else "TB"
    speed = f"{row[unit + '_per_s']:8.2f} {unit}/s {row['share_of_ceiling']:5.0%}"
    note = ", started call by call" if row.get("timing") == peers.CALL_BY_CALL else ""
    return f"{row['case']:32} {name:32} {row['us']:10.1f} us {speed}  error {row['relative_error']:.1e}{note}"


if __name__ == "__main__":
    main()
