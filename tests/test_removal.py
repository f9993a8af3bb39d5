"""`rm` and `list`: what is removed, what never is, and what is said to be on this machine."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_hub
import pytest
from click.testing import CliRunner, Result
from fake_hub import COMMIT, FakeHub
from tiny_models import LLAMA, write_hf

from llama_jax import library
from llama_jax.checkpoint import is_checkpoint
from llama_jax.cli import cli
from llama_jax.convert import convert
from llama_jax.library import bundled, removal

# Most are quick; together they take a while.
pytestmark = pytest.mark.slow


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of models and of the hub."""
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    fake_hub.use("http://127.0.0.1:9", tmp_path / "hub", monkeypatch)
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path, cache: Path) -> Path:
    """A converted model in the cache."""
    write_hf(tmp_path / "hf", LLAMA)
    return library.resolve(tmp_path / "hf", notify=lambda _: None)


@pytest.fixture
def hub(tmp_path: Path, cache: Path, goldens: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub.serve(fake_hub.files_of(goldens / "llama-bf16-sharded")) as served:
        fake_hub.use(served.url, tmp_path / "hub", monkeypatch)
        yield served


def run(*args: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in args], input=stdin)


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


class Writing:
    """Another process that writes a checkpoint: it holds the lock beside it."""

    def __init__(self, path: Path):
        self.lock = path.with_name(path.name + ".lock")

    def __enter__(self) -> None:
        self.lock.parent.mkdir(parents=True, exist_ok=True)
        code = f"import fcntl, os\nfd = os.open({str(self.lock)!r}, os.O_RDWR | os.O_CREAT)\n"
        code += "fcntl.flock(fd, fcntl.LOCK_EX)\nprint('held', flush=True)\ninput()"
        pipe = subprocess.PIPE
        self.child = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True)
        assert self.child.stdout is not None
        assert self.child.stdout.readline() == "held\n"

    def __exit__(self, *_: Any) -> None:
        self.child.communicate("\n")


# --- rm ---------------------------------------------------------------------------------------------------------------


def test_rm(model: Path, cache: Path, tmp_path: Path) -> None:
    size = size_of(model)
    result = run("rm", model.name, model.name, "--yes", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "removed": [{"kind": "model", "name": model.name, "path": str(model), "bytes": size}],
        "freed_bytes": size,
    }
    assert list((cache / "models").iterdir()) == []
    assert (tmp_path / "hf" / "model.safetensors").exists()
    assert library.resolve(tmp_path / "hf", notify=lambda _: None) == model


@pytest.mark.parametrize("args", [[], ["--json"]])
def test_rm_refuses_without_yes_where_nobody_can_be_asked(model: Path, args: list[str]) -> None:
    result = run("rm", model.name, *args)
    assert result.exit_code == 2
    assert "--yes" in result.output
    assert is_checkpoint(model)


