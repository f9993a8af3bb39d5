#!/usr/bin/env python
"""Whether an engine with `batch_invariant` keeps its word on this device, and one without it beside that.

Random requests with prefixes in common run in random company, with a cold and a warm prefix cache, and each alone in
the same engine: tokens and log-probabilities must be equal to the bit. Weights are random, in the shape of a published
model.

    python scripts/check_batch_invariant.py --preset llama-3.2-1b --batches 8
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import llama_jax as lj
from llama_jax.measure.bench import random_model
from llama_jax.plan.device_memory import claim_memory
from llama_jax.runtime import default_dtype

LONGEST = 4096
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0},
    {"temperature": 0.0, "repetition_penalty": 1.3},
)

Asked = tuple[list[int], lj.SamplingParams]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-3.2-1b")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--size", type=int, default=24, help="requests of a batch")
    parser.add_argument("--rows", type=int, default=16)
    args = parser.parse_args()
    claim_memory(os.environ, started=False)
    model = random_model(args.preset, default_dtype())
    options: dict[str, Any] = {"rows": args.rows, "context": LONGEST + 512, "steps": 4}
    for wanted in (True, False):
        llm = lj.LLM(model, None, ahead=True, batch_invariant=wanted, **options)
        check(llm, args.batches, args.size, "batch_invariant" if wanted else "without")
        del llm


def check(llm: lj.LLM, batches: int, size: int, name: str) -> None:
    """Prints how many requests got something else than alone."""
    requests = different = flipped = 0
    worst = 0.0
    start = time.perf_counter()
    for seed in range(batches):
        asked = some_requests(np.random.default_rng(seed), llm.model.config.vocab_size, size)
        runs = [answers(llm, asked) for _ in range(2)]  # cold, warm
        alone = [answers(llm, [each])[0] for each in asked]
        for run in runs:
            for found, expected in zip(run, alone, strict=True):
                requests += 1
                different += found != expected
                for one, other in zip(found, expected, strict=True):
                    if one[0] != other[0]:  # behind it are two different texts
                        flipped += 1
                        break
                    worst = max(worst, abs(one[1] - other[1]))
    seconds = time.perf_counter() - start
    hits = llm.snapshot().counts.prefix_hit_tokens
    print(
        f"{name}: {requests} requests in company, {different} differ in a bit, {flipped} in a token, "
        f"log-probabilities of equal tokens by {worst:.4f} at most; {hits} tokens found in the cache; {seconds:.1f} s",
        flush=True,
    )


def answers(llm: lj.LLM, asked: Sequence[Asked]) -> list[list[tuple[int, float]]]:
    """The tokens of each request, with their log-probabilities."""
    outputs = llm.generate([prompt for prompt, _ in asked], [params for _, params in asked])
    return [[(found.token_id, found.logprob) for found in output.outputs[0].logprobs or ()] for output in outputs]


def some_requests(rng: np.random.Generator, vocab: int, size: int) -> list[Asked]:
    shared = rng.integers(10, vocab, LONGEST)
    asked = []
    for _ in range(size):
        head = shared[: int(rng.choice([0, 0, 100, 256, 700, 1024, LONGEST - 400]))].tolist()
        prompt = head + rng.integers(10, vocab, int(rng.integers(1, 300))).tolist()
        kind = KINDS[int(rng.integers(len(KINDS)))]
        params = lj.SamplingParams(
            seed=int(rng.integers(1000)), logprobs=1, max_tokens=int(rng.integers(8, 48)), ignore_eos=True, **kind
        )
        asked.append((prompt, params))
    return asked


if __name__ == "__main__":
    main()
