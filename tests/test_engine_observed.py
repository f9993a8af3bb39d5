"""An engine's reports on itself: compilations, strictness, rates, and who may watch it from outside."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner, Result
from engines import run, small_settings, some_requests, tiny_model
from helpers import tiny_config
from terminal_screen import show_top

from llama_jax.cli import cli
from llama_jax.cli.bench_options import Subject
from llama_jax.cli.engine_text import engine_line
from llama_jax.cli.progress import Reporter
from llama_jax.config import preset
from llama_jax.engine import meter as meters
from llama_jax.engine import sizing
from llama_jax.engine.compiled import Compiled, forget
from llama_jax.engine.core import Core
from llama_jax.engine.limits import Counts
from llama_jax.engine.meter import Meter
from llama_jax.engine.program_set import Key
from llama_jax.engine.publishing import VARIABLE, Published, published
from llama_jax.engine.sequence import Sequence
from llama_jax.engine.sizing import settings_for
from llama_jax.engine.snapshot import Snapshot
from llama_jax.engine.steps import Chunk, Step
from llama_jax.errors import DoesNotFit, EngineFailed, EngineNotFound, LateCompilation, StorageError
from llama_jax.generation.engine import Engine
from llama_jax.generation.llm import LLM
from llama_jax.generation.streams import Request
from llama_jax.plan.device_memory import ENGINE_FRACTION, claim_memory, memory_fraction, more_memory_hint
from llama_jax.plan.step_costs import Load, Peak, StepCosts
from llama_jax.sampling import SamplingParams

SMALL = small_settings(rows=2, decode_rows=(2,), mixed_tokens=(24,), pages=12)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="children are found by Linux's ways")


# --- Compilations ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_programs_are_told_as_they_are_compiled() -> None:
    minimum = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        forget()  # what other engines have compiled
        core = Core(tiny_model(), SMALL)
        told: list[Compiled] = []
        before = time.monotonic()
        told.extend(core.compile_all())
        took = time.monotonic() - before
        forget()
        again: list[Compiled] = []
        again.extend(Core(tiny_model(), SMALL).compile_all())
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", minimum)
    assert {news.key for news in told} == set(core.programs.keys)
    assert [(news.done, news.total) for news in told] == [(i + 1, 4) for i in range(4)]
    assert told[-1].left_s == 0
    assert all(0 < news.seconds <= took and news.left_s <= 4 * took for news in told)
    snapshot = core.snapshot()
    assert (snapshot.programs, snapshot.late_compilations) == (4, 0)
    assert snapshot.programs_from_cache == sum(news.from_cache for news in told)
    assert snapshot.ready_s is not None
    assert snapshot.ready_s >= took
    if jax.config.jax_compilation_cache_dir is not None:
        # Of the others jax keeps those that took long enough to compile.
        assert {news.key.name for news in again if news.from_cache} >= {"scored", "mixed", "decode"}


@pytest.mark.slow
def test_an_engine_that_compiles_as_needed_is_never_ready() -> None:
    core = Core(tiny_model(), SMALL)
    assert core.snapshot().ready_s is None
    run(core, some_requests(core.model, 1))
    assert core.snapshot().late_compilations == 0
    assert core.snapshot().programs > 0


@pytest.fixture(scope="module")
def ready() -> LLM:
    """A strict engine; each test leaves it whole, with its programs."""
    llm = LLM(tiny_model(), settings=small_settings(**{**vars(SMALL), "strict": True}))
    assert llm.snapshot().ready_s is not None  # without ahead=True
    return llm


def answer(llm: LLM, prompt: list[int] | None = None) -> None:
    llm.generate([prompt or [5, 6, 7]], temperature=0.0, max_tokens=3)


@pytest.fixture
def lenient(ready: LLM) -> Iterator[LLM]:
    """The same without strictness."""
    programs = ready._jobs.engine.cores[0].programs
    strict, programs._settings = programs._settings, SMALL
    yield ready
    programs._settings = strict


@pytest.mark.slow
def test_all_kinds_of_requests_pass_a_strict_engine(ready: LLM) -> None:
    asked = some_requests(ready.model, 6)
    ready.generate([prompt for prompt, _ in asked], [params for _, params in asked])
    ready.generate([[5, 6]], SamplingParams(max_tokens=2, prompt_logprobs=1))
    assert ready.snapshot().late_compilations == 0


def test_a_missing_program_is_counted(lenient: LLM) -> None:
    programs, key = lenient._jobs.engine.cores[0].programs, Key("decode", 2)
    before = lenient.snapshot().late_compilations
    del programs._compiled[key]
    answer(lenient)
    assert lenient.snapshot().late_compilations == before + 1
    assert key in programs._compiled


def compile_something(monkeypatch: pytest.MonkeyPatch, programs: Any) -> None:
    """Makes the next step compile what is not of the engine's programs."""
    size, step = iter(range(1000, 2000)), programs.step

    def stepping(*args: Any) -> Any:
        jax.jit(lambda x: x * 3)(np.zeros(next(size))).block_until_ready()
        return step(*args)

    monkeypatch.setattr(programs, "step", stepping)


