"""`llama-jax tune`: what is measured, what is kept, and which rule comes of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner, Result

from llama_jax import runtime
from llama_jax.cli import cli
from llama_jax.config import preset
from llama_jax.errors import StorageError
from llama_jax.kernels import registry
from llama_jax.kernels.dispatch import operation as operations
from llama_jax.kernels.dispatch.backend import Backend
from llama_jax.kernels.dispatch.cases import Arrays, Case
from llama_jax.kernels.dispatch.operation import Operation
from llama_jax.kernels.dispatch.record import Recorder
from llama_jax.kernels.dispatch.tables import parse
from llama_jax.kernels.dispatch.user_table import path_of
from llama_jax.kernels.tuning import tune as tuning
from llama_jax.kernels.tuning.timing import seconds_per_call
from llama_jax.kernels.tuning.tune import Candidate, Measurement, Tuning, best_rules, candidates, tune
from llama_jax.measure.numbers import numbers_of
from llama_jax.targets import find

# Most are quick; together they take a while.
pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class Tiles:
    block: int


CALLS: list[tuple[str, int]] = []


def fast(x: jax.Array, *, factor: float, tiles: Tiles | None = None) -> jax.Array:
    CALLS.append(("fast", tiles.block if tiles else 0))
    if tiles and tiles.block == 64:
        raise RuntimeError("RESOURCE_EXHAUSTED: 64 KiB of local memory\nand more")
    return x * (factor + (tiles.block == 32 if tiles else False))  # 32 gives wrong numbers


def plain(name: str) -> Callable[..., jax.Array]:
    """A backend without tiles."""

    def call(x: jax.Array, *, factor: float) -> jax.Array:
        CALLS.append((name, 0))
        return x * factor

    return call


def case(name: str, length: int) -> Case:
    return Case(name, lambda key: {"x": jax.random.normal(key, (4, length))}, {"factor": 2.0}, quick=True)


OP = Operation(
    "moe",
    {
        "reference": Backend(plain("reference")),
        "fast": Backend(
            fast,
            lambda target, x, factor: "too long" if x.shape[1] > 64 else None,
            tiles=Tiles,
            candidates=lambda target, x, factor: map(Tiles, (16, 32, 64, 128)),
        ),
        "slow": Backend(plain("slow")),
        "test": Backend(lambda x, factor: x, interpreted=True),
    },
    shape=lambda x, factor: f"n{x.shape[1]}",
    cases=lambda: (case("small", 8),),
    models=lambda numbers: (case("a", 8), case("b", 8), case("c", 16)) if numbers is None else (),
)

# Seconds of one call by backend and block, instead of measuring.
TIMES = {("reference", 0): 5e-5, ("slow", 0): 4e-5, ("fast", 16): 2e-5, ("fast", 128): 1e-5}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(operations, "recorder", Recorder())
    CALLS.clear()
    yield
    operations._disabled.set_global(())


def run(found: tuple[Candidate, ...], stop_after: int | None = None) -> tuple[Tuning, list[Measurement]]:
    """Tunes with TIMES for measurements; Ctrl-C comes after some of them, if asked for."""
    seen: list[Measurement] = []

    def measure(call: Any, arrays: Arrays, rounds: int) -> float:
        assert rounds == 3
        call(**arrays)
        return TIMES[CALLS[-1]]

    def progress(done: int, total: int, measurement: Measurement) -> None:
        seen.append(measurement)
        assert (done, total) == (len(seen), len(found))
        if done == stop_after:
            raise KeyboardInterrupt

    return tune(found, rounds=3, progress=progress, measure=measure), seen


def test_candidates() -> None:
    cpu = find("cpu")
    found = candidates([OP], cpu, None, most=3)
    assert [(c.case.name, c.backend, c.tile_numbers.get("block")) for c in found[:5]] == [
        ("a", "reference", None),
        ("a", "fast", 16),
        ("a", "fast", 32),
        ("a", "fast", 64),
        ("a", "slow", None),
    ]
    assert len(found) == 15
    assert candidates([OP], cpu, {"experts": 8}, most=3) == ()
    long = dataclasses.replace(OP, models=lambda numbers: (case("long", 128),))
    assert [c.backend for c in candidates([long], cpu, None, most=3)] == ["reference", "slow"]
    operations.disable("moe", "slow", "it was wrong")
    assert candidates([long], cpu, None, most=3) == ()


def test_the_fastest_right_one_wins_and_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    result, seen = run(candidates([OP], find("cpu"), None, most=4))
    assert len(seen) == 18
    problems = {(m.backend, m.tiles.get("block", 0)): m.problem for m in seen if m.case == "a"}
    assert "a row is off by" in problems.pop(("fast", 32))
    assert problems.pop(("fast", 64)) == "RuntimeError: RESOURCE_EXHAUSTED: 64 KiB of local memory"
    assert set(problems.values()) == {""}
    n16, n8 = result.rules["moe"]
    assert (n8.backend, dict(n8.tiles), n8.shape, n8.dtype, n8.measured) == (
        "fast",
        {"block": 128},
        "n8",
        "float32",
        True,
    )
    assert n8.source == "measured on cpu: 10.0 µs, the reference 50.0 µs"
    assert n16.shape == "n16"
    assert parse(result.table.read_text(), "table") == result.rules
    # The table is at work at once.
    monkeypatch.setattr(operations, "shipped_rules", lambda name, target: ())
    CALLS.clear()
    assert OP(jnp.ones((4, 8)), factor=2.0)[0, 0] == 2
    assert CALLS == [("fast", 128)]
    assert OP(jnp.ones((4, 9)), factor=2.0)[0, 0] == 2
    assert CALLS[1:] == [("reference", 0)]  # nothing is known of other shapes


def test_an_interrupted_run_goes_on() -> None:
    found = candidates([OP], find("cpu"), None, most=4)
    with pytest.raises(KeyboardInterrupt):
        run(found, stop_after=8)
    journal = path_of(find("cpu")).with_suffix(".measured.jsonl")
    assert journal.read_text().count("\n{") == 8
    # The first case is complete, so its table is there.
    assert [rule.shape for rule in parse(path_of(find("cpu")).read_text(), "table")["moe"]] == ["n8"]
    with journal.open("a") as file:
        file.write('\n{"key": "torn')
    CALLS.clear()
    result, seen = run(found)
    assert len(seen) == len(result.measurements) == 18
    assert [rule.shape for rule in result.rules["moe"]] == ["n16", "n8"]
    CALLS.clear()
    again, _ = run(found)
    assert CALLS == []  # all of it is known
    assert again.rules == result.rules


def test_other_versions_are_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    found = candidates([OP], find("cpu"), None, most=1)
    run(found)
    CALLS.clear()
    monkeypatch.setattr(tuning, "source_hash", lambda op: "changed")
    _, seen = run(found)
    assert CALLS
    assert len(seen) == len(found)


def test_without_a_reference_small_cases_decide() -> None:
    """Where the reference has no room, as attention's logits at long prompts, kernels are checked on small cases."""

    def no_room(x: jax.Array, factor: float) -> jax.Array:
        if x.shape[1] == 16:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return x * factor

    op = dataclasses.replace(
        OP,
        backends=OP.backends | {"reference": Backend(no_room)},
        models=lambda numbers: (case("c", 16),),
    )
    result = tune(candidates([op], find("cpu"), None, most=2), measure=lambda *args, **kwargs: 1e-5)
    by_name = {(m.backend, m.tiles.get("block", 0)): m for m in result.measurements}
    assert by_name["reference", 0].problem.startswith("RuntimeError: RESOURCE_EXHAUSTED")
    assert by_name["fast", 32].problem.startswith("small: a row is off")
    assert by_name["fast", 16].seconds == 1e-5
    assert result.rules["moe"][0].backend in ("fast", "slow")


