#!/usr/bin/env python
"""Speed of llama_jax beside Hugging Face transformers: same weights, same prompts, float32, one machine, on the CPU.

Each round starts one process for either side in turn (A B A B ...), so that neither has the other's threads or memory
beside it and a slow spell of the machine meets both. A process warms up, then times for every batch size

    prefill   a greedy generation of 1 token
    decode    a greedy generation of --new tokens, less the one of 1 token
    forward   one pass over the prompt that returns the logits of every token

Figures are medians over rounds of each process's medians. Transformers runs as it comes: `generate` with its default
(dynamic) cache, no torch.compile.

    python scripts/bench_transformers.py --json bench.json
    python scripts/bench_transformers.py --hf-python other/venv/bin/python --rounds 3
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

OURS, THEIRS = "llama_jax", "transformers"
TIMES = ("prefill", "decode", "forward")


class Side(Protocol):
    """One of the two libraries with the model loaded."""

    vocab_size: int

    def generate(self, prompts: list[list[int]], n: int) -> list[list[int]]:
        """Exactly n greedy tokens after each prompt (all of one length)."""
        ...

    def forward(self, prompts: list[list[int]]) -> None:
        """Logits of every token; returns when they are computed."""
        ...

    def about(self) -> dict[str, Any]:
        """Versions, threads and device."""
        ...


class Ours:
    """llama_jax through its public functions."""

    def __init__(self, model: str):
        import jax
        import numpy as np

        import llama_jax

        self._model, _ = llama_jax.load(model, dtype="float32")
        self.vocab_size = self._model.config.vocab_size
        self._batch_generate, self._array = llama_jax.batch_generate, np.asarray
        self._forward = jax.jit(llama_jax.forward, static_argnames=("config",))

    def generate(self, prompts: list[list[int]], n: int) -> list[list[int]]:
        outputs = self._batch_generate(self._model, None, prompts, max_tokens=n, ignore_eos=True)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def forward(self, prompts: list[list[int]]) -> None:
        logits, _ = self._forward(self._model.params, self._model.config, self._array(prompts, "int32"))
        logits.block_until_ready()

    def about(self) -> dict[str, Any]:
        import jax

        return {
            "device": jax.devices()[0].device_kind,
            "dtype": str(self._model.dtype),
            "threads": len(os.sched_getaffinity(0)),  # XLA takes one for every processor that it may use
            "versions": {
                "llama_jax": importlib.metadata.version("llama-jax"),
                "jax": jax.__version__,
                "jaxlib": importlib.metadata.version("jaxlib"),
                "python": platform.python_version(),
            },
        }


class Theirs:
    """Hugging Face transformers with torch."""

    def __init__(self, model: str):
        # By name, since the environment of the project has neither.
        torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
        self._torch, path = torch, Path(model)
        where: dict[str, Any] = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        folder = path.parent if where else path
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where).eval()
        self.vocab_size = int(self._model.config.vocab_size)

    def generate(self, prompts: list[list[int]], n: int) -> list[list[int]]:
        ids = self._torch.tensor(prompts)
        out = self._model.generate(
            ids,
            attention_mask=self._torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=n,
            max_new_tokens=n,
            pad_token_id=0,
        )
        found: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return found

    def forward(self, prompts: list[list[int]]) -> None:
        with self._torch.inference_mode():
            self._model(self._torch.tensor(prompts))

    def about(self) -> dict[str, Any]:
        return {
            "device": "cpu",
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "threads": self._torch.get_num_threads(),
            "attention": getattr(self._model.config, "_attn_implementation", None),
            "versions": {
                "transformers": importlib.metadata.version("transformers"),
                "torch": str(self._torch.__version__),
                "python": platform.python_version(),
            },
        }


def measure(side: Side, request: dict[str, Any]) -> dict[str, Any]:
    """All times of one process.

    Args:
      request: batches, prompt, new, repeats, seed.

    Returns:
      "about", and for every batch size the median seconds of TIMES and the tokens of the last generation.
    """
    results = {}
    for batch in request["batches"]:
        seconds: dict[str, list[float]] = {"first": [], "whole": [], "forward": []}
        tokens: list[list[int]] = []
        for run in range(request["repeats"] + 1):
            # Fresh prompts for every run, the same for both sides.
            rng = random.Random(f"{request['seed']} {batch} {run}")
            prompts = [[rng.randrange(side.vocab_size) for _ in range(request["prompt"])] for _ in range(batch)]
            first, _ = timed(side.generate, prompts, 1)
            whole, tokens = timed(side.generate, prompts, request["new"])
            forward, _ = timed(side.forward, prompts)
            if run:  # the first one compiles and warms up
                for name, value in (("first", first), ("whole", whole), ("forward", forward)):
                    seconds[name].append(value)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        results[str(batch)] = {
            "prefill": median["first"],
            "decode": median["whole"] - median["first"],
            "forward": median["forward"],
            "tokens": tokens,
        }
    return {"about": side.about(), "batches": results}


def timed[**P, T](f: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[float, T]:
    """Seconds that a call takes, and its result."""
    start = time.perf_counter()
    result = f(*args, **kwargs)
    return time.perf_counter() - start, result


def run_child(python: str, side: str, request: dict[str, Any]) -> dict[str, Any]:
    """Runs this file as one side in a process of its own, which prints to stderr only."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
        }
        command = [python, __file__, "--child", side, "--request", json.dumps(request), "--answer", str(answer)]
        done = subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
        if done.returncode or not answer.exists():
            raise SystemExit(f"the process of {side} failed with exit code {done.returncode}: {python}")
        result: dict[str, Any] = json.loads(answer.read_text())
        return result


