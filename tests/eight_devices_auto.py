"""`mesh="auto"` on eight devices; `test_auto_mesh.py` runs these tests in a process of its own, on simulated ones."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from click.testing import CliRunner, Result
from helpers import GOLDENS, tiny_config
from tiny_chat_model import write_chat_model

from llama_jax.checkpoint import open_checkpoint
from llama_jax.cli import cli
from llama_jax.convert import convert
from llama_jax.errors import DoesNotFit
from llama_jax.generation import batch_generate
from llama_jax.library import resolve
from llama_jax.loading import load
from llama_jax.measure import bench
from llama_jax.plan import AutoMesh, automatic, choose_mesh
from llama_jax.targets import find, of_device

SCRIPT = Path(__file__).parents[1] / "scripts" / "batch_generate.py"
GOLDEN = GOLDENS / "llama3.1-rope"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat") / "tiny", layers=2)


@pytest.fixture
def tight(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[AutoMesh], None]:
    """Gives the devices memory for tensor=2 with that workload, and for nothing smaller."""

    def limit(request: AutoMesh) -> None:
        config = open_checkpoint(resolve(folder)).config
        workload = request.workload(config, "float32", 8)
        needs = choose_mesh(config, of_device(jax.devices()[0]), workload, devices=8, usable=0)
        whole, half, *_ = (*needs.rejected, needs.chosen)
        assert half.sizes["tensor"] == 2
        assert half.peak is not None
        assert whole.peak is not None
        assert half.peak < whole.peak
        monkeypatch.setattr(automatic, "free_bytes", lambda devices, target: half.peak)

    return limit


def said_of(model: Path, mesh: Any) -> tuple[dict[str, int] | None, str]:
    """The mesh of a loaded model, and the line that says why."""
    lines: list[str] = []
    loaded, _ = load(model, mesh=mesh, notify=lines.append)
    (line,) = [line for line in lines if line.startswith("Loading on")]
    return (None if loaded.mesh is None else dict(loaded.mesh.shape)), line


# --- load -------------------------------------------------------------------------------------------------------------


def test_a_copy_on_every_device(folder: Path) -> None:
    """`load` expects as many rows as there are devices. The same tokens as on one."""
    mesh, line = said_of(folder, "auto")
    assert mesh == {"data": 8}
    assert line == (
        "Loading on 8 of 8 x cpu (data=8), chosen for 8 rows of 256 tokens in float32: "
        "their memory is not known, so it is taken to fit"
    )
    plain, tokenizer = load(folder)
    split, _ = load(folder, mesh="auto", convert=False)
    assert split.mesh is not None
    prompts = ["The quick", "a"]
    alone, spread = (batch_generate(m, tokenizer, prompts, max_tokens=4) for m in (plain, split))
    assert [o.outputs[0].token_ids for o in spread] == [o.outputs[0].token_ids for o in alone]


def test_the_smallest_split_that_fits(folder: Path, tight: Callable[[AutoMesh], None]) -> None:
    tight(AutoMesh())
    mesh, line = said_of(folder, "auto")
    assert mesh == {"data": 4, "tensor": 2}
    assert "8 of 8 x cpu (data=4, tensor=2)" in line
    assert "; data=8 would need " in line


def test_one_row_needs_one_copy(folder: Path, tight: Callable[[AutoMesh], None]) -> None:
    mesh, line = said_of(folder, AutoMesh(batch=1))
    assert mesh is None
    assert line.startswith("Loading on 1 of 8 x cpu (one device), chosen for 1 row of 256 tokens")
    assert "1 row has no use for more copies" in line
    tight(AutoMesh(batch=1, context=64))
    assert said_of(folder, AutoMesh(batch=1, context=64))[0] == {"tensor": 2}


def test_nothing_fits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "free_bytes", lambda devices, target: 1000)
    with pytest.raises(
        DoesNotFit, match=r"8 rows of 256 tokens in float32 would take [\d.]+ MB of each device \(te"
    ) as e:
        load(folder, mesh="auto")
    assert "1 kB are free on each of 8 x cpu" in e.value.message
    assert "a 16-bit dtype" in e.value.hint


def test_the_default_device_comes_first(folder: Path, tight: Callable[[AutoMesh], None]) -> None:
    third = jax.devices()[3]
    with jax.default_device(third):
        model, _ = load(folder, mesh=AutoMesh(batch=1))
        assert model.device == third
        tight(AutoMesh(batch=1))
        model, _ = load(folder, mesh=AutoMesh(batch=1))
    assert model.mesh is not None
    assert model.mesh.devices.tolist() == [third, jax.devices()[0]]


def test_devices_of_another_kind_are_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(find("cpu"), name="other")
    monkeypatch.setattr(automatic, "of_device", lambda device: other if device.id >= 6 else find("cpu"))
    mesh, line = said_of(folder, "auto")
    assert mesh == {"data": 6}
    assert line.endswith("; other devices are left out: cpu")


# --- Commands ---------------------------------------------------------------------------------------------------------


def run(*args: object, **options: Any) -> Result:
    result = CliRunner().invoke(cli, [str(arg) for arg in args], **options)
    assert result.exit_code == 0, result.output
    return result


def test_generate(folder: Path, tight: Callable[[AutoMesh], None]) -> None:
    args = ("generate", "The", "-m", folder, "--max-tokens", "2", "--json")
    alone, chosen = run(*args), run(*args, "--mesh", "auto")
    assert "Loading on" not in alone.stderr
    assert "Loading on 1 of 8 x cpu" in chosen.stderr
    assert json.loads(chosen.stdout)["device"].startswith("cpu (")
    tight(AutoMesh(batch=1))
    split = json.loads(run(*args, "--mesh", "auto", "--quiet").stdout)
    assert split["device"] == "2 x cpu (tensor=2)"
    assert split["token_ids"] == json.loads(alone.stdout)["token_ids"]


def test_generate_says_what_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "free_bytes", lambda devices, target: 1000)
    result = CliRunner().invoke(cli, ["generate", "The", "-m", str(folder), "--mesh", "auto"])
    assert result.exit_code == 6
    assert "1 row of 256 tokens in float32 would take" in result.stderr


def test_chat(folder: Path) -> None:
    result = run("chat", "-m", folder, "--mesh", "auto", "--max-tokens", "2", "--seed", "1", input="Hi\n")
    assert "Loading on 1 of 8 x cpu" in result.stderr


def test_bench_of_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is made for the largest batch, and no more text than is timed."""
    monkeypatch.setattr(bench, "preset", lambda name: tiny_config(max_position_embeddings=4096))
    monkeypatch.setattr(bench, "measure_ceilings", lambda dtype: bench.Ceilings(1e9, 1e9))
    timed = bench.BenchResult(2, 4, 3, *[1.0] * 7)
    monkeypatch.setattr(bench, "bench", lambda model, ceilings, **options: timed)
    args = (
        "bench",
        "--preset",
        "tiny",
        "--batch",
        "1",
        "--batch",
        "2",
        "--prompt",
        "4",
        "--new",
        "3",
        "--repeats",
        "1",
    )
    result = run(*args, "--mesh", "auto")
    assert "Loading on 2 of 8 x cpu (data=2), chosen for 2 rows of 7 tokens" in result.stderr
    assert "device=2 x cpu (data=2)" in result.stdout


@pytest.mark.parametrize("mesh", ["auto", "data=2,tensor=2", "tensor=4"])
def test_verify(mesh: str, tmp_path: Path) -> None:
    """Three rows, which two groups do not share evenly; key/value heads that are repeated."""
    path = convert(GOLDEN, tmp_path / "model")
    result = run("verify", path, "--expected", GOLDEN / "expected.npz", "--mesh", mesh)
    assert json.loads(result.stdout)["ok"] is True
    shown = "data=4" if mesh == "auto" else mesh.replace(",", ", ")
    assert f"x cpu ({shown}) in float32" in result.stderr
    assert ("Loading on 4 of 8 x cpu" in result.stderr) == (mesh == "auto")


def test_batches(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("batch_generate_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (tmp_path / "in.jsonl").write_text('{"prompt": "The"}\n{"prompt": "a"}\n{"prompt": "Quick"}\n')
    args = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "-m", str(folder), "--max-tokens", "2"]
    assert script.command.main([*args, "--batch-size", "4", "--mesh", "auto"], standalone_mode=False) == 0
    assert "Loading on 4 of 8 x cpu (data=4), chosen for 4 rows" in capfd.readouterr().err
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3