def test_a_candidate_has_to_run_on_every_case_of_a_shape() -> None:
    def measured(case: str, backend: str, seconds: float | None) -> Measurement:
        return Measurement("moe", case, "float32", "n8", backend, {}, seconds)

    each = [measured("a", "reference", 4e-5), measured("b", "reference", 4e-5), measured("a", "fast", 1e-6)]
    (rule,) = best_rules([*each, measured("b", "fast", None)], "cpu")["moe"]
    assert rule.backend == "reference"
    # Geometric mean: 1 and 9 against 4 and 4.
    (rule,) = best_rules([*each, measured("b", "fast", 9e-5)], "cpu")["moe"]
    assert rule.backend == "fast"
    assert best_rules([measured("a", "fast", None)], "cpu") == {}


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError):
        run(candidates([OP], find("cpu"), None, most=1))


def test_seconds_per_call() -> None:
    x = jnp.ones((256, 256))

    def products(n: int) -> float:
        def f(x: jax.Array) -> jax.Array:
            for _ in range(n):
                x = x @ x * 0.01
            return x

        return seconds_per_call(f, {"x": x}, 5)

    one, twenty = products(1), products(20)
    assert 0 < one < 0.01
    assert twenty > 4 * one  # the loop's calls are neither hoisted nor shared


