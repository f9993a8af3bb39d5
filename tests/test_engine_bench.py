"""Measuring the engine: the requests, the ideal schedule, what callers wait for, and the commands."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jax
import pytest
from click.testing import CliRunner, Result
from helpers import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.cli import cli
from llama_jax.engine.settings import EngineSettings
from llama_jax.errors import RequestError
from llama_jax.generation.llm import LLM
from llama_jax.measure import bench
from llama_jax.measure.bench import BenchResult, Ceilings
from llama_jax.measure.ideal import Steady, every_other, unfinished
from llama_jax.measure.serving import Record, block, check_limits, summary
from llama_jax.measure.throughput import Run, asked, medians, run_job, shares
from llama_jax.measure.warming import warm_up
from llama_jax.measure.workloads import FIRST_ID, MIXES, Work, renamed, workload
from llama_jax.model.loaded import Model
from llama_jax.params import init_params

STORED = json.loads((Path(__file__).parent / "data" / "workloads.json").read_text())
VOCAB = 40


# --- Requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", STORED["mixes"])
def test_requests_are_those_that_other_engines_got(mix: str) -> None:
    stored = STORED["mixes"][mix]
    works = workload(mix, 128_256, requests=len(stored), rate=STORED["rate"], seed=STORED["seed"])
    for work, line in zip(works, stored, strict=True):
        digest = hashlib.sha256(json.dumps(list(work.prompt)).encode()).hexdigest()
        assert (work.arrival_s, len(work.prompt), work.output_tokens, digest) == (
            line["arrival_s"],
            line["prompt_tokens"],
            line["output_tokens"],
            line["sha256"],
        )


@given(st.sampled_from(sorted(MIXES)), st.integers(0, 99), st.integers(FIRST_ID + 1, 500), st.floats(0.01, 1))
def test_a_longer_run_begins_with_the_shorter_one(mix: str, seed: int, vocab: int, scale: float) -> None:
    long = workload(mix, vocab, requests=3, seed=seed, scale=scale, rate=4.0)
    assert workload(mix, vocab, requests=2, seed=seed, scale=scale, rate=4.0) == long[:2]
    assert all(FIRST_ID <= id < vocab for work in long for id in work.prompt)
    assert all(work.prompt and work.output_tokens >= 1 for work in long)
    whole = workload(mix, vocab, requests=3, seed=seed)
    for small, full in zip(long, whole, strict=True):
        assert small.output_tokens == max(1, round(full.output_tokens * scale))
        assert len(small.prompt) == pytest.approx(len(full.prompt) * scale, abs=2)
    assert all(work.arrival_s == 0 for work in whole)


def test_arrivals_are_poisson() -> None:
    arrivals = [work.arrival_s for work in workload("mixed", VOCAB, requests=4000, rate=8.0)]
    gaps = [b - a for a, b in itertools.pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 8, rel=0.05)
    assert math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) == pytest.approx(mean, rel=0.1)


def test_prefixes_are_shared_when_scaled_and_in_other_ids() -> None:
    works = workload("prefix", 500, requests=64, scale=0.1)
    beginnings = {work.prompt[:90] for work in works}
    assert len(beginnings) < 40
    others = renamed(works, 1, 500)
    assert len({work.prompt[:90] for work in others}) == len(beginnings)
    assert not {work.prompt[:90] for work in others} & beginnings
    assert renamed(works, 0, 500) == works


@pytest.mark.parametrize(("vocab", "scale"), [(FIRST_ID, 1.0), (VOCAB, 0.0), (VOCAB, 1.5)])
def test_impossible_requests(vocab: int, scale: float) -> None:
    with pytest.raises(RequestError):
        workload("chat", vocab, scale=scale)


# --- The ideal schedule -----------------------------------------------------------------------------------------------


def row(batch: int, step_s: float, prefill_tps: float = 100.0) -> BenchResult:
    return BenchResult(batch, 16, 8, 1.0, prefill_tps, step_s, batch / step_s, None, None, 0.0)


STEADY = Steady((row(1, 1.0), row(4, 1.6, 200.0)))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_unfinished_rows_of_each_step(outputs: list[int]) -> None:
    rows = unfinished(outputs)
    assert rows == [sum(output > k for output in outputs) for k in range(1, max(outputs))]
    assert sum(rows) == sum(outputs) - len(outputs)  # prompts draw the first token of each


def test_the_ideal_schedule_by_hand() -> None:
    # Steps of 3, 2 and 1 rows: 1.4, 1.2 and 1.0 s between the sizes; 100 prompt tokens at 200 a second.
    assert STEADY.ideal_s(100, [4, 3, 2]) == pytest.approx(0.5 + 1.4 + 1.2 + 1.0)
    assert STEADY.step_s(8) == pytest.approx(3.2)  # two turns of four rows
    assert STEADY.decode_tps(8) == pytest.approx(STEADY.decode_tps(4))
    assert STEADY.ideal_s(100, [1, 1]) == pytest.approx(0.5)


def test_shares_leave_out_what_was_found_in_the_cache() -> None:
    works = [Work(0, 0.0, (FIRST_ID,) * 100, 2)]
    run = Run(2.0, 1, 100, 2, 0.5, 1.0, 51.0)
    assert shares(run, works, STEADY, 4) == pytest.approx(
        {"ideal_s": 1.5, "ideal_share": 0.75, "steady_tps": 2.5, "steady_share": 20.4, "steady_output_share": 0.4}
    )
    found = Run(2.0, 1, 100, 2, 0.5, 1.0, 51.0, prefix_hit_tokens=60)
    assert shares(found, works, STEADY, 4)["ideal_s"] == pytest.approx(1.2)


def test_every_other_size() -> None:
    assert every_other((1, 2, 4, 8, 16, 32, 64, 128, 256)) == [1, 4, 16, 64, 256]
    assert every_other((1, 2, 4, 8)) == [1, 2, 8]
    assert every_other((1, 8)) == [1, 8]
    assert every_other((4,)) == [4]


# --- Medians and serving ----------------------------------------------------------------------------------------------


def test_medians() -> None:
    runs = [{"a": 1, "b": 0.5, "c": None}, {"a": 3, "b": 1.5, "c": 1.0}, {"a": 9, "b": 2.0, "c": 1.0}]
    assert medians(runs) == {"a": 3, "b": 1.5, "c": None}


def test_a_summary_by_hand() -> None:
    records = [
        Record(10, 0.0, [0.1, 0.2, 0.4], 3),
        Record(20, 1.0, [1.3], 1),  # one token: nothing behind it
        Record(30, 1.0, refused="no room"),
    ]
    found = summary(records, 2.0, {"ttft": 200.0, "tpot": 200.0})
    assert (found["completed"], found["failed"]) == (2, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 4)
    assert found["output_throughput"] == pytest.approx(2.0)
    assert found["total_token_throughput"] == pytest.approx(17.0)
    assert found["request_goodput"] == pytest.approx(0.5)  # the second one was late
    assert found["mean_ttft_ms"] == pytest.approx(200.0)
    assert found["p50_itl_ms"] == pytest.approx(150.0)
    assert found["mean_tpot_ms"] == pytest.approx(150.0)
    assert found["p99_e2el_ms"] == pytest.approx(399.0)
    lines = block(found)
    assert "Successful requests:                     2         " in lines
    assert "Mean TTFT (ms):                          200.00    " in lines
    assert {len(line) for line in lines if line[0] in "-="} == {50}
    assert not any("goodput" in line or "None" in line for line in block(summary(records[1:2], 2.0, {})))
    assert summary(records, 2.0, {})["request_goodput"] is None
    assert summary(records[1:2], 2.0, {})["mean_tpot_ms"] is None


@pytest.mark.parametrize("limits", [{"itl": 5.0}, {"ttft": 0.0}, {"ttft": math.nan}])
def test_limits_that_no_request_has(limits: dict[str, float]) -> None:
    with pytest.raises(RequestError, match="goodput"):
        check_limits(limits)


# --- On a tiny model --------------------------------------------------------------------------------------------------

TINY = Model(init_params(tiny_config(), jax.random.key(0)), tiny_config(), name="tiny")
SETTINGS = EngineSettings(
    rows=4,
    context=64,
    pages=16,
    decode_rows=(1, 4),
    mixed_tokens=(8, 32),
    few_tokens=(8, 32),
    few_rows=2,
    chunk_rows=4,
    page_size=16,
)


@pytest.mark.slow
def test_the_first_requests_run_every_program() -> None:
    llm, ran = LLM(TINY, settings=SETTINGS), set()
    programs = llm._jobs.engine.cores[0].programs
    step = programs.step
    programs.step = lambda key, *args: (ran.add(key), step(key, *args))[1]  # type: ignore[method-assign]
    for works in warm_up(SETTINGS, VOCAB):
        llm.generate([list(work.prompt) for work in works], [asked(work) for work in works])
    steps = {key for key in programs.keys if key.name in ("mixed", "decode")}
    assert ran == {key for key in steps if not key.greedy}
    assert len(ran) == 6


@pytest.mark.slow
def test_the_same_requests_again_are_found_in_the_cache() -> None:
    llm = LLM(TINY, settings=SETTINGS)
    works = [Work(i, 0.0, tuple(range(FIRST_ID, FIRST_ID + 20)), 4) for i in range(3)]
    cold, again = run_job(llm, works), run_job(llm, works)
    assert (again.num_requests, again.total_input_tokens, again.total_output_tokens) == (3, 60, 12)
    assert cold.prefix_hit_tokens < again.prefix_hit_tokens == 3 * 16
    assert again.tokens_per_second == pytest.approx(72 / again.elapsed_time)
    assert again.steps > 0
    assert 0 < again.padding_share < 1


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A preset "tiny", and ceilings that are not measured."""
    monkeypatch.setattr(bench, "random_model", lambda *args, **options: TINY)
    monkeypatch.setattr(bench, "measure_ceilings", lambda dtype: Ceilings(1e12, 1e15))
    yield
    gc.unfreeze()


