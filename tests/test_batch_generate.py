"""Batch files: what a line may hold, and that nothing is lost or doubled, whenever the process dies."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_chat_model import write_chat_model

from llama_jax import batch_generate, encode_chat
from llama_jax.batch_file import Summary, run
from llama_jax.errors import CheckpointError, LlamaJaxError, RequestError, StorageError
from llama_jax.loading import load
from llama_jax.model.loaded import Model
from llama_jax.sampling import SamplingParams
from llama_jax.text.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "batch_generate.py"
SAMPLING = SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=6)

SOME_FAILED = 1
"""Exit code of a complete run over `requests`, some of which are bad."""

Loaded = tuple[Model, Tokenizer]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("batch") / "tiny")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(folder)


def write_input(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def requests(count: int) -> list[Any]:
    """Lines of all kinds and many lengths, some of them bad."""
    rng = random.Random(7)
    lines: list[Any] = []
    for i in range(count):
        ids = [rng.randrange(3, 3000) for _ in range(rng.randrange(1, 30))]
        lines.append({"token_ids": ids, "id": f"é{i}", "max_tokens": rng.randrange(1, 12)})
    lines[3] = {"prompt": "Hello there", "temperature": 0}
    lines[5] = '{"prompt": '
    lines[8] = {"messages": [{"role": "user", "content": "hi"}], "seed": 3}
    lines[9] = {"prompt": "x", "temperature": -1, "id": 9}
    return lines


def start(source: Path, target: Path, folder: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(SCRIPT), str(source), str(target), "--model", str(folder), "--seed", "5"]
    return subprocess.Popen([*command, "--max-tokens", "6", *options], stderr=subprocess.PIPE)


@pytest.mark.slow
def test_results_are_those_of_batch_generate(tmp_path: Path, loaded: Loaded) -> None:
    model, tokenizer = loaded
    messages = [{"role": "user", "content": "hi"}]
    source = write_input(
        tmp_path / "in.jsonl",
        [
            {"prompt": "Once upon a time", "id": "a"},
            {"token_ids": [5, 6, 7], "seed": 11, "max_tokens": 9},
            {"messages": messages, "temperature": 0.0},
            {"token_ids": [9, 9], "n": 2, "id": {"any": ["json"]}},
            {"token_ids": [9, 8], "logprobs": 2, "stop_token_ids": [4], "logit_bias": {"4": 100}},
        ],
    )
    summary = run(model, tokenizer, source, tmp_path / "out.jsonl", sampling=SAMPLING, batch_size=3)
    assert (summary.done, summary.total, summary.errors, summary.interrupted) == (5, 5, 0, False)
    records = read(tmp_path / "out.jsonl")
    assert [r["index"] for r in records] == [0, 1, 2, 3, 4]
    assert [r.get("id") for r in records] == ["a", None, None, {"any": ["json"]}, None]

    def expected(prompt: Any, **fields: Any) -> list[tuple[str, list[int]]]:
        params = SamplingParams(**{"temperature": 0.8, "top_p": 0.9, "max_tokens": 6, **fields})
        return [(c.text, list(c.token_ids)) for c in batch_generate(model, tokenizer, [prompt], params)[0].outputs]

    def got(record: dict[str, Any]) -> list[tuple[str, list[int]]]:
        return [(c["text"], c["token_ids"]) for c in record.get("outputs", [record])]

    # A line's own seed, or the run's plus the line's number.
    assert got(records[0]) == expected("Once upon a time", seed=5)
    assert got(records[1]) == expected([5, 6, 7], seed=11, max_tokens=9)
    assert got(records[2]) == expected(encode_chat(tokenizer, messages), temperature=0.0)
    assert got(records[3]) == expected([9, 9], seed=8, n=2)
    assert records[4]["token_ids"] == [4]
    assert records[4]["finish_reason"] == "stop"
    (first,) = records[4]["logprobs"]
    assert first["token_id"] == 4
    assert set(first["top"]) >= {"4"}
    assert records[0]["prompt_tokens"] == len(tokenizer.encode("Once upon a time"))


BAD = {
    "not JSON": ('{"prompt": ', "line"),
    "not UTF-8": ('{"prompt": "\udcff"}', "line"),
    "a list": ("[1]", "line"),
    "too deep": ("[" * 100_000, "line"),
    "nothing": ({}, "prompt"),
    "two prompts": ({"prompt": "a", "token_ids": [1]}, "token_ids"),
    "typo": ({"prompt": "a", "max_token": 3}, "max_token"),
    "prompt type": ({"prompt": 3}, "prompt"),
    "ids type": ({"token_ids": [1, "2"]}, "token_ids"),
    "bool ids": ({"token_ids": [True]}, "token_ids"),
    "no ids": ({"token_ids": []}, "prompt"),
    "vocabulary": ({"token_ids": [1, 3008]}, "token_ids"),
    "negative id": ({"token_ids": [-1]}, "token_ids"),
    "too long": ({"token_ids": [1] * 256}, "prompt"),
    "no room": ({"token_ids": [1] * 250, "max_tokens": 7}, "max_tokens"),
    "range": ({"prompt": "a", "top_p": 1.5}, "top_p"),
    "NaN": ('{"prompt": "a", "temperature": NaN}', "temperature"),
    "number as text": ({"prompt": "a", "temperature": "hot"}, "temperature"),
    "bias keys": ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    "bias type": ({"prompt": "a", "logit_bias": [1]}, "logit_bias"),
    "bias id": ({"prompt": "a", "logit_bias": {"99999": 1}}, "logit_bias"),
    "stop type": ({"prompt": "a", "stop": 5}, "stop"),
    "stop id type": ({"prompt": "a", "stop_token_ids": 5}, "stop_token_ids"),
    "messages type": ({"messages": "hi"}, "messages"),
    "no messages": ({"messages": []}, "messages"),
    "lone tools": ({"prompt": "a", "tools": []}, "tools"),
    "unknown role": ({"messages": [{"role": "alien", "content": "a"}]}, "messages"),
    "no role": ({"messages": [{"content": "a"}]}, "messages"),
    "no answer": ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 0}, "max_tokens"),
}


def test_bad_lines_become_errors(tmp_path: Path, loaded: Loaded) -> None:
    source = tmp_path / "in.jsonl"
    lines = [line if isinstance(line, str) else json.dumps(line) for line, _ in BAD.values()]
    good = ['{"token_ids": [7], "id": "\\ud800"}', "", json.dumps({"token_ids": [1] * 250})]
    source.write_bytes(b"\xef\xbb\xbf" + "\n".join([*good, *lines]).encode("utf-8", "surrogateescape"))
    summary = run(*loaded, source, tmp_path / "out.jsonl", sampling=SAMPLING)
    assert (summary.total, summary.errors) == (len(BAD) + 2, len(BAD))
    records = {r["index"]: r for r in read(tmp_path / "out.jsonl")}
    assert records.keys() == {0, 2, *range(3, len(BAD) + 3)}
    assert len(records[0]["token_ids"]) == 6
    assert records[0]["id"] == "\ud800"
    assert len(records[2]["token_ids"]) == 6
    wrong = {}
    for index, (name, (_, param)) in enumerate(BAD.items(), 3):
        error = records[index]["error"]
        if error.get("param") != param or not error["hint"]:
            wrong[name] = error
    assert not wrong


@pytest.mark.slow
def test_the_context_bounds_the_common_limit(tmp_path: Path, loaded: Loaded) -> None:
    source = write_input(tmp_path / "in.jsonl", [{"token_ids": [1] * 253, "ignore_eos": True}])
    run(*loaded, source, tmp_path / "out.jsonl", sampling=SAMPLING)
    (record,) = read(tmp_path / "out.jsonl")
    assert (len(record["token_ids"]), record["finish_reason"]) == (3, "length")


def test_strict_stops_before_anything(tmp_path: Path, loaded: Loaded) -> None:
    source, target = write_input(tmp_path / "in.jsonl", requests(12)), tmp_path / "out.jsonl"
    with pytest.raises(RequestError, match="line 6 of the input"):
        run(*loaded, source, target, sampling=SAMPLING, strict=True)
    assert not target.exists()


@pytest.mark.slow
def test_every_cut_heals(tmp_path: Path, loaded: Loaded) -> None:
    """Whatever part of the output a kill has left, the resumed run ends with the same bytes."""
    source, target = write_input(tmp_path / "in.jsonl", requests(24)), tmp_path / "out.jsonl"
    stages: list[bytes] = []
    run(*loaded, source, target, sampling=SAMPLING, batch_size=4, progress=lambda _: stages.append(target.read_bytes()))
    whole = target.read_bytes()
    assert [r["index"] for r in read(target)] == list(range(24))
    assert all(b.startswith(a) for a, b in itertools.pairwise(stages))
    journal = stages[-1]  # in the order of completion, before the final sorting
    assert sorted(journal.split(b"\n")) == sorted(whole.split(b"\n"))
    assert journal != whole
    rng = random.Random(1)
    for cut in [1, len(journal) - 1, *(rng.randrange(len(journal)) for _ in range(4))]:
        target.write_bytes(journal[:cut])
        summary = run(*loaded, source, target, sampling=SAMPLING, batch_size=4)
        assert target.read_bytes() == whole, cut
        kept = journal[:cut].count(b"\n")
        assert (summary.fresh, summary.done) == (24 - kept, 24)
        assert summary.cut == cut - (journal[:cut].rfind(b"\n") + 1)
    # Zeros, as a power failure may leave them, are a torn end, too; and a complete but unsorted file is sorted.
    target.write_bytes(journal[: len(journal) // 2] + b"\0" * 500)
    run(*loaded, source, target, sampling=SAMPLING, batch_size=4)
    assert target.read_bytes() == whole
    target.write_bytes(journal)
    assert run(*loaded, source, target, sampling=SAMPLING, batch_size=4).fresh == 0
    assert target.read_bytes() == whole


@pytest.mark.slow
def test_another_batch_size_may_go_on(tmp_path: Path, loaded: Loaded) -> None:
    source, target = write_input(tmp_path / "in.jsonl", requests(16)), tmp_path / "out.jsonl"
    run(*loaded, source, target, sampling=SAMPLING, batch_size=4)
    whole = target.read_bytes()
    target.write_bytes(b"".join(whole.splitlines(keepends=True)[::3]))
    run(*loaded, source, target, sampling=SAMPLING, batch_size=3)
    assert target.read_bytes() == whole


@pytest.mark.slow
def test_stop_ends_after_the_batch(tmp_path: Path, loaded: Loaded) -> None:
    source, target = write_input(tmp_path / "in.jsonl", requests(16)), tmp_path / "out.jsonl"
    asked = iter([False, False, False, True])
    summary = run(*loaded, source, target, sampling=SAMPLING, batch_size=4, stop=lambda: next(asked, True))
    assert summary.interrupted
    assert 0 < summary.done < 16
    assert len(read(target)) == summary.done
    assert not run(*loaded, source, target, sampling=SAMPLING, batch_size=4).interrupted
    assert [r["index"] for r in read(target)] == list(range(16))


def refused(loaded: Loaded, source: Path, target: Path, **options: Any) -> LlamaJaxError:
    before = target.read_bytes()
    with pytest.raises(LlamaJaxError) as caught:
        run(*loaded, source, target, **{"sampling": SAMPLING, **options})
    assert target.read_bytes() == before
    assert caught.value.hint
    return caught.value


@pytest.mark.slow
def test_other_outputs_are_refused(tmp_path: Path, loaded: Loaded) -> None:
    source, target = write_input(tmp_path / "in.jsonl", requests(12)), tmp_path / "out.jsonl"
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("notes of mine\n")
    assert "exists" in str(refused(loaded, source, foreign))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign.jsonl", "in.jsonl"]
    run(*loaded, source, target, sampling=SAMPLING, identity={"model": "x"})
    whole = target.read_bytes()

    error = refused(loaded, source, target, sampling=SamplingParams(seed=5, max_tokens=6), identity={"model": "x"})
    assert isinstance(error, RequestError)
    assert error.param == "temperature"
    error = refused(loaded, source, target, identity={"model": "y"})
    assert isinstance(error, RequestError)
    assert error.param == "model"
    other = write_input(tmp_path / "other.jsonl", requests(13))
    error = refused(loaded, other, target, identity={"model": "x"})
    assert isinstance(error, RequestError)
    assert error.param == "input"
    assert "same file" in str(refused(loaded, source, source))
    with pytest.raises(RequestError, match="cannot read"):
        run(*loaded, tmp_path / "missing", target, sampling=SAMPLING)
    with pytest.raises(StorageError):
        run(*loaded, source, tmp_path / "no" / "folder.jsonl", sampling=SAMPLING)
    with pytest.raises(StorageError, match="regular"):
        run(*loaded, source, Path(os.devnull), sampling=SAMPLING)

    lines = whole.splitlines(keepends=True)
    same: dict[str, Any] = {"identity": {"model": "x"}}
    for damaged, message in (
        (b"".join([*lines, lines[4]]), "twice"),
        (b"".join([*lines[:3], b"?\n", *lines[3:]]), "4"),
    ):
        target.write_bytes(damaged)
        error = refused(loaded, source, target, **same)
        assert isinstance(error, CheckpointError)
        assert message in error.message
    run(*loaded, source, target, sampling=SAMPLING, overwrite=True, **same)
    assert target.read_bytes() == whole


@pytest.mark.slow
def test_a_second_run_is_kept_out(tmp_path: Path, loaded: Loaded) -> None:
    source, target = write_input(tmp_path / "in.jsonl", requests(12)), tmp_path / "out.jsonl"
    run(*loaded, source, target, sampling=SAMPLING)
    with open(tmp_path / "out.jsonl.meta.json", "r+b") as meta:
        fcntl.flock(meta, fcntl.LOCK_EX)
        for overwrite in (False, True):
            assert "another process" in str(refused(loaded, source, target, overwrite=overwrite))


def test_an_empty_input(tmp_path: Path, loaded: Loaded) -> None:
    source = write_input(tmp_path / "in.jsonl", ["", "  "])
    assert run(*loaded, source, tmp_path / "out.jsonl", sampling=SAMPLING).total == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b""


LINES = 200


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, loaded: Loaded) -> tuple[Path, bytes]:
    """An input of LINES lines for the script, and the output of a run in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source, target = write_input(folder / "in.jsonl", requests(LINES)), folder / "whole.jsonl"
    sampling = SamplingParams(temperature=0.0, seed=5, max_tokens=6)
    summary: Summary = run(*loaded, source, target, sampling=sampling, batch_size=2)
    assert summary.done == LINES
    return source, target.read_bytes()