def summarise(rounds: Sequence[dict[str, Any]], request: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens per second of both sides and their ratio (above 1: llama_jax is faster), for every batch size."""
    rows = []
    for batch in request["batches"]:
        work = {"prefill": request["prompt"], "decode": request["new"] - 1, "forward": request["prompt"]}

        def rates(side: str, name: str, batch: int = batch, work: dict[str, int] = work) -> list[float]:
            return [batch * work[name] / r[side]["batches"][str(batch)][name] for r in rounds]

        row: dict[str, Any] = {"batch": batch, "prompt": request["prompt"], "new": request["new"]}
        for side in (OURS, THEIRS):
            row[side] = {f"{name}_tps": statistics.median(rates(side, name)) for name in TIMES}
        # Of neighbours in time, so that a slow spell of the machine does not pass for a difference.
        each = {name: [a / b for a, b in zip(rates(OURS, name), rates(THEIRS, name), strict=True)] for name in TIMES}
        row["ratio"] = {name: statistics.median(values) for name, values in each.items()}
        row["ratio_range"] = {name: [min(values), max(values)] for name, values in each.items()}
        pairs = [
            (a, b)
            for r in rounds
            for ours, theirs in zip(*(r[side]["batches"][str(batch)]["tokens"] for side in (OURS, THEIRS)), strict=True)
            for a, b in zip(ours, theirs, strict=True)
        ]
        row["equal_tokens"] = sum(a == b for a, b in pairs) / len(pairs)
        rows.append(row)
    return rows


def show(report: dict[str, Any]) -> None:
    """The report as text."""
    print(f"{report['processor']}, {report['cpus']} processors, load {report['load'][0]:.2f} at the start")
    for side in (OURS, THEIRS):
        about = dict(report["about"][side])
        versions = " ".join(f"{name} {version}" for name, version in about.pop("versions").items())
        print(f"{side}: {versions}; " + ", ".join(f"{name} {value}" for name, value in about.items()))
    settings = report["settings"]
    print(
        f"prompt {settings['prompt']}, {settings['new']} new tokens, median of {report['rounds']} rounds "
        f"of {settings['repeats']} runs; tokens per second\n"
    )
    print(f"{'batch':>5}  {'':8} {OURS:>13} {THEIRS:>13} {'ratio':>7}  range of rounds")
    for row in report["results"]:
        for name in TIMES:
            low, high = row["ratio_range"][name]
            ours, theirs = row[OURS][f"{name}_tps"], row[THEIRS][f"{name}_tps"]
            ratio = row["ratio"][name]
            print(f"{row['batch']:>5}  {name:8} {ours:>13.1f} {theirs:>13.1f} {ratio:>6.2f}x  {low:.2f} to {high:.2f}")
        print(f"{row['batch']:>5}  greedy tokens that are equal: {row['equal_tokens']:.1%}")


def default_gguf() -> str:
    """The GGUF file of the default model."""
    from llama_jax.library import bundled, cache_dir

    found = bundled.find(cache_dir())
    if found is None:
        raise SystemExit("the default model is not on this machine; run any llama-jax command once, or give --model")
    return str(found)


def child(args: argparse.Namespace) -> None:
    """One side: measures, and writes the answer as JSON."""
    request = json.loads(args.request)
    side: Side = Ours(request["ours"]) if args.child == OURS else Theirs(request["theirs"])
    Path(args.answer).write_text(json.dumps(measure(side, request)))


def main() -> None:
    """Runs the rounds and prints the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="GGUF file or Hugging Face folder (default: the default model)")
    parser.add_argument("--hf-python", default=sys.executable, help="Python with torch and transformers (group hf)")
    parser.add_argument("--batch", type=int, action="append", help="batch size, may be repeated (default: 1 and 8)")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens of each row (default: %(default)s)")
    parser.add_argument("--new", type=int, default=64, help="new tokens of each row (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each side (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs in each process (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report, all rounds included, here")
    for internal in ("--child", "--request", "--answer"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    batches = args.batch or [1, 8]
    if args.new < 2 or min(args.rounds, args.repeats, args.prompt, *batches) < 1:
        parser.error("--new must be at least 2, all other numbers at least 1")

    from llama_jax.library import DEFAULT_MODEL
    from llama_jax.targets import hardware

    request = {
        "ours": args.model or DEFAULT_MODEL,
        "theirs": args.model or default_gguf(),
        "batches": batches,
        "prompt": args.prompt,
        "new": args.new,
        "repeats": args.repeats,
    }
    load, rounds = os.getloadavg(), []
    for index in range(args.rounds):
        seeded = {**request, "seed": args.seed + index}
        done = {}
        for side, python in ((OURS, sys.executable), (THEIRS, args.hf_python)):
            print(f"round {index + 1} of {args.rounds}: {side}", file=sys.stderr)
            done[side] = run_child(python, side, seeded)
        rounds.append(done)
    cpu = hardware.cpu()
    report = {
        "model": Path(str(request["theirs"])).name,
        "processor": cpu.name,
        "cpus": cpu.cores,
        "load": load,
        "settings": {name: request[name] for name in ("batches", "prompt", "new", "repeats")},
        "rounds": args.rounds,
        "about": {side: rounds[0][side]["about"] for side in (OURS, THEIRS)},
        "results": summarise(rounds, request),
        "seconds": [
            {
                side: {b: {name: times[name] for name in TIMES} for b, times in r[side]["batches"].items()}
                for side in (OURS, THEIRS)
            }
            for r in rounds
        ],
    }
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