def test_what_jax_compiles_besides_is_counted(lenient: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before = lenient.snapshot().late_compilations
    compile_something(monkeypatch, lenient._jobs.engine.cores[0].programs)
    answer(lenient)
    assert lenient.snapshot().late_compilations >= before + 3  # one in each step
    late = lenient.snapshot().late_compilations
    jax.jit(lambda x: x + 3)(np.zeros(999)).block_until_ready()  # not in a step: somebody else's
    assert lenient.snapshot().late_compilations == late


def strict_engine(spoil: Any) -> BaseException:
    """A caller of a strict engine that compiles after it was ready gets an error."""

    async def caller() -> BaseException:
        async with Engine(tiny_model(), settings=small_settings(**{**vars(SMALL), "strict": True})) as engine:
            assert engine._jobs is not None
            spoil(engine._jobs.engine.cores[0].programs)
            with pytest.raises(LateCompilation) as caught:
                await engine.generate(Request([5, 6], SamplingParams(max_tokens=9, ignore_eos=True)))
            await engine.generate(Request([5, 6], SamplingParams(max_tokens=2)))  # it has started again
            return caught.value

    return asyncio.run(caller())


@pytest.mark.slow
def test_a_strict_engine_names_the_program_that_is_missing() -> None:
    error = strict_engine(lambda programs: programs._compiled.pop(Key("decode", 2)))
    assert "'decode of 2 rows'" in str(error)


@pytest.mark.slow
def test_a_strict_engine_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "CPU_START", 32)
    llm = LLM(tiny_model(), rows=2, page_size=16, strict=True)
    assert (llm.settings.context, llm.snapshot().late_compilations) == (32, 0)
    with pytest.raises(LateCompilation, match="40 tokens needs a larger engine"):
        llm.generate([[5] * 30], max_tokens=10)
    answer(llm)


@pytest.mark.slow
def test_a_strict_engine_names_what_jax_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    error = strict_engine(lambda programs: compile_something(monkeypatch, programs))
    assert "lambda" in str(error)


def test_a_commands_objects_are_frozen_when_all_is_compiled() -> None:
    gc.unfreeze()
    try:
        with CliRunner().isolation():
            subject = Subject(*[None] * len(dataclasses.fields(Subject)))  # type: ignore[arg-type]
            with subject.compiling() as compiling:
                compiling(Compiled(Key("mark"), 0.1, False, 1, 2, 0.1))
                assert gc.get_freeze_count() == 0
                compiling(Compiled(Key("scrub"), 0.1, False, 2, 2, 0.0))
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()


def test_an_engine_that_nobody_holds_is_gone_at_once() -> None:
    """In no circle: what it has on the device would wait for the search for garbage, or for ever if it is frozen."""
    gc.disable()
    try:
        llm = LLM(tiny_model(), settings=SMALL)
        answer(llm)
        core = weakref.ref(llm._jobs.engine.cores[0])
        del llm
        assert core() is None
    finally:
        gc.enable()


def test_a_line_for_each_program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 3))
    monkeypatch.setattr("llama_jax.cli.progress.time.monotonic", lambda: float(next(now)))
    with Reporter() as reporter:
        for done, cached in ((1, False), (2, True), (3, False)):
            reporter.compiled(Compiled(Key("decode", 8, True), 2.5, cached, done, 3, 70.0 * (3 - done)))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "Compiling: 2 of 3 programs, 1 min 10 s left, decode of 8 rows, greedy: from the cache",
        "Compiling: 3 of 3 programs, 0 s left, decode of 8 rows, greedy: 2.5 s",
    ]
    with Reporter(quiet=True) as reporter:
        reporter.compiled(Compiled(Key("mark"), 2.5, False, 1, 3, 9.0))
    assert capsys.readouterr().err == ""


# --- Rates -----------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(meters.time, "monotonic", lambda: self.now)


def decoding(*lengths: int) -> Step:
    sequences = tuple(Sequence(i, [1], 1, 99, computed=length) for i, length in enumerate(lengths))
    return Step(1, (), (), (), sequences, 1)


