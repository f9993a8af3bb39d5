#!/usr/bin/env python
"""The server beside its own engine: the same requests as streams of the engine, in the server's process, and over
sockets from other processes.

Weights are random, in the shape of a published model; each of the vocabulary's tokens has a text. What the server costs
is the difference: time to the first token, between tokens, and of the processor.

    python scripts/bench_server.py --preset llama-3.1-8b --rate 4 --rate 8 --rate 16 --streams 32 --streams 128
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from llama_jax.config import preset
from llama_jax.generation.engine import Engine
from llama_jax.measure.bench import environment, random_model
from llama_jax.measure.serving import measured, serve_remote, warm
from llama_jax.measure.workloads import Work, renamed, workload
from llama_jax.plan.device_memory import claim_memory
from llama_jax.remote import Remote
from llama_jax.runtime import default_dtype, enable_compilation_cache, freeze_live_objects
from llama_jax.server.running import bound_socket, run
from llama_jax.server.settings import ServerSettings
from llama_jax.server.state import ServerState
from llama_jax.text.tokenizer.detokenizer import byte_alphabet
from llama_jax.text.tokenizer.loading import tokenizer_from_files
from llama_jax.text.tokenizer.tokenizer import Tokenizer

SHOWN = ("p50_ttft_ms", "p99_ttft_ms", "p50_itl_ms", "p95_itl_ms", "output_throughput")
TIMED = {"cpu_us": "", "loop_us": "MainThread", "engine_us": "llama_jax engine"}
"""Processor times of a token: of the server's process, and of its threads by name."""
SAMPLE_S = 0.002


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--mix", default="chat")
    parser.add_argument("--scale", type=float, default=1.0, help="of lengths, for small models")
    parser.add_argument("--rate", type=float, action="append", default=[], help="requests a second; may be repeated")
    parser.add_argument("--seconds", type=float, default=8.0, help="of arrivals at each rate")
    parser.add_argument("--streams", type=int, action="append", default=[], help="requests at once; may be repeated")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--processes", type=int, default=4, help="that requests are sent from")
    parser.add_argument("--idle", type=int, default=0, help="connections that are open and ask nothing")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--profile", metavar="RUN", help='one of them again, sampled, e.g. "128 streams"')
    parser.add_argument("--out", type=Path, help="a file for one JSON object")
    args = parser.parse_args()

    vocab = preset(args.preset).vocab_size
    runs = [(f"{count} streams", count, math.inf) for count in args.streams]
    runs += [(f"{rate:g}/s", max(1, round(args.seconds * rate)), rate) for rate in args.rate]
    works = {name: workload(args.mix, vocab, requests=count, rate=rate, scale=args.scale) for name, count, rate in runs}
    context = max(work.length for each in works.values() for work in each)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    options = (args.preset, args.rows, context)
    server = multiprocessing.get_context("spawn").Process(target=serving, args=(theirs, *options))
    server.start()
    theirs.close()
    about = ours.recv()
    print(json.dumps(about), flush=True)
    rows: list[dict[str, Any]] = []
    idle = [connection(about["url"]) for _ in range(args.idle)]
    turns = [(name, where) for _ in range(args.rounds) for name in works for where in ("engine", "server")]
    if args.profile:
        turns.append((args.profile, "profile"))
    for number, (name, where) in enumerate(turns):
        sent = renamed(works[name], 1 + number, vocab)  # nothing is found that was computed before
        try:
            found = one(ours, sent, where, about["url"], args.processes)
        except Exception as error:  # the other runs may succeed
            print(f"{name} {where}: {type(error).__name__}: {error}", flush=True)
            continue
        rows.append({"run": name, "through": where, **found})
        shown = " ".join(f"{key}={found[key]:.2f}" for key in (*SHOWN, *TIMED))
        print(f"{name:>12} {where:>7} {shown}", flush=True)
        if args.out:
            args.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    for each in idle:
        each.close()
    ours.send(None)
    server.join(60)
    server.kill()