@pytest.mark.parametrize(("answer", "code"), [("n", 130), ("", 130), ("y", 0)])
def test_rm_asks_on_a_terminal(model: Path, answer: str, code: int) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "llama_jax.cli", "rm", model.name]
    child = subprocess.Popen(command, stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.write(master, f"{answer}\n".encode())
    _, stderr = child.communicate(timeout=60)
    os.close(master)
    os.close(slave)
    assert child.returncode == code, stderr
    assert str(model) in stderr
    assert is_checkpoint(model) == (code != 0)


@pytest.mark.parametrize("name", ["nothing", "../models", "..", ".", "a/b", "models/../x", "org/name@v1", ""])
def test_rm_unknown_names(model: Path, name: str) -> None:
    result = run("rm", name, "--yes")
    assert result.exit_code in (2, 3), result.output
    assert result.stderr.startswith("error: ")
    assert is_checkpoint(model)


def test_rm_wants_a_name(cache: Path) -> None:
    assert run("rm", "--yes").exit_code == 2


def test_rm_takes_no_path(tmp_path: Path, cache: Path) -> None:
    """A checkpoint of the user's own stays, by whatever name."""
    write_hf(tmp_path / "hf", LLAMA)
    own = convert(tmp_path / "hf", tmp_path / "own")
    result = run("rm", own, "--yes")
    assert result.exit_code == 2
    assert "only models in the cache" in result.stderr
    (cache / "models").mkdir(parents=True)
    (cache / "models" / "link").symlink_to(own)
    result = run("rm", "link", "--yes")
    assert result.exit_code == 73
    assert "is a link" in result.stderr
    assert is_checkpoint(own)
    assert (cache / "models" / "link").is_symlink()


def test_rm_leaves_what_is_being_written(model: Path) -> None:
    with Writing(model):
        result = run("rm", model.name, "--yes")
        assert result.exit_code == 73
        assert "being written" in result.stderr
        assert is_checkpoint(model)
    assert run("rm", model.name, "--yes").exit_code == 0
    assert not model.exists()


def test_rm_that_is_stopped_leaves_no_half_model(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(path: Path) -> None:
        if path.exists():
            (path / "config.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(removal, "remove_path", stop)
        assert run("rm", model.name, "--yes").exit_code == 130
    assert not model.exists()
    assert [m.name for m in library.list_models()] == [library.DEFAULT_MODEL]
    assert library.resolve(tmp_path / "hf", notify=lambda _: None) == model
    freed = json.loads(run("rm", "--tmp", "--yes", "--json").stdout)
    assert [t["kind"] for t in freed["removed"]] == ["leftover"]
    assert sorted(p.name for p in model.parent.iterdir()) == [model.name]


def test_rm_that_cannot(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "rename", fail)
    result = run("rm", model.name, "--yes")
    assert result.exit_code == 73
    assert "Read-only file system" in result.stderr
    assert is_checkpoint(model)


def test_rm_the_default_model(cache: Path, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LLAMA)
    path = convert(tmp_path / "hf", library.converted.default_path())
    kept = cache / "downloads" / bundled.GGUF
    kept.parent.mkdir()
    kept.write_bytes(b"gguf")
    assert run("rm", library.DEFAULT_MODEL, "--yes").exit_code == 0
    assert (path.exists(), kept.exists()) == (False, True)
    assert run("rm", library.DEFAULT_MODEL, "--yes").exit_code == 3
    assert run("rm", library.DEFAULT_MODEL, "--downloads", "--yes").exit_code == 0
    assert not kept.exists()


# --- rm of hub models -------------------------------------------------------------------------------------------------


def test_rm_by_hub_name(hub: FakeHub) -> None:
    old = library.pull("org/name", notify=lambda _: None)
    hub.commit, hub.files["README.md"] = "f" * 40, b"news\n"
    new = library.pull("org/name", notify=lambda _: None)
    assert run("rm", f"org/name@{COMMIT[:9]}", "--yes").exit_code == 0
    assert [is_checkpoint(p.checkpoint) for p in (old, new)] == [False, True]
    assert [p.source.exists() for p in (old, new)] == [True, True]
    assert run("rm", "org/name", "--yes").exit_code == 0
    assert not new.checkpoint.exists()
    result = run("rm", "org/name", "--yes")
    assert result.exit_code == 3
    assert "--downloads" in result.stderr


def test_rm_downloads(hub: FakeHub, tmp_path: Path) -> None:
    old = library.pull("org/name", notify=lambda _: None)
    hub.commit, hub.files["README.md"] = "f" * 40, b"news\n"
    new = library.pull("org/name", notify=lambda _: None)
    before = size_of(tmp_path / "hub")
    # The weights belong to both commits.
    assert run("rm", f"org/name@{COMMIT[:9]}", "--downloads", "--yes").exit_code == 0
    assert [p.source.exists() for p in (old, new)] == [False, True]
    assert all(file.exists() for file in new.source.iterdir())
    result = run("rm", "org/name", "--downloads", "--yes", "--json")
    assert [t["kind"] for t in json.loads(result.stdout)["removed"]] == ["model", "download"]
    assert not list((tmp_path / "hub").rglob("*.safetensors"))
    assert size_of(tmp_path / "hub") < before / 10
    with pytest.raises(library.ModelNotFound):
        library.locate("org/name")


def test_rm_unfinished_downloads(cache: Path, tmp_path: Path) -> None:
    part = tmp_path / "hub" / "models--org--name" / "blobs" / ("a" * 64 + ".incomplete")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 100)
    other = shutil.copytree(tmp_path / "hub" / "models--org--name", tmp_path / "hub" / "models--org--other")
    answer = json.loads(run("rm", "org/name", "--downloads", "--yes", "--json").stdout)
    assert answer["freed_bytes"] == 100
    assert not part.exists()
    assert (other / "blobs" / part.name).exists()


def test_rm_leaves_what_is_being_downloaded(hub: FakeHub) -> None:
    pulled = library.pull("org/name", convert=False, notify=lambda _: None)
    lock = library.hub_cache.lock_path("org/name")
    with Writing(lock.with_suffix("")):
        assert run("rm", "org/name", "--downloads", "--yes").exit_code == 73
    assert library.locate("org/name") == pulled.source


# --- rm --tmp ---------------------------------------------------------------------------------------------------------


def test_rm_tmp(model: Path, cache: Path, tmp_path: Path) -> None:
    folder = cache / "models"
    for name in ("a.partial", "b.llama_jax-old", "c.llama_jax-removed"):
        (folder / name / "params.partial_save").mkdir(parents=True)
        (folder / name / "params.partial_save" / "data").write_bytes(b"x" * 50)
    (folder / "a.partial" / "unfinished.llama_jax").touch()
    (folder / "b").mkdir()  # a replaced checkpoint is left over only where its successor is in place
    (folder / "d.lock").touch()
    (cache / "downloads" / "fetching-abc").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "precious").mkdir()
    (folder / "e.partial").symlink_to(tmp_path / "precious")
    with Writing(folder / "busy"):
        (folder / "busy.partial").mkdir()
        result = run("rm", "--tmp", "--yes", "--json")
        assert result.exit_code == 0, result.output
        answer = json.loads(result.stdout)
        left = {p.name for p in folder.iterdir()}
    assert left == {model.name, "b", "notes.txt", "busy.partial", "busy.lock", "e.partial"}
    assert (tmp_path / "precious").is_dir()
    assert not list((cache / "downloads").iterdir())
    assert answer["freed_bytes"] == 150
    assert {t["kind"] for t in answer["removed"]} == {"leftover"}
    assert json.loads(run("rm", "--tmp", "--yes", "--json").stdout)["freed_bytes"] == 0


def test_rm_tmp_without_a_cache(cache: Path) -> None:
    assert run("rm", "--tmp", "--json").stdout == '{"removed": [], "freed_bytes": 0}\n'
    assert not cache.exists()


def test_locks_are_seen(tmp_path: Path) -> None:
    from llama_jax.disk import is_locked

    path = tmp_path / "x.lock"
    assert not is_locked(path)
    with path.open("w") as file:
        assert not is_locked(path)
        fcntl.flock(file, fcntl.LOCK_EX)
        assert is_locked(path)
    assert not is_locked(path)


# --- list -------------------------------------------------------------------------------------------------------------


def test_list_downloads(hub: FakeHub, tmp_path: Path) -> None:
    hub.files["README.md"] = b"---\nlicense: mit\n---\n"
    pulled = library.pull("org/name", convert=False, notify=lambda _: None)
    bert = tmp_path / "hub" / "models--some--bert" / "snapshots" / ("b" * 40)
    bert.mkdir(parents=True)
    (bert / "config.json").write_text('{"model_type": "bert"}')
    listed = json.loads(run("list", "--json").stdout)
    (found,) = listed["downloads"]
    size = sum(p.stat().st_size for p in pulled.source.iterdir())
    date = found.pop("downloaded")
    assert date.startswith("20")
    assert date.endswith("Z")
    assert found == {
        "name": "org/name",
        "path": str(pulled.source),
        "revision": COMMIT,
        "complete": True,
        "bytes": size,
        "licence": "mit",
    }
    assert listed["hub_cache"] == str(tmp_path / "hub")
    assert listed["download_bytes"] == size
    text = run("list").stdout
    assert "downloaded, not converted yet" in text
    assert "1 only downloaded" in text
    assert json.loads(run("show", "org/name", "--json").stdout)["revision"] == COMMIT
    assert run("show", "org/name").stdout.count("org/name") >= 2
    (pulled.source / "model-00002-of-00003.safetensors").unlink()
    assert "`llama-jax pull org/name`" in run("list").stdout
    library.pull("org/name", notify=lambda _: None)
    listed = json.loads(run("list", "--json").stdout)
    assert listed["downloads"] == []
    assert (listed["models"][1]["revision"], listed["models"][1]["licence"]) == (COMMIT, "mit")
    assert COMMIT[:12] in run("list").stdout


def test_downloads_of_other_revisions(hub: FakeHub) -> None:
    library.pull("org/name@v1.0", convert=False, notify=lambda _: None)
    assert [d.name for d in library.list_downloads()] == ["org/name@v1.0"]


def test_pull_on_the_command_line(hub: FakeHub, cache: Path) -> None:
    result = run("pull", "org/name", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert list(answer) == ["name", "revision", "licence", "source", "checkpoint", "bytes", "fresh", "seconds"]
    assert is_checkpoint(answer["checkpoint"])
    again = run("pull", "org/name")
    assert again.stdout == f"{answer['checkpoint']}\n"
    assert f"revision {COMMIT}" in again.stderr
    assert run("pull", "org/name", "--quiet").stderr == ""
    hub.fail["info"] = (403, {"X-Error-Code": "GatedRepo"})
    refused = run("pull", "org/name")
    assert refused.exit_code == 3
    error, hint = refused.stderr.splitlines()
    assert error.startswith("error: org/name is gated")
    assert "https://huggingface.co/org/name" in hint


def test_convert_takes_hub_names(hub: FakeHub, tmp_path: Path) -> None:
    result = run("convert", "org/name@v1.0", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(run("show", tmp_path / "out", "--json").stdout)
    assert (facts["source"], facts["revision"]) == ("huggingface org/name", COMMIT)