def test_rates_of_the_last_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, costs = Clock(monkeypatch), StepCosts(preset("llama-3.1-8b"), jnp.bfloat16)
    meter = Meter(costs, Peak(3e12, 6e14))
    assert meter.rates() == meters.Rates(0.0, 0.0, 0.0, 0.0)
    meter.dispatched(decoding(10, 20), 4)
    clock.now += 0.1
    meter.dispatched(decoding(11, 21), 4)  # one step ahead
    for _ in range(30):
        clock.now += 0.1
        meter.ended(2)
        meter.dispatched(decoding(11, 21), 4)
    rates = meter.rates()
    moved, flops = costs.total([Load(1, [11, 21], [])])
    assert rates.tokens_per_s == pytest.approx(20)
    assert rates.step_s == pytest.approx(0.1)
    assert rates.mbu == pytest.approx(10 * moved / 3e12)
    assert rates.mfu == pytest.approx(10 * flops / 6e14)
    assert (meter.steps, meter.computed, meter.padding, meter.tokens_out) == (32, 64, 64, 60)
    clock.now += 1.5
    assert meter.rates().tokens_per_s == pytest.approx(20)  # a step has been under way for that long
    meter.ended(2)
    assert meter.rates().step_s == pytest.approx(1.5)
    meter.ended(0)
    clock.now += 1.5
    assert meter.rates().mbu == 0


def test_a_pause_is_no_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, meter = Clock(monkeypatch), Meter(StepCosts(tiny_config(), jnp.float32), None)
    for _ in range(2):
        meter.dispatched(decoding(3), 1)
        clock.now += 0.1
        meter.ended(1)
        clock.now += 0.3
    assert meter.rates().step_s == pytest.approx(0.1)
    assert meter.rates().tokens_per_s == pytest.approx(2 / 0.5)
    assert (meter.rates().mbu, meter.rates().mfu) == (None, None)


def test_what_a_meter_costs() -> None:
    """The issue's bound is 10 us a step, with 256 rows; here with room for a busy machine."""
    meter, step = Meter(StepCosts(preset("llama-3.1-8b"), jnp.bfloat16), Peak(3e12, None)), decoding(*range(1, 257))
    best = 1.0
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(20):
            meter.dispatched(step, 256)
            meter.ended(256)
        best = min(best, (time.perf_counter() - start) / 20)
    assert best < 50e-6


