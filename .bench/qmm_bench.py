"""Products with quantised weights on a GPU: numerics, then times of kernels, of XLA and of bfloat16.

PYTHONPATH=<tree> python .bench/qmm_bench.py [plan]; JSON goes to $OUT/qmm.json.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp

from llama_jax.kernels.quantized_matmul import matrix, vector
from llama_jax.kernels.quantized_matmul.operands import Weight
from llama_jax.kernels.quantized_matmul.tiles import Tiles
from llama_jax.quantized import codes, layout_named
from llama_jax.kernels.quantized_matmul.reference import quantized_matmul_reference

BEGAN = time.time()
LIMIT = float(os.environ.get("QMM_LIMIT", "215"))
FLAG = {"xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True}
ROTATE = 160 << 20  # bytes of weights that are rotated over
BF16 = jnp.bfloat16
rows_out = []


def left():
    return LIMIT - (time.time() - BEGAN)


def members(name, out, inner, key):
    layout = layout_named(name)
    keys = jax.random.split(key, 3)
    n = inner if layout.group is None else inner // layout.group
    shape = (out,) if layout.group is None else (out, n)
    made = {}
    if layout.kind == "int4":
        made[name] = jax.random.bits(keys[0], (out, inner // 2), jnp.uint8)
    else:
        made[name] = jax.random.randint(keys[0], (out, inner), -127, 128, jnp.int8)
    made["scales"] = jax.random.uniform(keys[1], shape, jnp.float32, 0.5e-3, 2e-3).astype(layout.scale_dtype)
    if layout.offset == "min":
        made["minima"] = (-7.5 * made["scales"].astype(jnp.float32)).astype(layout.scale_dtype)
    if layout.offset == "zero":
        made["zeros"] = jax.random.randint(keys[2], shape, -8, 8, jnp.int8)
    return made


class Case:
    """Copies of one weight, enough to defeat the cache."""

    def __init__(self, name, out, inner):
        self.name, self.out, self.inner = name, out, inner
        self.layout = None if name == "bf16" else layout_named(name)
        make = jax.jit(partial(members, name, out, inner)) if self.layout else jax.jit(
            lambda key: {"weight": jax.random.normal(key, (out, inner), BF16) * 0.01})
        first = make(jax.random.key(0))
        self.bytes = sum(x.nbytes for x in first.values())
        copies = max(2, min(24, -(-ROTATE // self.bytes)))
        self.weights = [first] + [make(jax.random.key(i)) for i in range(1, copies)]

    def exact(self, x):
        return jnp.dot(x.astype(jnp.float32), codes.decode(self.layout, self.weights[0], jnp.float32).T, precision="highest")

    def program(self, f, rows):
        """A program that makes many calls, each on the next copy and behind the one before; every result is kept."""
        once = self.bytes / 3.5e12 + 2e-6
        calls = max(2, round(5e-3 / once / len(self.weights))) * len(self.weights)

        def many(x, weights):
            outs = []
            for i in range(calls):
                x, out = jax.lax.optimization_barrier((x, f(x, weights[i % len(weights)])))
                outs.append(out)
            return x, outs

        return many, calls


def timed(compiled, x, weights, calls, repeats=5):
    for _ in range(3):
        jax.block_until_ready(compiled(x, weights))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(compiled(x, weights))
        times.append((time.perf_counter() - began) / calls)
    return statistics.median(times) * 1e6


def kernel(tiles, layout, by_float32, x, w):
    if tiles.rows == 1:
        return vector.product(x, Weight.of(layout, w), tiles, BF16, interpret=False)
    return matrix.product(x, Weight.of(layout, w), tiles, BF16, by_float32=by_float32, interpret=False)


def plain(x, w):
    return jax.lax.dot_general(x, w["weight"], (((1,), (1,)), ((), ())), preferred_element_type=BF16)


def say(row):
    rows_out.append(row)
    us = f"{row['us']:8.2f} us {row['TB']:5.2f} TB/s" if "us" in row else row["failed"]
    print(f"{row['shape']:>13} {row['weight']:13} rows {row['rows']:3} {row['how']:34} {us}"
          + (f" error {row['error']:.1e}" if "error" in row else ""), flush=True)


def run(case, rows, jobs):
    """jobs: (label, function, compiler options)."""
    x = jax.random.normal(jax.random.key(7), (rows, case.inner), BF16)
    base = {"shape": f"{case.out}x{case.inner}", "weight": case.name, "rows": rows}
    exact = None

    def build(job):
        label, f, options, check = job
        try:
            many, calls = case.program(f, rows)
            compiled = jax.jit(many, compiler_options=options).lower(x, case.weights).compile()
            one = jax.jit(f, compiler_options=options).lower(x, case.weights[0]).compile() if check else None
            return compiled, one, calls
        except Exception as error:
            return str(error).splitlines()[0][:150] if str(error) else repr(error)

    serial = [j for j in jobs if not j[3]]
    others = [j for j in jobs if j[3]]
    built = {j[0]: build(j) for j in serial}
    with ThreadPoolExecutor(14) as pool:
        built |= dict(zip([j[0] for j in others], pool.map(build, others)))
    for label, f, options, check in jobs:
        row = base | {"how": label}
        try:
            if isinstance(built[label], str):
                raise RuntimeError(built[label])
            compiled, one, calls = built[label]
            if check:
                exact = case.exact(x) if exact is None else exact
                found = one(x, case.weights[0]).astype(jnp.float32)
                row["error"] = float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))
                if not row["error"] < 1e-2:
                    raise RuntimeError(f"error {row['error']}")
            row["us"] = timed(compiled, x, case.weights, calls)
            row["TB"] = case.bytes / row["us"] / 1e6
        except Exception as error:
            row["failed"] = str(error)[:150]
            row.pop("us", None)
        say(row)


def short(t):
    return f"r{t.rows} c{t.cols} i{t.inner} s{t.splits} w{t.num_warps} n{t.num_stages}"


def kernel_jobs(case, tiles, wide=()):
    jobs = [(short(t), partial(kernel, t, case.layout, False), None, True) for t in dict.fromkeys(tiles)]
    return jobs + [(short(t) + " f32", partial(kernel, t, case.layout, True), None, True) for t in dict.fromkeys(wide)]


def xla_jobs(case, flags):
    f = lambda x, w: quantized_matmul_reference(x, w, layout=case.layout, dtype=BF16)  # noqa: E731
    return [("xla, flag" if flag else "xla", f, FLAG if flag else None, False) for flag in flags]


def vectors(full=True):
    some = [(4, 4, 1), (4, 2, 2), (2, 4, 1), (8, 4, 1)]
    more = [(4, 4, 2), (2, 2, 2), (2, 8, 1), (4, 8, 1), (8, 2, 2), (4, 2, 1)]
    return [Tiles(1, cols, 512 * warps, 1, warps, n) for cols, warps, n in some + more * full]


def matrices(case, rows, splits, full=True):
    layout = case.layout
    inner = 128 if layout.kind == "int8" else 64
    inner = inner if layout.group is None else min(inner, layout.group // layout.per_byte)
    if rows <= 16:
        found = [(64, 4, 3), (64, 2, 3), (32, 2, 4)]
        more = [(64, 4, 4), (64, 2, 4), (32, 2, 3), (128, 4, 3), (32, 1, 4), (128, 4, 4)]
        tile = 16
    else:
        found = [(64, 4, 3), (128, 4, 3), (128, 8, 3)]
        more = [(64, 4, 4), (64, 2, 3), (64, 8, 3), (128, 8, 4)]
        tile = rows
    out = [Tiles(tile, c, inner, s, w, n) for s in splits for c, w, n in found + more * full]
    if full and layout.kind == "int8":
        out += [Tiles(tile, 32, 256, splits[0], 2, 3), Tiles(tile, 64, 256, splits[0], 4, 3)]
    if full and rows > 32:
        out += [Tiles(32, 64, inner, splits[0], 4, 3), Tiles(32, 128, inner, splits[0], 4, 3)]
    return out


def main():
    print(jax.devices()[0].device_kind, jax.__version__, flush=True)
    for shape, splits, full in [((28672, 4096), (1, 2), True), ((4096, 14336), (4, 8), True), ((4096, 4096), (4,), False), ((6144, 4096), (2, 4), False)]:
        bf16 = Case("bf16", *shape)
        for rows in (1, 16, 64):
            run(bf16, rows, [("bf16", plain, None, False)])
        del bf16
        for name in ("int4_g128", "int8") + (("int4_g64_min",) if shape[0] == 28672 else ()):
            case = Case(name, *shape)
            few = not full or name == "int4_g64_min"
            flags = [True] if name != "int8" else [False]
            for rows in (1, 16, 64):
                if left() < 20:
                    break
                if rows == 1:
                    jobs = kernel_jobs(case, vectors(not few))
                else:
                    found = matrices(case, rows, splits, not few)
                    jobs = kernel_jobs(case, found, found[:3] if name == "int8" and rows == 16 else ())
                run(case, rows, xla_jobs(case, flags) + jobs)
            del case
            print(f"# {time.time() - BEGAN:.0f} s", flush=True)
    if left() > 15:
        case = Case("int8", 128256, 4096)
        run(case, 1, xla_jobs(case, [False]) + kernel_jobs(case, vectors(False)))
        if left() > 10:
            run(case, 16, xla_jobs(case, [False]) + kernel_jobs(case, matrices(case, 16, (1,), False)))


main()
if "OUT" in os.environ:
    with open(os.path.join(os.environ["OUT"], "qmm.json"), "w") as file:
        json.dump({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows_out}, file)
print(f"# {time.time() - BEGAN:.0f} s", flush=True)
