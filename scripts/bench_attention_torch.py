"""Attention by PyTorch, for `scripts/bench_attention.py`, which starts this in a process of its own.

In a process of its own, since JAX keeps most of the card's memory for itself, and so does torch. The process needs
torch alone, not jax: it reads a request as JSON from its standard input, and prints a line of JSON for each case.

torch_flash, torch_cudnn: `scaled_dot_product_attention`, held to FLASH_ATTENTION or CUDNN_ATTENTION.
torch_flex: `flex_attention` under `torch.compile`, with a causal block mask; for decoding, over the whole cache.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SDPA = {"torch_flash": "FLASH_ATTENTION", "torch_cudnn": "CUDNN_ATTENTION"}
FLEX = "torch_flex"
BACKENDS = (*SDPA, FLEX)
SIZES = ("batch", "q_len", "kv_len", "q_heads", "kv_heads", "head_dim", "dtype")
"""Fields of a case that the process is told, besides "backward"."""
CALL_BY_CALL, GRAPH = "call by call", "CUDA graph"
RESULT = "result: "
"""Begins the lines that are results: libraries may print lines of their own."""
PROGRAM_S = 0.02
"""Seconds that many calls in a row should take."""
CALLS = range(4, 1001)
WARM_UP = 5


# --- In the process that asks -----------------------------------------------------------------------------------------


def results(backend: str, cases: Sequence[Mapping[str, Any]], python: str, **options: Any) -> list[dict[str, Any]]:
    """Measures the cases in a process with torch, one result for each.

    Args:
      cases: the SIZES of each, and whether gradients are timed too ("backward").
      python: the interpreter that has torch.
      options: "calls" in a row (None: as many as take about 20 ms), "repeats", and how many queries are "checked".

    Returns:
      "relative_error", "seconds" of a call, "timing" and "torch", its version; or "failed", the reason.

    Raises:
      SystemExit: the interpreter cannot be started.
    """
    if not cases:
        return []
    found: list[dict[str, Any]] = []
    pipe = subprocess.PIPE
    try:
        child = subprocess.Popen([python, __file__], stdin=pipe, stdout=pipe, text=True, encoding="utf-8")
    except OSError as problem:
        raise SystemExit(f"--torch-python {python}: {problem.strerror}") from None
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps({"backend": backend, "cases": [dict(case) for case in cases], **options}))
        child.stdin.close()
        for text in child.stdout:
            if text.startswith(RESULT):
                found.append(json.loads(text.removeprefix(RESULT)))
                print(f"{backend}: {len(found)} of {len(cases)}", file=sys.stderr, flush=True)
    lost = {"failed": f"the process with torch ended early (exit code {child.returncode})"}
    return found + [lost] * (len(cases) - len(found))


# --- In the process with torch ----------------------------------------------------------------------------------------


def main() -> None:
    """Answers the request on the standard input."""
    request = json.load(sys.stdin)
    try:
        import torch
    except ImportError as problem:
        for _ in request["cases"]:
            say({"failed": f"torch cannot be imported: {problem}"})
        return
    torch.seed()  # fresh numbers: the default seed is the same in every process
    for case in request["cases"]:
        say(measure(torch, request["backend"], case, request))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def say(result: Mapping[str, Any]) -> None:
    print(RESULT + json.dumps(result), flush=True)


def measure(torch: Any, backend: str, case: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """The result of one case. Whatever goes wrong in it is its result: the other cases go on."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with warnings.catch_warnings(record=True) as notes:  # torch warns of the reason, and raises without it
        warnings.simplefilter("always")
        try:
            q, k, v = inputs(torch, case, device)
            call = flex(torch, case, device) if backend == FLEX else sdpa(torch, case, SDPA[backend])
            index = torch.randperm(case["q_len"], device=device)[: request["checked"]].sort().values
            with torch.no_grad():
                out = call(q, k, v)[:, :, index].float()
                expected = exact(torch, case, q, k, v, index)
            error = float(torch.linalg.vector_norm(out - expected) / torch.linalg.vector_norm(expected))
            del out, expected
            once = step(torch, call, (q, k, v), backward=case["backward"])
            took, timing = seconds(torch, once, device, calls=request["calls"], repeats=request["repeats"])
        except Exception as problem:
            said = [str(note.message).splitlines()[0] for note in notes]
            text = (str(problem).splitlines() or [""])[0]
            return {"failed": "; ".join(dict.fromkeys([f"{type(problem).__name__}: {text}", *said]))[:300]}
    return {"relative_error": error, "seconds": took, "timing": timing, "torch": torch.__version__}


