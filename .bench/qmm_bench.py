"""Products with quantised weights on a GPU: numerics, then times of kernels, of XLA and of bfloat16.

PYTHONPATH=<tree> python .bench/qmm_bench.py; JSON goes to $OUT/qmm.json. QMM_LIMIT: seconds after which it stops.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import jax
import jax.numpy as jnp

from llama_jax.kernels.quantized_matmul import pallas_triton
from llama_jax.kernels.quantized_matmul.reference import quantized_matmul_reference
from llama_jax.kernels.quantized_matmul.shapes import ProductShape, layout_of
from llama_jax.kernels.quantized_matmul.tiles import Tiles, default_tiles
from llama_jax.quantized import codes
from llama_jax.targets import current

BEGAN = time.time()
LIMIT = float(os.environ.get("QMM_LIMIT", "85"))
FLAG = {"xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True}
ROTATE = int(os.environ.get("QMM_ROTATE", str(130 << 20)))  # bytes of weights that a turn of the loop reads
TURNS = int(os.environ.get("QMM_TURNS", "25"))
BF16 = jnp.bfloat16
S1, S2, S3, S4, HEAD = (28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096), (128256, 4096)
found = []


@cache
def weights(name, size):
    """Copies of one weight, enough to defeat the cache."""
    if name == "bf16":
        make = jax.jit(lambda key: {"weight": jax.random.normal(key, size, BF16) * 0.01})
    else:
        make = jax.jit(ProductShape(name, 1, *size).members)
    first = make(jax.random.key(0))
    nbytes = sum(x.nbytes for x in first.values())
    copies = max(3, min(16, -(-ROTATE // nbytes)))
    return nbytes, [first] + [make(jax.random.key(i)) for i in range(1, copies)]


@cache
def example(name, rows, size):
    x = jax.random.normal(jax.random.key(7), (rows, size[1]), BF16)
    if name == "bf16":
        return x, None
    weight = codes.decode(layout_of(name), weights(name, size)[1][0], jnp.float32)
    return x, jnp.dot(x.astype(jnp.float32), weight.T, precision="highest")


def call(how, name, tiles, x, w):
    if how == "bf16":
        return jax.lax.dot_general(x, w["weight"], (((1,), (1,)), ((), ())), preferred_element_type=BF16)
    if how == "kernel":
        return pallas_triton.run(x, w, layout=layout_of(name), tiles=tiles)
    return quantized_matmul_reference(x, w, layout=layout_of(name))


def many(f, out, x, weights):
    """Each call is on the next copy, behind the one before it; all results leave the loop, so that none is dead."""

    def turn(_, state):
        x, outs = state
        made = []
        for w in weights:
            x, y = jax.lax.optimization_barrier((x, f(x, w)))
            made.append(y)
        return x, made

    return jax.lax.fori_loop(0, TURNS, turn, (x, [jnp.zeros((x.shape[0], out), BF16) for _ in weights]))[1]


def build(job):
    name, size, rows, how, tiles = job
    try:
        x, _ = example(name, rows, size)
        options = FLAG if how == "xla flag" else None
        f = partial(many, partial(call, how, name, tiles), size[0])
        return jax.jit(f, compiler_options=options).lower(x, weights(name, size)[1]).compile()
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"


def measure(job, compiled):
    name, size, rows, how, tiles = job
    label = how if tiles is None else f"r{tiles.rows} c{tiles.cols} i{tiles.inner} s{tiles.splits} w{tiles.num_warps} n{tiles.num_stages}"
    row = {"shape": f"{size[0]}x{size[1]}", "weight": name, "rows": rows, "how": label}
    text = ""
    if isinstance(compiled, str):
        row["failed"] = text = compiled
    else:
        x, exact = example(name, rows, size)
        nbytes, copies = weights(name, size)
        y = jax.block_until_ready(compiled(x, copies))
        if exact is not None:
            row["error"] = float(jnp.linalg.norm(y[0].astype(jnp.float32) - exact) / jnp.linalg.norm(exact))
        times = []
        for _ in range(5):
            began = time.perf_counter()
            jax.block_until_ready(compiled(x, copies))
            times.append((time.perf_counter() - began) / (TURNS * len(copies)))
        row["us"] = statistics.median(times) * 1e6
        row["TB"] = nbytes / row["us"] / 1e6
        text = f"{row['us']:8.2f} us {row['TB']:5.2f} TB/s {len(copies)} copies" + (f" error {row['error']:.1e}" if exact is not None else "")
    found.append(row)
    print(f"{row['shape']:>12} {name:13} rows {rows:2} {label:24} {text}", flush=True)


def default(name, size, rows):
    layout = layout_of(name)
    return default_tiles(current(), rows=rows, out=size[0], row_bytes=size[1] // layout.per_byte, layout=layout)


def jobs():
    T = Tiles
    for name, i in (("int4_g128", 64), ("int8", 128)):
        yield name, S1, 1, "kernel", default(name, S1, 1)
        yield name, S1, 16, "kernel", default(name, S1, 16)
        yield name, S2, 1, "kernel", default(name, S2, 1)
        yield name, S4, 1, "kernel", default(name, S4, 1)
        yield name, S3, 1, "kernel", default(name, S3, 1)
        for c, s, w, n in ((64, 1, 2, 4), (64, 4, 2, 3), (32, 2, 2, 4), (32, 4, 2, 3), (64, 2, 2, 4), (128, 4, 4, 3)):
            yield name, S1, 1, "kernel", T(16, c, i, s, w, n)
        for c, s, w, n in ((64, 8, 2, 3), (32, 8, 2, 4), (32, 16, 2, 3), (64, 16, 2, 4)):
            yield name, S2, 1, "kernel", T(16, c, i, s, w, n)
        for c, s, w, n in ((64, 4, 2, 3), (32, 4, 2, 3), (32, 8, 2, 3), (32, 2, 2, 4)):
            yield name, S4, 1, "kernel", T(16, c, i, s, w, n)
        for c, s, w, n in ((64, 4, 2, 3), (32, 4, 2, 3)):
            yield name, S3, 1, "kernel", T(16, c, i, s, w, n)
        for size in (S2, S4, S3):
            yield name, size, 16, "kernel", default(name, size, 16)
        for size in (S1, S2, S4):
            yield name, size, 64, "kernel", default(name, size, 64)
        for c, s, w, n in ((64, 1, 4, 3), (128, 1, 8, 3), (64, 2, 4, 3)):
            yield name, S1, 64, "kernel", T(64, c, i, s, w, n)
        yield name, S1, 32, "kernel", default(name, S1, 32)
        yield name, S1, 32, "kernel", T(32, 64, i, 1, 4, 3)
    for tiles in (default("int8", HEAD, 1), T(16, 32, 128, 1, 2, 4), T(16, 64, 128, 1, 2, 4)):
        yield "int8", HEAD, 1, "kernel", tiles
    yield "int8", HEAD, 16, "kernel", default("int8", HEAD, 16)
    for rows in (1, 16):
        yield "int4_g64_min", S1, rows, "kernel", default("int4_g64_min", S1, rows)
    yield "int4_g64_min", S1, 1, "kernel", T(16, 64, 32, 2, 4, 3)


def baselines():
    for size in (S1, S2):
        for rows in (1, 16, 64):
            yield "bf16", size, rows, "bf16", None
            yield "int8", size, rows, "xla", None
            yield "int4_g128", size, rows, "xla flag", None
    for size in (S4, S3):
        yield "int8", size, 1, "xla", None
        yield "int4_g128", size, 1, "xla flag", None
    yield "int8", HEAD, 1, "xla", None
    yield "int4_g64_min", S1, 1, "xla flag", None


def save():
    if "OUT" in os.environ:
        with open(os.path.join(os.environ["OUT"], "qmm.json"), "w") as file:
            json.dump({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": found}, file)


def main():
    print(jax.devices()[0].device_kind, jax.__version__, flush=True)
    listed = list(dict.fromkeys(jobs()))
    for name, size, rows, *_ in listed:
        example(name, rows, size)
    print(f"# {time.time() - BEGAN:.0f} s, {len(listed)} kernels", flush=True)
    pool = ThreadPoolExecutor(13)
    compiling = [(job, pool.submit(build, job)) for job in listed]
    for job, future in compiling:
        if time.time() - BEGAN > LIMIT:
            break
        measure(job, future.result())
    pool.shutdown(wait=False, cancel_futures=True)
    save()
    print(f"# {time.time() - BEGAN:.0f} s", flush=True)
    for job in baselines():
        if time.time() - BEGAN > LIMIT:
            break
        measure(job, build(job))
        save()
    print(f"# {time.time() - BEGAN:.0f} s", flush=True)
    os._exit(0)


main()
