"""Whole runs of `llama-jax train` on a tiny model: results, resuming, interruptions."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_chat_model import write_chat_model

import llama_jax as lj
from llama_jax.adapters import load_adapter
from llama_jax.errors import CheckpointError, RequestError
from llama_jax.training import Batch, checkpoints, loss, read_texts, settings_from, train
from llama_jax.training.metrics import Watch

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "seven", "small", "birds"]
COMMAND = [sys.executable, "-m", "llama_jax.cli", "train"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers, and 60 conversations."""
    folder = tmp_path_factory.mktemp("training")
    write_chat_model(folder / "hf", layers=2)
    rng = np.random.default_rng(0)

    def text(count: int) -> str:
        return " ".join(rng.choice(WORDS, count))

    lines = [
        {
            "messages": [
                {"role": "user", "content": text(4)},
                {"role": "assistant", "content": text(int(rng.integers(3, 20)))},
            ]
        }
        for _ in range(60)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def values(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(folder / "hf"),
        "output": str(output),
        "method": "full",
        "steps": 8,
        "data": {"files": [str(folder / "train.jsonl")]},
        "rows": {"length": 96, "rows": 4, "parts": 2},
        "optimizer": {"learning_rate": 0.01, "schedule": "cosine", "warmup": 2},
        "saving": {"every": 3},
    } | changes


def losses(output: Path) -> list[tuple[int, float, float]]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


@pytest.mark.slow
def test_a_stopped_run_resumes_with_the_same_numbers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(settings_from(values(folder, tmp_path / "whole")))
    told: list[int] = []
    settings = settings_from(values(folder, tmp_path / "stopped"))
    stopped = train(settings, told=lambda m: told.append(m.step), stop=lambda: len(told) >= 3)
    assert (stopped.step, stopped.path) == (4, None)
    notes: list[str] = []
    done = train(settings, notify=notes.append)
    assert "Resuming after step 4 of 8" in notes
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert [step for step, *_ in losses(tmp_path / "whole")] == list(range(1, 9))
    assert whole.loss == done.loss == losses(tmp_path / "whole")[-1][1] < losses(tmp_path / "whole")[0][1]
    assert sorted(os.listdir(tmp_path / "stopped" / "checkpoints")) == ["00000006", "00000008"]
    model, tokenizer = lj.load(done.path)
    assert lj.generate(model, tokenizer, "the cat", max_tokens=3)
    with pytest.raises(RequestError, match="of a run with other settings"):
        train(settings_from(values(folder, tmp_path / "stopped", seed=1)))
    monkeypatch.setattr(checkpoints, "_digest", lambda x: "another")
    with pytest.raises(CheckpointError, match=r"00000008 cannot be read: the digest of \..* differs"):
        train(settings)


def test_numbers_that_are_not_finite_end_a_run() -> None:
    told: list[int] = []
    watch = Watch(3, lambda step: 1.0, lambda seconds, lengths: 0.0, lambda measured: told.append(measured.step))
    for number, (value, norm) in enumerate([(1.0, 2.0), (1.0, math.inf), (math.nan, 2.0)]):
        watch.dispatched(number, {"loss": value, "tokens": 3, "grad_norm": norm}, [3])  # type: ignore[dict-item]
        if number == 0:
            watch.finish()
            continue
        with pytest.raises(RequestError, match=f"step {number + 1}: the loss is {value}") as caught:
            watch.finish()
        assert "learning_rate" in caught.value.hint
    assert told == [1]


@pytest.mark.slow
def test_a_run_that_diverges_saves_no_state_after_it(folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"optimizer": {"learning_rate": 1e30}, "saving": {"every": 1}}
    with pytest.raises(RequestError, match="step 2: the loss is"):
        train(settings_from(values(folder, tmp_path / "run", **changes)))
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["00000001"]
    assert [step for step, *_ in losses(tmp_path / "run")] == [1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_is_not_resumed_on_another_base(method: str, folder: Path, tmp_path: Path) -> None:
    """A base is known by its weights: files that were written again are the same base."""
    weights = shutil.copytree(folder / "hf", tmp_path / "base") / "model.safetensors"
    settings = settings_from(values(folder, tmp_path / "run", method=method, model=str(tmp_path / "base"), steps=4))

    def run_a_step() -> int:
        told: list[int] = []
        return train(settings, told=lambda m: told.append(m.step), stop=lambda: len(told) >= 1).step

    first = run_a_step()
    tensors = load_file(weights)
    save_file(tensors, weights)
    assert run_a_step() > first
    name = next(name for name in tensors if "down_proj" in name)
    save_file(tensors | {name: tensors[name] * 2}, weights)
    with pytest.raises(RequestError, match="of a run with other base weights") as caught:
        train(settings)
    assert "another folder" in caught.value.hint


@pytest.mark.slow
def test_an_adapter_is_trained_and_saved_as_peft_does(folder: Path, tmp_path: Path) -> None:
    lora = {"rank": 2, "targets": ["q_proj", "down_proj"]}
    compute = {"weights": "int8"}
    wanted = values(folder, tmp_path / "run", method="lora", lora=lora, compute=compute, steps=6)
    wanted["data"] |= {"validation": wanted["data"]["files"]}
    done = train(settings_from(wanted))
    model, _ = lj.load(folder / "hf")
    assert done.path is not None
    adapter = load_adapter(done.path, model.config)
    assert adapter.rank == 2
    assert {leaf.rpartition(".")[2] for leaf in adapter.leaves} == {"q_proj", "down_proj"}
    assert all(np.abs(x["b"]).max() > 0 for x in adapter.leaves.values())
    about = json.loads((done.path / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(folder / "hf")
    adapted, tokenizer = lj.load(folder / "hf", adapter=done.path)
    assert lj.perplexity(adapted, tokenizer, "the cat sat") < 0.9 * lj.perplexity(model, tokenizer, "the cat sat")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validated = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert len(validated) == 2
    assert validated[1] < validated[0]


@pytest.mark.slow
def test_validation_counts_each_text_once(folder: Path, tmp_path: Path) -> None:
    """Though its texts do not fill whole steps."""
    held_out, nothing = tmp_path / "held_out.jsonl", tmp_path / "nothing.jsonl"
    held_out.write_text("".join(json.dumps({"text": " ".join(WORDS[:n])}) + "\n" for n in (2, 12, 6)))
    nothing.write_text("\n")
    wanted = values(folder, tmp_path / "run", steps=1, rows={"length": 64, "rows": 2, "pack": False})
    wanted["data"] |= {"validation": [str(held_out)]}
    done = train(settings_from(wanted))
    model, tokenizer = lj.load(done.path)
    texts = read_texts([held_out], tokenizer, length=64).texts
    losses = [loss(model.params, model.config, Batch(text.tokens[None], text.tokens[None])) for text in texts]
    total, count = np.sum(losses, axis=0)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    (found,) = (line["validation_loss"] for line in lines if "validation_loss" in line)
    np.testing.assert_allclose(found, total / count, rtol=1e-5)
    wanted["data"] |= {"validation": [str(nothing)]}
    with pytest.raises(RequestError, match=r"data\.validation: of 0 lines"):
        train(settings_from(wanted))


def toml(settings: dict[str, Any]) -> str:
    tables = {name: value for name, value in settings.items() if isinstance(value, dict)}
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items() if name not in tables]
    for table, inner in tables.items():
        lines += [f"[{table}]", *(f"{name} = {json.dumps(value)}" for name, value in inner.items())]
    return "\n".join(lines)


def wait_for_step(output: Path, step: int, process: subprocess.Popen[str]) -> None:
    metrics = output / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"ended before step {step}: {process.communicate()}")


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    """200 steps, with kill -9 twice and Ctrl-C once in between."""
    changes: dict[str, Any] = {"steps": 200, "saving": {"every": 10}}
    train(settings_from(values(folder, tmp_path / "whole", **changes)))
    output = tmp_path / "killed"
    config = tmp_path / "run.toml"
    config.write_text(toml(values(folder, output, **changes)))
    for step, number in ((37, signal.SIGKILL), (95, signal.SIGINT), (141, signal.SIGKILL)):
        process = subprocess.Popen([*COMMAND, str(config)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for_step(output, step, process)
        process.send_signal(number)
        _, errors = process.communicate()
        if number == signal.SIGINT:
            assert process.returncode == 130
            assert "resumes there" in errors
        else:
            assert process.returncode == -signal.SIGKILL
    done = subprocess.run([*COMMAND, str(config), "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["step"] == 200
    assert losses(output) == losses(tmp_path / "whole")
    assert len(losses(output)) == 200