def test_numbers_of_models() -> None:
    dense = numbers_of(preset("llama-3.1-8b"))
    attention = ((6144, 4096), (4096, 4096))
    assert dense == {"heads": 32, "kv_heads": 8, "head_dim": 128, "hidden": 4096} | {
        "products": (*attention, (28672, 4096), (4096, 14336)),
        "layouts": (),
    }
    routed = numbers_of(preset("mixtral-8x7b"))
    experts = {"experts": 8, "top_k": 2, "intermediate": 14336, "scaled": "output"}
    assert routed == dense | experts | {"products": attention}
    config = preset("llama-3.1-8b")
    few_bits = numbers_of(config.replace(schemes=(("lm_head", "int8"), ("layers.0.attn.o_proj", "int4_g64_min"))))
    assert few_bits["layouts"] == ("int4_g64_min", "int8")


# --- The real operations and the command ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in registry.OPERATIONS if name != "integer_matmul"])  # XLA's on GPUs
@pytest.mark.parametrize("target", ["mi300x", "rx7900xtx", "h100"])
def test_real_candidates(name: str, target: str) -> None:
    """Every kernel has something to tune on every GPU, and the tiles that go into tables come back from there."""
    op = registry.operation(name)
    found = candidates([op], find(target), None, most=4)
    kernel = op.backends["pallas_triton"]
    supported = [c for c in op.models(None) if not kernel.unsupported(find(target), **c.arguments())]
    assert len(supported) > 3
    assert {c.backend for c in found} >= {"reference", "pallas_triton"}
    assert {c.case.name for c in found} >= {case.name for case in supported}
    for candidate in found:
        if candidate.tiles is not None:
            tiles = op.backends[candidate.backend].tiles
            assert tiles is not None
            assert tiles(**json.loads(json.dumps(candidate.tile_numbers))) == candidate.tiles
    with_tiles = [c for c in found if c.backend == "pallas_triton" and c.tiles is not None]
    assert len(with_tiles) > len(supported)


def cli_run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["tune", *args])


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    # The compilation cache would stay in this test's folder for the rest of the process.
    monkeypatch.setattr(runtime, "enable_compilation_cache", lambda: None)
    assert "nothing to measure" in cli_run("--op", "add_rms_norm", "--model", "llama-3.1-8b").stdout
    monkeypatch.setattr(registry, "operation", lambda name: OP)
    dry = cli_run("--op", "moe", "--dry-run", "--most", "1")
    assert "moe, a: fast block=16\n" in dry.stdout
    assert "9 candidates" in dry.stdout
    assert len(json.loads(cli_run("--op", "moe", "--dry-run", "--json").stdout)["candidates"]) == 18
    assert not path_of(find("cpu")).exists()
    done = cli_run("--op", "moe", "--most", "1", "--repeats", "1")
    assert done.exit_code == 0
    assert "[9/9] moe, c: slow: " in done.stderr
    assert f"written to {path_of(find('cpu'))}" in done.stdout
    again = json.loads(cli_run("--op", "moe", "--most", "1", "--json").stdout)
    assert len(again["measurements"]) == 9
    assert {rule["shape"] for rule in again["rules"]["moe"]} == {"n8", "n16"}
    assert cli_run("--op", "rope").exit_code == 2