ENGINE = ["--preset", "tiny", "--rows", "2", "--page-size", "16"]


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["bench", *args], catch_exceptions=False)


@pytest.mark.slow
def test_throughput(tiny: None, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    asked = ["--mix", "prefix", "--requests", "6", "--scale", "0.02", "--rounds", "2", "--static", "8", "--strict"]
    done = run("throughput", *ENGINE, *asked, "--json", str(out))
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert "of the ideal schedule" in done.stdout
    assert found["workload"]["mix"] == "prefix"
    assert [r["batch"] for r in found["steady"]] == [1, 2]
    for name in ("cold", "again"):
        run_ = found[name]
        assert len(run_["elapsed_times"]) == 2
        assert run_["total_output_tokens"] == found["workload"]["total_output_tokens"]
        assert run_["late_compilations"] == 0
        assert run_["ideal_share"] == pytest.approx(run_["ideal_s"] / run_["elapsed_time"])
    assert found["again"]["prefix_hit_tokens"] > found["cold"]["prefix_hit_tokens"]
    assert found["static"]["batch"] == 8
    assert found["static"]["output_tokens_per_second"] > 0
    assert "steady_target" not in found


@pytest.mark.slow
def test_latency(tiny: None) -> None:
    asked = ["--prompt", "20", "--new", "6", "--depth", "0", "--depth", "30", "--rounds", "2"]
    done = run("latency", *ENGINE, *asked, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    prompt, short, long = found["results"]
    assert [r["test"] for r in found["results"]] == ["pp20", "tg6", "tg6 @ d30"]
    assert prompt["tokens_per_second"] == pytest.approx(20 / prompt["ttft_ms"] * 1e3)
    assert prompt["itl_ms"] is None
    assert short["itl_ms"] > 0
    assert 0 < short["share"] < long["share"] * 100
    assert found["late_compilations"] == 0


@pytest.mark.slow
def test_serve(tiny: None) -> None:
    asked = ["--mix", "mixed", "--requests", "5", "--scale", "0.2", "--rate", "200", "--goodput", "ttft:1e6 e2el:1e6"]
    done = run("serve", *ENGINE, *asked, "--strict", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["completed"], found["failed"]) == (5, 0)
    assert found["total_output_tokens"] == found["workload"]["total_output_tokens"]
    assert found["request_goodput"] == pytest.approx(found["request_throughput"])
    assert found["goodput_limits_ms"] == {"ttft": 1e6, "e2el": 1e6}
    assert 0 < found["p50_ttft_ms"] <= found["p95_ttft_ms"] <= found["p99_ttft_ms"] <= found["p99_e2el_ms"]
    assert found["rounds"][0]["counts"]["late_compilations"] == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch", "8", "latency"], "--batch stands before latency"),
        (["thrughput"], "did you mean throughput"),
        (["serve", "--preset", "tiny", "--goodput", "ttft"], "NAME:MILLISECONDS"),
        (["serve", "--preset", "tiny", "--goodput", "itl:5"], "goodput cannot be counted by itl:5"),
        (["throughput", "--preset", "tiny", "--mix", "chat"], "--scale 0."),
        (["throughput", "--preset", "tiny", "--scale", "0.05", "--json", "no/such/folder.json"], "cannot write"),
    ],
)
def test_mistakes(tiny: None, args: list[str], message: str) -> None:
    done = CliRunner().invoke(cli, ["bench", *args])
    assert done.exit_code not in (0, 70)
    assert message in done.output


@pytest.mark.parametrize("name", ["throughput", "latency", "serve"])
def test_each_kind_has_json_and_examples(name: str) -> None:
    group: Any = cli.get_command(click.Context(cli), "bench")
    assert "--json" in [flag for option in group.commands[name].params for flag in option.opts]
    assert f"  llama-jax bench {name}" in run(name, "--help").stdout.partition("Examples:")[2]
