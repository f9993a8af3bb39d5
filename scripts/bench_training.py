#!/usr/bin/env python
"""Steps of training on one GPU, or on several (`--mesh`): tokens a second, MFU, and memory against the estimate.

Random weights of a preset's shape; rows of random tokens, packed with texts of many lengths (log-normal, median 512) or
one text each. The first step compiles and is left out; the rest are dispatched one after the other and timed together.
MFU: FLOPs that a step needs (`llama_jax.training.costs.step_flops`: what remat computes again counts nothing, frozen
weights have no gradient) over the rate of a large matrix product, measured in the same run.

    python scripts/bench_training.py --preset llama-3.2-1b --method full --rows 8 --length 4096
    python scripts/bench_training.py --preset llama-3.1-8b --method lora --rows 4 --length 4096 --rows-of both --torch
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_shared import ceilings

from llama_jax.adapters import LoraConfig, new_adapter
from llama_jax.config import LlamaConfig, preset
from llama_jax.kernels.dispatch import using
from llama_jax.kernels.registry import parse_backends
from llama_jax.layout import param_sharding
from llama_jax.measure.profiling import profile
from llama_jax.params import init_leaf, param_specs, unflatten
from llama_jax.plan.costs import held_bytes
from llama_jax.training import (
    Optimizer,
    full,
    initial_state,
    low_rank,
    make_step,
    step_flops,
    step_memory,
    training_mesh,
)
from llama_jax.training.packing import Rows, Text
from llama_jax.training.placement import kept, place_batch


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, help="fewer layers, to try it")
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--parts", type=int, default=1, help="that the rows are computed in")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rows-of", choices=("texts", "one", "both"), default="texts", help="one: a text fills a row")
    parser.add_argument("--remat", default="products")
    parser.add_argument("--logits", type=int, default=2**28)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mesh", help="e.g. fsdp=2")
    parser.add_argument("--kernels", default="", help="OP=BACKEND,...")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ceiling-size", type=int)
    parser.add_argument("--profile", action="store_true", help="print the kernels that take longest")
    parser.add_argument("--torch", action="store_true", help="the same in PyTorch (scripts/bench_training_torch.py)")
    parser.add_argument("--json", type=Path, dest="out")
    args = parser.parse_args(argv)

    config = preset(args.preset).replace(max_position_embeddings=1 << 17)
    if args.layers:
        config = config.replace(layers=config.layers[: args.layers])
    beside = run_torch(config, args) if args.torch else None  # before jax takes the device's memory
    limits = ceilings(args.dtype, args.ceiling_size)
    with using(**parse_backends(args.kernels, "--kernels")):
        for line in itertools.chain(
            [] if beside is None else [beside], measure(config, args, limits.matmul_flops_per_s)
        ):
            print(json.dumps(line), flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")


def run_torch(config: LlamaConfig, args: argparse.Namespace) -> dict[str, Any] | None:
    """The results of PyTorch for the same shapes and rows of one text each; None if it fails."""
    names = ("preset", "method", "rank", "rows", "length", "steps")
    fields = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "num_layers")
    sizes = {name: getattr(args, name) for name in names} | {name: getattr(config, name) for name in fields}
    sizes |= {"mlp": config.layers[0].mlp, "tied": config.tie_word_embeddings}
    script = Path(__file__).with_name("bench_training_torch.py")
    done = subprocess.run(
        [sys.executable, script], input=json.dumps(sizes), text=True, stdout=subprocess.PIPE, check=False
    )
    print(done.stdout, flush=True)
    return None if done.returncode else json.loads(done.stdout.splitlines()[-1])


def measure(config: LlamaConfig, args: argparse.Namespace, rate: float) -> Iterator[dict[str, Any]]:
    """Times one program, with rows of each kind that is asked for."""
    dtype = jnp.dtype(args.dtype)
    mesh = None if args.mesh is None else training_mesh(args.mesh)
    params = random_params(config, jnp.dtype("float32") if args.method == "full" else dtype, mesh)
    if args.method == "full":
        combine, trained, frozen = full(config, dtype), params, None
        learned, kept_bytes = None, 0
    else:
        lora = LoraConfig(rank=args.rank, alpha=2 * args.rank, target_modules="all-linear")
        combine, frozen = low_rank(config), params
        trained = new_adapter(params, config, lora, jax.random.key(1))
        learned = sum(x.size for x in jax.tree.leaves(trained))
        kept_bytes = held_bytes(config, dtype.itemsize)
    transformation = Optimizer(learning_rate=1e-5).transformation(100)
    state = initial_state(trained, transformation, mesh=mesh)
    count = sum(x.size for x in jax.tree.leaves(trained))
    del trained, params
    step = make_step(combine, transformation, state, mesh=mesh, remat=args.remat, logits=args.logits)
    devices = 1 if mesh is None else mesh.size
    estimate = step_memory(
        config,
        rows=args.rows // args.parts,
        length=args.length,
        trained=count,
        frozen=kept_bytes,
        itemsize=dtype.itemsize,
        remat=args.remat,
        logits=args.logits,
        mesh=mesh,
    )
    for packed in {"texts": (True,), "one": (False,), "both": (True, False)}[args.rows_of]:
        batches = [random_rows(config, args, packed).batch(i) for i in range(4)]
        if args.rows_of == "both":  # of one number each, which keeps the program the same
            batches = [(dataclasses.replace(b, segments=b.segments + 1), lengths) for b, lengths in batches]
        placed = [place_batch(batch, args.parts, mesh) for batch, _ in batches]
        began = time.perf_counter()
        state, metrics = step(state, frozen, placed[0])
        first = float(metrics["loss"])
        compiled_s = time.perf_counter() - began
        print(f"first step {compiled_s:.1f} s", flush=True)
        state, metrics = step(state, frozen, placed[1])
        float(metrics["loss"])
        began = time.perf_counter()
        for i in range(args.steps):
            state, metrics = step(state, frozen, placed[i % 4])
        last = float(metrics["loss"])
        seconds = (time.perf_counter() - began) / args.steps
        flops = float(np.mean([step_flops(config, batches[i % 4][1], learned) for i in range(args.steps)]))
        tokens = float(np.mean([sum(batches[i % 4][1]) for i in range(args.steps)]))
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        yield (
            {
                "preset": args.preset,
                "layers": config.num_layers,
                "method": args.method,
                "rows": args.rows,
                "parts": args.parts,
                "length": args.length,
                "packed": packed,
                "remat": args.remat,
                "kernels": args.kernels,
                "mesh": args.mesh,
                "step_s": round(seconds, 5),
                "tokens_per_s": round(tokens / seconds),
                "mfu": round(flops / seconds / rate / devices, 4),
                "tflop": round(flops / 1e12, 2),
                "peak_gb": round(peak / 1e9, 2),
                "estimate_gb": round(estimate.total / 1e9, 2),
                "matmul_tflops": round(rate / 1e12, 1),
                "compile_s": round(compiled_s, 1),
                "first_loss": first,
                "last_loss": last,
            }
        )
    if args.profile:
        for program in profile(lambda: jax.block_until_ready(step(state, frozen, placed[0]))):
            print(f"{program.program}: busy {program.busy_s * 1e3:.1f} ms of {program.span_s * 1e3:.1f}")
            print({kind: f"{s * 1e3:.1f} ms" for kind, s in program.by_kind().items()})
            for kernel in program.kernels[:25]:
                print(f"  {kernel.seconds * 1e3:8.2f} ms {kernel.calls:5d} {kernel.name[:110]}")


def random_params(config: LlamaConfig, dtype: Any, mesh: Any) -> Any:
    """Random weights, made where training keeps them."""
    place = None if mesh is None else param_sharding(config, kept(mesh))
    makers: dict[Any, Any] = {}
    flat = {}
    for i, spec in enumerate(param_specs(config)):
        where = None if place is None else place(spec)
        kind = (spec.shape, spec.init, where)
        if kind not in makers:
            makers[kind] = jax.jit(lambda key, spec=spec: init_leaf(spec, key, dtype), out_shardings=where)
        flat[spec.name] = makers[kind](jax.random.fold_in(jax.random.key(0), i))
    return unflatten(flat)


def random_rows(config: LlamaConfig, args: argparse.Namespace, packed: bool) -> Rows:
    rng = np.random.default_rng(0)
    if not packed:
        lengths = np.full(args.rows * 4, args.length)
    else:
        lengths = np.clip(rng.lognormal(np.log(512), 1.0, args.rows * 64), 16, args.length).astype(int)
    texts = [Text(rng.integers(0, config.vocab_size, n).astype(np.int32), np.ones(n, bool)) for n in lengths.tolist()]
    return Rows(texts, length=args.length, rows=args.rows)


if __name__ == "__main__":
    main()
