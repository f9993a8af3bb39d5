"""Throughput of an engine with all requests at once, and its counts during the run."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.snapshot import Snapshot
from llama_jax.errors import EngineFailed
from llama_jax.generation.jobs import Progress
from llama_jax.generation.llm import LLM
from llama_jax.generation.outputs import RequestOutput
from llama_jax.measure.bench import Ceilings
from llama_jax.measure.ideal import Steady
from llama_jax.measure.static import time_static
from llama_jax.measure.warming import warm_up
from llama_jax.measure.workloads import Work
from llama_jax.model.loaded import Model
from llama_jax.sampling import SamplingParams


@dataclass(frozen=True)
class Run:
    """Figures of a job.

    Attributes:
      elapsed_time: seconds from the call to the last answer.
      tokens_per_second: of prompts and answers.
      prefix_hit_tokens: prompt tokens found in the cache.
      padding_share: share of the computed tokens that only filled the steps' shapes.
      late_compilations: programs compiled during the run.
    """

    elapsed_time: float
    num_requests: int
    total_input_tokens: int
    total_output_tokens: int
    requests_per_second: float
    output_tokens_per_second: float
    tokens_per_second: float
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    padding_share: float = 0.0
    late_compilations: int = 0


def asked(work: Work) -> SamplingParams:
    """Sampling parameters of a request: greedy, and exactly as long as it says."""
    return SamplingParams(temperature=0.0, max_tokens=work.output_tokens, ignore_eos=True)


def make_ready(
    model: Model,
    settings: EngineSettings,
    ceilings: Ceilings,
    compiling: Progress | None = None,
    draft: Model | None = None,
) -> tuple[LLM, float]:
    """An engine whose programs are all compiled and have run once, and the seconds until it could take requests
    (without those first runs).

    Args:
      ceilings: peak rates for its utilisation (`Snapshot.mbu`).
      compiling: called for each program that is compiled.
      draft: the draft model, if the settings have one.
    """
    gc.collect()  # earlier measurements may still hold memory
    start = time.perf_counter()
    llm = LLM(model, settings=settings, draft=draft, ahead=True, peak=ceilings.peak, compiling=compiling)
    ready_s = time.perf_counter() - start
    for works in warm_up(settings, model.config.vocab_size):
        _answered(llm, works)
    return llm, ready_s


def run_job(llm: LLM, works: Sequence[Work]) -> Run:
    """Submits all requests at once and waits for all answers.

    Raises:
      EngineFailed: an answer is shorter than requested.
    """
    before, start = llm.snapshot(), time.perf_counter()
    outputs = _answered(llm, works)
    elapsed = time.perf_counter() - start
    _check(works, outputs)
    return _run(works, elapsed, **meanwhile(before, llm.snapshot()))


def run_static(model: Model, works: Sequence[Work], batch: int) -> Run:
    """The same in static batches of `batch` requests, batch by batch in the order of the requests. Runs twice; the
    first run compiles."""
    for _ in range(2):
        elapsed = 0.0
        for first in range(0, len(works), batch):
            some = works[first : first + batch]
            elapsed += sum(time_static(model, [work.prompt for work in some], [work.output_tokens for work in some]))
    return _run(works, elapsed)


def median(runs: Sequence[Run]) -> Run:
    """The medians of several runs, number by number."""
    return Run(**medians([asdict(run) for run in runs]))


def medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The medians of several mappings, name by name; counts stay whole numbers, and missing values give None."""
    found = {}
    for name, first in runs[0].items():
        values = [run[name] for run in runs]
        found[name] = None if None in values else type(first)(statistics.median(values))
    return found


def shares(run: Run, works: Iterable[Work], steady: Steady, rows: int) -> dict[str, float]:
    """Compares a run with static batches.

    Returns:
      ideal_s: seconds of the ideal schedule, without cached prompt tokens; ideal_share: share of it that the run
      reached. steady_tps: tokens per second of steady decoding with `rows` rows; steady_share: the run's prompt and
      output tokens per second as a share of that; steady_output_share: its output tokens alone.
    """
    computed = max(0, run.total_input_tokens - run.prefix_hit_tokens)
    ideal, decode = steady.ideal_s(computed, [work.output_tokens for work in works]), steady.decode_tps(rows)
    return {
        "ideal_s": ideal,
        "ideal_share": ideal / run.elapsed_time,
        "steady_tps": decode,
        "steady_share": run.tokens_per_second / decode,
        "steady_output_share": run.output_tokens_per_second / decode,
    }


def meanwhile(before: Snapshot, after: Snapshot) -> dict[str, Any]:
    """Counts of an engine between two snapshots, those of `Run`."""
    computed, padding = (getattr(after, name) - getattr(before, name) for name in ("computed_tokens", "padding_tokens"))
    return {
        "prefix_hit_tokens": after.counts.prefix_hit_tokens - before.counts.prefix_hit_tokens,
        "preemptions": after.counts.preemptions - before.counts.preemptions,
        "steps": after.steps - before.steps,
        "padding_share": padding / max(1, computed + padding),
        "late_compilations": after.late_compilations - before.late_compilations,
    }


def _answered(llm: LLM, works: Sequence[Work]) -> list[RequestOutput]:
    return llm.generate([list(work.prompt) for work in works], [asked(work) for work in works])


def _check(works: Sequence[Work], outputs: Sequence[RequestOutput]) -> None:
    short = sum(
        len(output.outputs[0].token_ids) < work.output_tokens for work, output in zip(works, outputs, strict=True)
    )
    if short:
        raise EngineFailed(
            f"{short} of {len(works)} answers ended early", hint="their logits were not finite: try --dtype float32"
        )


def _run(works: Sequence[Work], elapsed: float, **counts: Any) -> Run:
    tokens_in, tokens_out = sum(len(work.prompt) for work in works), sum(work.output_tokens for work in works)
    return Run(
        elapsed_time=elapsed,
        num_requests=len(works),
        total_input_tokens=tokens_in,
        total_output_tokens=tokens_out,
        requests_per_second=len(works) / elapsed,
        output_tokens_per_second=tokens_out / elapsed,
        tokens_per_second=(tokens_in + tokens_out) / elapsed,
        **counts,
    )