def one(pipe: Connection, works: list[Work], where: str, url: str, processes: int) -> dict[str, Any]:
    """One run, with the microseconds of `TIMED` for each token."""

    def ask(what: Any) -> Any:
        pipe.send(what)
        return pipe.recv()

    ask("profile" if where == "profile" else "begin")
    try:
        if where == "engine":
            found = ask(works)
        else:
            found = serve_remote(Remote(url), "random", [works], {}, processes=processes)[0].summary
    finally:
        seconds, profile = ask("end")
    if found is None:
        raise RuntimeError("the engine has answered no request")
    each = {name: 1e6 * value / found["total_output_tokens"] for name, value in seconds.items()}
    return {**found, **each, "profile": profile}


def connection(url: str) -> socket.socket:
    """A connection that asks nothing."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)))


def serving(pipe: Connection, name: str, rows: int | None, context: int) -> None:
    """The process of the server. It says where it listens and runs what it is told to, until None."""
    claim_memory(os.environ, started=False)
    enable_compilation_cache()
    dtype = default_dtype()
    began = time.perf_counter()
    model = random_model(name, dtype)
    tokenizer = texts(model.config.vocab_size)
    engine = Engine(model, tokenizer, rows=rows, context=context)
    server = ServerState.of(engine, tokenizer, ("random",), ServerSettings(port=0))

    async def told(url: str) -> None:
        await warm(engine)
        freeze_live_objects()
        settings = dataclasses.asdict(engine.settings)
        pipe.send({**environment(dtype), "url": url, "ready_s": time.perf_counter() - began, "settings": settings})
        meter = Meter()
        while (what := await asyncio.to_thread(pipe.recv)) is not None:
            if what in ("begin", "profile"):
                meter.begin(profiled=what == "profile")
                pipe.send(None)
            elif what == "end":
                pipe.send(meter.end())
            else:
                try:
                    pipe.send(await measured(engine, what, {}))
                except Exception as error:
                    print(error, flush=True)
                    pipe.send(None)
        os.kill(os.getpid(), signal.SIGTERM)

    with bound_socket(server.settings) as listening:
        tasks = set[asyncio.Task[None]]()

        def ready() -> None:
            tasks.add(asyncio.get_running_loop().create_task(told(f"http://127.0.0.1:{listening.getsockname()[1]}")))

        asyncio.run(run(server, listening, ready=ready))


class Meter:
    """Seconds of the processor, and the functions in which the main thread was found."""

    def __init__(self) -> None:
        """Of this process, which has all threads of `TIMED`."""
        self._threads = {thread.name: thread.ident for thread in threading.enumerate()}
        self._on = False

    def begin(self, *, profiled: bool) -> None:
        """Start; only seconds unless the thread is profiled, which takes time itself."""
        self._began, self._found, self._on = self._seconds(), Counter[str](), True
        self._profiled = profiled
        if self._profiled:
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()

    def end(self) -> tuple[dict[str, float], dict[str, float]]:
        """Stop; seconds by `TIMED`, and the parts of samples, the most frequent first."""
        self._on = False
        if self._profiled:
            self._sampler.join()
        count = sum(self._found.values()) or 1
        seconds = {name: now - self._began[name] for name, now in self._seconds().items()}
        return seconds, {name: round(n / count, 4) for name, n in self._found.most_common(40)}

    def _seconds(self) -> dict[str, float]:
        def of(thread: str) -> float:
            if not thread:
                return time.process_time()
            return time.clock_gettime(time.pthread_getcpuclockid(self._threads[thread] or 0))

        return {name: of(thread) for name, thread in TIMED.items()}

    def _sample(self) -> None:
        while self._on:
            time.sleep(SAMPLE_S)
            if (frame := sys._current_frames().get(self._threads["MainThread"] or 0)) is not None:
                code = frame.f_code
                self._found[f"{Path(code.co_filename).name}:{code.co_qualname}"] += 1


def texts(size: int) -> Tokenizer:
    """A tokenizer with a text for each of `size` tokens."""
    letters = sorted(byte_alphabet())
    words = {letter: i for i, letter in enumerate(letters)}
    words |= {f"t{i}": i for i in range(len(words), size)}
    model: dict[str, Any] = {"type": "BPE", "vocab": words, "merges": [], "dropout": None, "unk_token": None}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    described: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    return tokenizer_from_files({"tokenizer.json": json.dumps(described)}, Path("random"))


if __name__ == "__main__":
    main()
