#!/usr/bin/env python
"""The gain of a draft model, by how often it is right.

Models of published shapes with random weights hardly ever agree. Here both are made to: attention and MLP of each block
add zero, and the head says which token follows which, so that the draft model is right for a share of the tokens that
is known. Each step still reads every weight, and takes the time that it takes with a trained model.

    python scripts/bench_draft_model.py --preset llama-3.1-8b --draft llama-3.2-1b --drafts 4
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_shared import write

import llama_jax as lj
from llama_jax.measure.bench import Ceilings, measure_ceilings, random_model
from llama_jax.model.loaded import Model
from llama_jax.plan.device_memory import claim_memory
from llama_jax.runtime import default_dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-3.1-8b")
    parser.add_argument("--draft", default="llama-3.2-1b")
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--right", type=float, nargs="*", default=[0.0, 0.6, 0.8, 1.0], help="shares of tokens")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--new", type=int, default=400)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    claim_memory(os.environ, started=False)
    dtype = default_dtype()
    shape = random_model(args.preset, dtype)
    vocab = shape.config.vocab_size
    follows = np.random.default_rng(0).permutation(vocab)
    model, small = chained(shape, follows), random_model(args.draft, dtype)
    ceilings: dict[str, Ceilings] = {str(jnp.dtype(dtype)): measure_ceilings(dtype)}
    rows: list[dict[str, Any]] = []
    options: dict[str, Any] = {"rows": 8, "context": args.context, "pages": 8 * -(-args.context // 64), "page_size": 64}
    for right in [None, *args.right]:
        drafting: dict[str, Any] = {}
        if right is not None:
            drafting = {"draft": chained(small, mistaken(follows, right)), "drafts": args.drafts}
        llm = lj.LLM(model, None, ahead=True, **options, **drafting)
        for count in args.rows:
            found = measured(llm, count, args.new, args.repeats)
            rows.append({"right": right, "rows": count, **found})
            print("  ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
            write(args.out, rows, ceilings, preset=args.preset, draft=args.draft, drafts=str(args.drafts))
        del llm


def chained(model: Model, follows: np.ndarray) -> Model:
    """A model of the same shape after whose token t comes token `follows[t]`, int [vocab]."""
    params = dict(model.params)
    params["layers"] = {
        number: layer | {"attn": _without(layer["attn"], "o_proj"), "mlp": _without(layer["mlp"], "down_proj")}
        for number, layer in params["layers"].items()
    }
    before = np.argsort(follows)
    params["lm_head"] = {"weight": params["embed"]["weight"][jnp.asarray(before)]}
    return dataclasses.replace(model, params=params, config=model.config.replace(tie_word_embeddings=False))


def _without(block: dict[str, Any], projection: str) -> dict[str, Any]:
    return block | {projection: jax.tree.map(jnp.zeros_like, block[projection])}


def mistaken(follows: np.ndarray, right: float) -> np.ndarray:
    """The same with a share of the tokens followed by others."""
    rng, wrong = np.random.default_rng(1), follows.copy()
    some = rng.permutation(len(follows))[: round((1 - right) * len(follows))]
    wrong[some] = np.roll(follows[some], 1)
    return wrong


def measured(llm: lj.LLM, count: int, new: int, repeats: int) -> dict[str, Any]:
    """Tokens a second of `count` rows, and what became of the drafts; after one run that nobody times."""
    rng = np.random.default_rng(2)
    seconds = []
    before = llm.snapshot()
    for run in range(repeats + 1):
        prompts = rng.integers(10, llm.model.config.vocab_size, (count, 16)).tolist()
        start = time.perf_counter()
        outputs = llm.generate(prompts, temperature=0.0, max_tokens=new, ignore_eos=True)
        if run:
            seconds.append(time.perf_counter() - start)
        else:
            before = llm.snapshot()
        assert all(len(output.outputs[0].token_ids) == new for output in outputs)
    after = llm.snapshot()
    middle = statistics.median(seconds)
    drafted, accepted = after.drafted_tokens - before.drafted_tokens, after.accepted_tokens - before.accepted_tokens
    return {
        "tokens_per_second": round(count * new / middle, 1),
        "ms_per_token": round(middle / new * 1e3, 3),
        "drafted": drafted,
        "accepted": accepted,
        "spread": round((max(seconds) - min(seconds)) / middle, 3),
    }


if __name__ == "__main__":
    main()
