"""The cost of adapters in slots for a decode step: random weights of a preset, every row with one of several adapters.

    python scripts/bench_adapters.py --model llama-3.1-8b --rows 64 --adapters 8 --rank 16

Prints a table: the step without adapters, with slots of q_proj and v_proj, and with slots of every projection, each
beside the floor of what it reads more. The step is the engine's, in its loop of many steps.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.cache import DenseCache
from llama_jax.decode import loop
from llama_jax.measure.bench import measure_ceilings, random_model
from llama_jax.model.adapters import empty_slots
from llama_jax.model.loaded import Model
from llama_jax.params import Params, flatten, unflatten
from llama_jax.sampling import SamplingParams, make_sampler


def filled(slots: Params) -> Params:
    """Slots with random adapters in all of them."""

    def noise(index: int, name: str, x: jax.Array) -> jax.Array:
        if name.endswith(".scale"):
            return jnp.full_like(x, 2.0)
        return (0.02 * jax.random.normal(jax.random.key(index), x.shape, jnp.float32)).astype(x.dtype)

    return unflatten({name: noise(i, name, x) for i, (name, x) in enumerate(flatten(slots).items())})


def step_s(model: Model, slots: Params | None, ids: np.ndarray, context: int, steps: int, repeats: int) -> float:
    """Seconds of one decode step: the least of several dispatches."""
    config, rows = model.config, len(ids)
    wanted = SamplingParams(temperature=0.0, ignore_eos=True)
    profile, sampler = make_sampler([wanted] * rows, [()] * rows, config.vocab_size)
    cache = DenseCache.create(config, rows, context, model.dtype)
    logits, limits = jnp.zeros((rows, config.vocab_size)), np.full(rows, 1 << 30, np.int32)
    state, _ = loop.begin(logits, cache, sampler, np.ones(rows, np.int32), limits, ids, profile=profile)
    times = []
    for _ in range(repeats + 1):  # the first compiles
        began = time.perf_counter()
        state, progress = loop.advance(
            model.params, state, np.int32(steps), config=config, profile=profile, stride=steps, adapters=slots
        )
        jax.block_until_ready(progress)
        times.append((time.perf_counter() - began) / steps)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", help="a preset")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=64, help="of a dispatch; all of them have to fit the context")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    model = random_model(args.model, args.dtype)
    read = measure_ceilings(args.dtype).read_bytes_per_s
    ids = (np.arange(args.rows) % args.adapters + 1).astype(np.int32)
    sizes = args.context, args.steps, args.repeats
    plain = step_s(model, None, ids, *sizes)
    print(f"{jax.devices()[0].device_kind}, {args.model}, {args.dtype}, {args.rows} rows, rank {args.rank}")
    print(f"{'no adapters':38s} {plain * 1e3:8.3f} ms")
    for label, targets in (("q_proj and v_proj", ("q_proj", "v_proj")), ("every projection", None)):
        slots = filled(
            empty_slots(model.config, slots=args.adapters + 1, rank=args.rank, targets=targets, dtype=model.dtype)
        )
        seconds = step_s(model, slots, ids, *sizes)
        floor = sum(x.nbytes for x in jax.tree.leaves(slots)) / read
        more = f"{seconds / plain - 1:+7.1%}, {(seconds - plain) * 1e3:.3f} ms more; reading them {floor * 1e3:.3f} ms"
        print(f"{f'{args.adapters} adapters of {label}':38s} {seconds * 1e3:8.3f} ms {more}", flush=True)


if __name__ == "__main__":
    main()