def kill_when(process: subprocess.Popen[bytes], ready: Callable[[], bool], number: int) -> None:
    deadline = time.monotonic() + 60
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(number)


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def disturbed(source: Path, target: Path, folder: Path, number: int, lines: int) -> tuple[int, bytes]:
    """Runs the script and signals it after so many more lines; its exit code and standard error.

    On a busy machine the run may end before this process sees the lines: then the attempt does not count.
    """
    before = target.read_bytes() if target.exists() else None
    start_at = lines_in(target)
    for _ in range(5):
        process = start(source, target, folder, "--batch-size", "2")
        kill_when(process, lambda: lines_in(target) > start_at + lines, number)
        _, err = process.communicate()
        if process.returncode != SOME_FAILED:
            return process.returncode, err
        target.unlink() if before is None else target.write_bytes(before)
    pytest.fail("the run was never disturbed")


@pytest.mark.slow
def test_interrupt_and_exit_codes(tmp_path: Path, folder: Path, undisturbed: tuple[Path, bytes]) -> None:
    source, whole = undisturbed
    target = tmp_path / "out.jsonl"
    expected = {r["index"]: r for r in map(json.loads, whole.splitlines())}
    for number in (signal.SIGINT, signal.SIGTERM):
        code, err = disturbed(source, target, folder, number, lines=20)
        assert code == 130, err
        assert b"run the same command to resume" in err
        done = read(target)
        assert 20 < len(done) < LINES
        assert all(record == expected[record["index"]] for record in done)
    process = start(source, target, folder, "--batch-size", "2", "--top-p", "0.5")
    _, err = process.communicate()
    assert process.returncode == 2
    assert b"error: " in err
    assert b"hint: " in err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_kills(tmp_path: Path, folder: Path, undisturbed: tuple[Path, bytes]) -> None:
    """Kills at random moments, while starting, between batches and while writing; what is there is never done again."""
    source, whole = undisturbed
    target = tmp_path / "out.jsonl"
    rng = random.Random(3)
    kills = 0
    while kills < 3:
        process = start(source, target, folder, "--batch-size", "2")
        before, more = lines_in(target), (0, 25, rng.randrange(1, 60))[kills]
        kill_when(process, lambda before=before, more=more: lines_in(target) >= before + more, 0)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == SOME_FAILED:
            assert target.read_bytes() == whole
            target.unlink()
    kept = lines_in(target)
    assert 0 < kept < LINES
    process = start(source, target, folder, "--batch-size", "2")
    _, err = process.communicate()
    assert process.returncode == SOME_FAILED, err
    assert f"{kept} of them from before" in err.decode()
    assert target.read_bytes() == whole
    assert not list(tmp_path.glob("*.tmp"))