def inputs(torch: Any, case: Mapping[str, Any], device: str) -> tuple[Any, Any, Any]:
    """Random queries, keys and values [batch, heads, tokens, head_dim], in the order in memory that JAX's have here:
    queries token by token, keys and values head by head."""

    def normal(*shape: int) -> Any:
        return torch.randn(shape, dtype=getattr(torch, case["dtype"]), device=device)

    batch, head_dim = case["batch"], case["head_dim"]
    q = normal(batch, case["q_len"], case["q_heads"], head_dim).transpose(1, 2)
    k, v = (normal(batch, case["kv_heads"], case["kv_len"], head_dim) for _ in range(2))
    return q, k, v


def exact(torch: Any, case: Mapping[str, Any], q: Any, k: Any, v: Any, index: Any) -> Any:
    """float32 outputs of the queries of that index: [batch, q_heads, queries, head_dim]."""
    few = q[:, :, index].float()
    rows = few.reshape(case["batch"], case["kv_heads"], -1, case["head_dim"])
    group = case["q_heads"] // case["kv_heads"]
    logits = (rows @ k.float().transpose(2, 3)) * case["head_dim"] ** -0.5
    positions = (index + case["kv_len"] - case["q_len"]).repeat(group)  # a row for each query head of the group
    unseen = torch.arange(case["kv_len"], device=q.device) > positions[:, None]
    weights = torch.softmax(logits.masked_fill(unseen, -math.inf), dim=-1)
    return (weights @ v.float()).reshape(few.shape)


def sdpa(torch: Any, case: Mapping[str, Any], name: str) -> Callable[..., Any]:
    """`scaled_dot_product_attention` by one of its kernels. Where one query sees all there is no order to keep."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    causal = case["q_len"] > 1

    def call(q: Any, k: Any, v: Any) -> Any:
        with sdpa_kernel(getattr(SDPBackend, name)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return call


def flex(torch: Any, case: Mapping[str, Any], device: str) -> Callable[..., Any]:
    """`flex_attention`, compiled for these shapes."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    before = case["kv_len"] - case["q_len"]

    def causal(b: Any, h: Any, q: Any, slot: Any) -> Any:
        return q + before >= slot

    torch._dynamo.reset()  # after eight shapes it would compile no more, and compute all logits
    mask = create_block_mask(causal, None, None, case["q_len"], case["kv_len"], device=device)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def step(torch: Any, call: Callable[..., Any], arrays: tuple[Any, ...], *, backward: bool) -> Callable[[], None]:
    """One call: the output, and if `backward` the gradients for a cotangent that is the output."""
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                call(*arrays)

        return forward
    leaves = [array.detach().requires_grad_() for array in arrays]

    def gradients() -> None:
        out = call(*leaves)
        torch.autograd.grad(out, leaves, out.detach())

    return gradients


def seconds(torch: Any, once: Callable[[], None], device: str, *, calls: int | None, repeats: int) -> tuple[float, str]:
    """Median time of a call among many in a row, and how they were started.

    On a GPU they are replayed from one CUDA graph, so that what Python does for each is not measured. What cannot be
    captured is started call by call: the answer says so, since short calls then look longer than they are.
    """
    clock = _clock if device == "cpu" else _events(torch)
    if device != "cpu":
        side = torch.cuda.Stream()  # capturing wants its warm-up on another stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                once()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()

    def row(count: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(count):
                once()

        return run

    row(WARM_UP)()
    count = calls or min(max(math.ceil(PROGRAM_S * WARM_UP / clock(row(WARM_UP))), CALLS[0]), CALLS[-1])
    run, timing = row(count), CALL_BY_CALL
    if device != "cpu":
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            run, timing = graph.replay, GRAPH
        except RuntimeError as problem:
            print(f"no CUDA graph: {problem}", file=sys.stderr)
    clock(run)
    return statistics.median(clock(run) for _ in range(repeats)) / count, timing


def _clock(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _events(torch: Any) -> Callable[[Callable[[], None]], float]:
    """A clock by events on the GPU's stream, in seconds."""

    def clock(run: Callable[[], None]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return clock


if __name__ == "__main__":
    main()