def test_costs_of_what_ran(ready: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and rows as the scheduler planned them: all of a prompt once, and a token of a row in each later step."""
    monkeypatch.setattr(meters, "WINDOW_S", 1e9)
    core = ready._jobs.engine.cores[0]
    core._meter._ended.clear()
    prompt = np.random.default_rng(3).integers(3, 40, 41).tolist()
    ready.generate([prompt], temperature=0.0, max_tokens=5, ignore_eos=True)
    loads = [step.load for step in core._meter._ended]
    assert [chunk for load in loads for chunk in load.chunks] == [(0, 24, False), (24, 17, True)]
    assert [load.lengths for load in loads if load.lengths] == [[42], [43], [44], [45]]
    assert core.snapshot().mbu is None  # a CPU, whose peak nobody gave


def test_a_mixed_step_counts_its_chunks() -> None:
    sequence = Sequence(1, [1] * 30, 30, 9, computed=20)
    step = Step(1, (), (), (Chunk(sequence, 0, 8, 12, draws=False),), decoding(7).decoding, 1)
    meter = Meter(StepCosts(tiny_config(), jnp.float32), None)
    meter.dispatched(step, 16)
    meter.ended(1)
    assert meter._ended[0].load == Load(1, [7], [(8, 12, False)])
    assert (meter.computed, meter.padding) == (13, 3)


# --- Snapshots and lines ---------------------------------------------------------------------------------------------

COUNTS = Counts(3, 12, 34, 50, 10, 6, 500, 120, 2, 900)
SNAPSHOT = Snapshot(
    COUNTS, 500, 90, 900, 100, 60, 0, 0, 0, 1, 5, 1, 0, 2.5, 312.54, 0.0066, 0.71, None, "measured", "bfloat16"
)


def test_snapshots_to_json_and_back() -> None:
    assert Snapshot.from_json(json.loads(json.dumps(SNAPSHOT.to_json()))) == SNAPSHOT
    with pytest.raises(KeyError):
        Snapshot.from_json({"running": 3})
    assert SNAPSHOT.padding_share == 0.1
    assert SNAPSHOT.cache_use == 0.34


def test_several_engines_as_one() -> None:
    other = dataclasses.replace(SNAPSHOT, ready_s=4.0, step_s=0.0033, mbu=0.31, tokens_per_s=100.0)
    both = Snapshot.of([SNAPSHOT, other])
    assert (both.counts.running, both.tokens_out, both.programs) == (6, 180, 10)
    assert both.tokens_per_s == pytest.approx(412.54)
    assert (both.step_s, both.mbu) == (pytest.approx(0.00495), pytest.approx(0.51))
    assert (both.ready_s, both.mfu, both.peak) == (4.0, None, "measured")
    assert both.cache_use == SNAPSHOT.cache_use
    assert Snapshot.of([SNAPSHOT, dataclasses.replace(other, ready_s=None)]).ready_s is None


def test_the_line_of_progress() -> None:
    assert engine_line(SNAPSHOT) == "312.5 tok/s, 3 running, 12 waiting, cache 34 % in use"


# --- Watching --------------------------------------------------------------------------------------------------------


@pytest.fixture
def meeting(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of sockets, of this test alone."""
    place = tmp_path_factory.mktemp("r", numbered=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    return place / "llama_jax" / "engines"


def top(*args: str) -> Result:
    return CliRunner().invoke(cli, ["top", *args])


def test_engines_are_seen_only_if_they_want_to(meeting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = LLM(tiny_model(), settings=SMALL)
    assert published() == []
    assert not meeting.exists()
    monkeypatch.setenv(VARIABLE, "1")
    seen = [LLM(tiny_model(), settings=SMALL, peak=Peak(1e9, 1e9)) for _ in range(2)]
    answer(seen[0])
    first, second = published()
    assert (first.pid, first.model, first.rows, first.context) == (os.getpid(), "tiny", 2, 96)
    assert (first.snapshot.tokens_out, second.snapshot.tokens_out) == (3, 0)
    assert first.snapshot.peak == "measured"
    assert {path.stat().st_mode & 0o777 for path in (meeting, meeting.parent)} == {0o700}
    del first, second, seen[1]
    gc.collect()
    assert len(published()) == 1
    assert len(list(meeting.iterdir())) == 1
    del hidden


def test_looking_while_it_works(meeting: Path, monkeypatch: pytest.MonkeyPatch, ready: LLM) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    from llama_jax.engine.publishing import publish

    publish(ready._jobs.engine)
    looks: list[Published] = []
    end = threading.Event()

    def look() -> None:
        while not end.is_set():
            looks.extend(published())

    looking = threading.Thread(target=look)
    looking.start()
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    ready.generate([[5, i] for i in range(3, 12)], params)
    end.set()
    looking.join()
    assert any(look.snapshot.counts.running == 2 and look.snapshot.counts.waiting for look in looks)
    assert {len(path.name) > 0 for path in meeting.iterdir()} == {True}


def test_an_engine_that_starts_again_leaves_nothing(meeting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one's memory is free before the new one is made: both would not fit on a device."""
    monkeypatch.setenv(VARIABLE, "1")

    async def caller() -> None:
        async with Engine(tiny_model(), settings=SMALL, ahead=False) as engine:
            assert engine._jobs is not None
            old = weakref.ref(engine._jobs.engine.cores[0])
            left: list[bool] = []

            def fail(*_: Any) -> Any:
                raise RuntimeError("lost")

            with monkeypatch.context() as patch:
                made = engine._made
                patch.setattr(engine._jobs.engine.cores[0].programs, "step", fail)
                patch.setattr(engine, "_made", lambda: (left.append(old() is not None), made())[1])
                with pytest.raises(EngineFailed, match="lost"):
                    await engine.generate(Request([5, 6], SamplingParams(max_tokens=2)))
                await engine.generate(Request([5, 6], SamplingParams(max_tokens=2)))
            assert left == [False]
            assert len(published()) == 1

    asyncio.run(caller())
    gc.collect()
    assert published() == []


def test_sockets_of_the_dead_are_removed(meeting: Path) -> None:
    meeting.mkdir(parents=True, mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(str(meeting / "1-0.sock"))
    (meeting / "2-0.sock").write_text("no socket")
    assert published() == []
    assert not (meeting / "1-0.sock").exists()


def test_a_folder_that_others_may_write_to(meeting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting.mkdir(parents=True)
    meeting.parent.chmod(0o777)
    with pytest.raises(StorageError, match="only you"):
        published()
    monkeypatch.setenv(VARIABLE, "1")
    with pytest.raises(StorageError, match="only you"):
        LLM(tiny_model(), settings=SMALL)
    assert top().exit_code == StorageError.exit_code


def test_a_name_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    monkeypatch.setenv(VARIABLE, "1")
    with pytest.raises(StorageError, match="too long"):
        LLM(tiny_model(), settings=SMALL)


def test_no_engine(meeting: Path) -> None:
    done = top()
    assert done.exit_code == EngineNotFound.exit_code == 3
    assert f"{VARIABLE}=1" in done.output
    assert json.loads(top("--json").stdout)["error"]["type"] == "EngineNotFound"


CHILD = """
import sys
sys.path.insert(0, {tests!r})
from engines import tiny_model
from test_engine_observed import SMALL
from llama_jax.generation.llm import LLM
llm = LLM(tiny_model(), settings=SMALL, ahead=True)
print("ready", flush=True)
for line in sys.stdin:
    llm.generate([[5, 6, 7]] * 3, max_tokens=9, ignore_eos=True)
    print("done", flush=True)
"""
TOP = [sys.executable, "-m", "llama_jax.cli", "top"]


@pytest.fixture
def elsewhere(meeting: Path) -> Iterator[subprocess.Popen[str]]:
    """An engine in another process that lets itself be watched, and works when it is given a line."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(tests=str(Path(__file__).parent))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {VARIABLE: "1"},
        text=True,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child
        child.kill()


def work(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline() == "done\n"


@LINUX
@pytest.mark.slow
def test_top(elsewhere: subprocess.Popen[str], meeting: Path) -> None:
    work(elsewhere)
    (engine,) = json.loads(top("--json", "--once").stdout)["engines"]
    assert engine["pid"] == elsewhere.pid
    assert engine["snapshot"]["tokens_out"] == 27
    shown = top("--once").stdout
    assert shown.startswith("tiny  cpu (")
    assert f"  float32  pid {elsewhere.pid}\n" in shown
    assert "2 rows of 96 tokens" in shown
    assert "0 late compilations" in shown
    # Lines, until Ctrl-C.
    with subprocess.Popen([*TOP, "--interval", "0.1"], stdout=subprocess.PIPE, text=True) as lines:
        assert lines.stdout is not None
        for _ in range(3):
            assert lines.stdout.readline().startswith(f"{elsewhere.pid} ")
        lines.send_signal(signal.SIGINT)
        lines.stdout.read()
    assert lines.returncode == 0
    # Lines, until the engine is killed.
    with subprocess.Popen([*TOP, "--interval", "0.1", "--json"], stdout=subprocess.PIPE, text=True) as lines:
        assert lines.stdout is not None
        assert json.loads(lines.stdout.readline())["engines"]
        elsewhere.kill()
        lines.stdout.read()
    assert lines.returncode == 0
    assert top().exit_code == 3
    assert list(meeting.glob("*.sock")) == []


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("key", [b"q", b"\x03"])
def test_top_in_a_terminal(elsewhere: subprocess.Popen[str], key: bytes) -> None:
    show_top(TOP, key)


def test_top_needs_no_jax(meeting: Path) -> None:
    code = "import sys, llama_jax.cli.top; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- Memory of a GPU -------------------------------------------------------------------------------------------------


def test_an_engine_takes_what_the_plan_of_engines_says(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    assert claim_memory(environment, started=False)
    assert environment == {"XLA_CLIENT_MEM_FRACTION": "0.9"}
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", environment["XLA_CLIENT_MEM_FRACTION"])
    assert memory_fraction() == ENGINE_FRACTION
    assert more_memory_hint(memory_fraction()) == ""


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_a_fraction_that_somebody_has_chosen(name: str) -> None:
    environment = {name: "0.5"}
    assert not claim_memory(environment, started=False)
    assert environment == {name: "0.5"}


def test_too_late() -> None:
    environment: dict[str, str] = {}
    assert not claim_memory(environment, started=True)
    assert environment == {}
    options: dict[str, Any] = {"on_cpu": False, "free": 3 << 30, "context": 131_072}
    with pytest.raises(DoesNotFit, match=r"jax took 75% of .* XLA_CLIENT_MEM_FRACTION=0.9"):
        settings_for(preset("llama-3.1-8b"), "bfloat16", None, more_memory=more_memory_hint(0.75), **options)


def test_the_command_claims_before_jax_starts() -> None:
    code = """
import os
from llama_jax.cli.options import claim_memory
claim_memory()
import jax
before = os.environ.pop("XLA_CLIENT_MEM_FRACTION")
jax.devices()
claim_memory()
print(before, os.environ.get("XLA_CLIENT_MEM_FRACTION"))
"""
    environment = {k: v for k, v in os.environ.items() if "MEM_FRACTION" not in k}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0.9", "None"]
