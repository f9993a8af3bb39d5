"""Models of the Hugging Face hub, against a hub on this machine: downloads, resuming, and every fault it can have."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_hub
import huggingface_hub
import pytest
from fake_hub import COMMIT, FakeHub
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors
from tiny_models import LLAMA, assert_equal, write_gguf, write_hf

from llama_jax import library
from llama_jax.checkpoint import is_checkpoint, open_checkpoint
from llama_jax.errors import (
    CheckpointError,
    DoesNotFit,
    GatedModel,
    LlamaJaxError,
    ModelNotFound,
    NetworkError,
    RequestError,
    StorageError,
    UnsupportedModel,
)
from llama_jax.library import hub_errors as our_hub_errors
from llama_jax.library import transfer

# Most are quick; together they take a while.
pytestmark = pytest.mark.slow

CARD = b"---\nlicense: apache-2.0\n---\n# A model\n"
LLAMA_JAX = [sys.executable, "-m", "llama_jax.cli"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches for each test, and no waiting between attempts."""
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transfer, "PAUSE_S", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def golden(goldens: Path) -> dict[str, bytes]:
    """A sharded checkpoint, with what else lies in a repository."""
    files = fake_hub.files_of(goldens / "llama-bf16-sharded") | {"README.md": CARD, "pytorch_model.bin": b"x" * 9000}
    del files["expected.npz"]
    return files


@pytest.fixture
def hub(golden: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub.serve(dict(golden)) as served:
        fake_hub.use(served.url, tmp_path / "hub", monkeypatch)
        yield served


@pytest.fixture
def one_large(tmp_path: Path, hub: FakeHub) -> FakeHub:
    """The hub with a model in one file of 1.5 MB."""
    write_hf(tmp_path / "made", LLAMA | {"hidden_size": 64, "intermediate_size": 1024})
    hub.files = fake_hub.files_of(tmp_path / "made") | {"README.md": CARD}
    shutil.rmtree(tmp_path / "made")
    return hub


def pull_files(hub: FakeHub) -> None:
    """Downloads the model, which has to arrive byte for byte."""
    source = library.pull("org/name", convert=False, notify=lambda _: None).source
    assert {p.name: p.read_bytes() for p in source.iterdir()} == {
        name: data for name, data in hub.files.items() if name != "pytorch_model.bin"
    }


def digests(path: Path) -> dict[str, str]:
    return {name: tensor.digest for name, tensor in open_checkpoint(path).tensors.items()}


# --- What a pull brings -----------------------------------------------------------------------------------------------


def test_pull(hub: FakeHub, goldens: Path, cache: Path, tmp_path: Path, said: list[str]) -> None:
    seen: list[tuple[int, int, str]] = []
    pulled = library.pull("org/name", notify=said.append, progress=lambda *p: seen.append(p))
    assert pulled.checkpoint == cache / "models" / f"org--name-{COMMIT[:12]}-v1.2"
    source = open_checkpoint(pulled.checkpoint).source
    assert (source.name, source.revision, source.licence) == ("org/name", COMMIT, "apache-2.0")
    from llama_jax.convert import convert

    assert digests(pulled.checkpoint) == digests(convert(goldens / "llama-bf16-sharded", tmp_path / "direct"))
    assert (pulled.revision, pulled.licence, pulled.fresh) == (COMMIT, "apache-2.0", True)
    assert {p.name for p in pulled.source.iterdir()} == hub.files.keys() - {"pytorch_model.bin"}
    assert pulled.nbytes == sum(len(d) for n, d in hub.files.items() if n != "pytorch_model.bin")
    # Said before anything is downloaded: size, licence, commit.
    assert said[0].startswith("Downloading org/name: 5")
    assert "kB in 7 files, licence apache-2.0 (https://huggingface.co/org/name), commit 0123456789ab" in said[0]
    assert seen[0][1] == sum(len(d) for n, d in hub.files.items() if n.startswith("model-"))
    assert not list((tmp_path / "hub").rglob("*.incomplete"))


def test_a_second_pull_downloads_nothing(hub: FakeHub, said: list[str]) -> None:
    first = library.pull("org/name", notify=said.append)
    sent = len(hub.bytes_sent())
    said.clear()
    assert library.pull("org/name", notify=said.append) == first
    assert len(hub.bytes_sent()) == sent == 3
    assert said == []


def test_resolve_needs_the_hub_once(hub: FakeHub, said: list[str], cache: Path) -> None:
    path = library.resolve("org/name", notify=said.append)
    asked = len(hub.requests)
    assert library.resolve("org/name", notify=said.append) == path
    assert library.resolve("org/name@main", notify=said.append) == path
    assert library.resolve(f"org/name@{COMMIT[:8]}", notify=said.append) == path
    assert len(hub.requests) == asked
    assert [m.split()[0] for m in said] == ["Downloading", "Converting"]


def test_a_converted_model_outlives_its_download(hub: FakeHub, tmp_path: Path) -> None:
    path = library.resolve("org/name", notify=lambda _: None)
    shutil.rmtree(tmp_path / "hub")
    asked = len(hub.requests)
    assert library.resolve("org/name") == path
    assert library.resolve(f"org/name@{COMMIT}") == path
    assert library.locate("org/name") == path
    assert len(hub.requests) == asked


def test_pull_sees_a_new_commit(hub: FakeHub, said: list[str]) -> None:
    first = library.pull("org/name", notify=said.append)
    hub.commit = "f" * 40
    hub.files["README.md"] = CARD + b"news\n"
    second = library.pull("org/name", notify=said.append)
    assert second.revision == hub.commit
    assert second.checkpoint != first.checkpoint
    assert len(hub.bytes_sent()) == 3  # the weights are the same
    assert second.checkpoint == library.resolve("org/name")


@pytest.mark.parametrize(("name", "revision"), [("org/name@v1.0", None), ("org/name", "v1.0"), ("org/name", COMMIT)])
def test_revisions(hub: FakeHub, name: str, revision: str | None) -> None:
    pulled = library.pull(name, revision=revision, convert=False, notify=lambda _: None)
    assert pulled.checkpoint is None
    assert pulled.source.name == COMMIT
    assert library.locate(f"org/name@{revision or 'v1.0'}") == pulled.source


@pytest.mark.parametrize(
    ("name", "revision"), [("a/b/c", None), ("here", None), ("org/name@a", "b"), ("org/name", "../x"), ("-x/y", None)]
)
def test_names_that_pull_refuses(name: str, revision: str | None, hub: FakeHub) -> None:
    with pytest.raises(RequestError):
        library.pull(name, revision=revision)
    with pytest.raises(RequestError):
        library.pull(library.DEFAULT_MODEL, revision="main")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("weights", "chosen"),
    [
        (["model.safetensors", "model-1.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"], ["model-1", "model-2"]),
        (["pytorch_model-1.bin", "pytorch_model-2.bin", "x.gguf"], ["pytorch_model-1", "pytorch_model-2"]),
        (["pytorch_model.bin", "consolidated.00.pth"], ["pytorch_model.bin"]),
        (["consolidated.00.pth", "consolidated.01.pth"], ["consolidated.00", "consolidated.01"]),
        (["m.gguf", "training_args.bin"], ["m.gguf"]),
    ],
)
def test_one_copy_of_the_weights(hub: FakeHub, weights: list[str], chosen: list[str]) -> None:
    small = ["config.json", "tokenizer.model", "chat_template.jinja", "LICENSE.txt", "params.json"]
    hub.files = {name: name.encode() for name in [*weights, *small, "picture.png", "train.py", "optimizer.pt"]}
    files = [f.name for f in library.hub.offer("org/name", None).files]
    assert set(files[: len(small)]) == set(small)
    assert [f[: len(c)] for f, c in zip(files[len(small) :], chosen, strict=True)] == chosen


def test_chat_templates_in_their_own_folder(hub: FakeHub) -> None:
    """They come with the model; other folders of the repository do not."""
    hub.files |= {"additional_chat_templates/rag.jinja": b"R", "onnx/config.json": b"{}"}
    pulled = library.pull("org/name", notify=lambda _: None)
    assert (pulled.source / "additional_chat_templates" / "rag.jinja").read_text() == "R"
    assert not (pulled.source / "onnx").exists()
    assert "additional_chat_templates/rag.jinja" in open_checkpoint(pulled.checkpoint).file_digests
    hub.commit = "f" * 40
    hub.files["additional_chat_templates/rag.jinja"] = b"news"
    hub.delivered["additional_chat_templates/rag.jinja"] = b"fake"
    with pytest.raises(CheckpointError, match=r"rag\.jinja was delivered"):
        library.pull("org/name", notify=lambda _: None)
    hub.delivered.clear()
    assert library.pull("org/name", notify=lambda _: None).revision == hub.commit


@pytest.mark.parametrize("weights", [["a.gguf", "b.gguf"], ["adapter.bin"], []])
def test_repositories_without_a_choice(hub: FakeHub, weights: list[str]) -> None:
    hub.files = dict.fromkeys(["config.json", *weights], b"x")
    with pytest.raises(UnsupportedModel) as e:
        library.pull("org/name")
    assert e.value.hint
    assert all(w in e.value.message for w in weights if w.endswith("gguf"))


@pytest.mark.parametrize("config", [False, True])
@pytest.mark.parametrize("parts", [0, 8])
def test_a_repository_with_one_gguf_model(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int, config: bool
) -> None:
    """In one file or in several; many such repositories hold the config.json of the original as well."""
    import llama_jax.convert.gguf_tokenizer as module

    monkeypatch.setattr(module, "tokenizer_files", lambda metadata: {})
    (tmp_path / "made").mkdir()
    leaves = write_gguf(tmp_path / "made" / "m.gguf", LLAMA, tensors_a_part=parts)
    hub.files = fake_hub.files_of(tmp_path / "made") | {"README.md": CARD}
    if config:
        hub.files["config.json"] = json.dumps(LLAMA).encode()
    assert_equal(library.resolve("org/name", notify=lambda _: None), leaves)
    assert library.resolve("org/name") == library.pull("org/name").checkpoint


def test_an_adapter_is_told_from_a_model(hub: FakeHub) -> None:
    hub.files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x", "README.md": CARD}
    with pytest.raises(UnsupportedModel, match="org/name is an adapter") as e:
        library.resolve("org/name", notify=lambda _: None)
    assert "AutoPeftModelForCausalLM.from_pretrained('org/name')" in e.value.hint


def test_the_token_goes_to_the_hub_alone(hub: FakeHub) -> None:
    library.pull("org/name", convert=False, notify=lambda _: None)
    assert {token for kind, token in hub.tokens if kind != "cdn"} == {"Bearer hf_secret"}
    assert {token for kind, token in hub.tokens if kind == "cdn"} == {None}


# --- Breaks and resuming ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends_early", [False, True], ids=["reset", "early end"])
def test_a_broken_connection_is_taken_up_again(one_large: FakeHub, ends_early: bool) -> None:
    one_large.cut_after, one_large.ends_early = [300_000, 200_000], ends_early
    pull_files(one_large)
    ranges = one_large.bytes_sent()
    starts = [int(r.removeprefix("bytes=").removesuffix("-") or 0) for r in ranges]
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert len(ranges) == 3
    # A reset may take back what was on its way; what had arrived is not asked for again.
    assert starts[-1] > 0 or not ends_early


def test_a_connection_that_never_lasts(one_large: FakeHub, tmp_path: Path) -> None:
    one_large.cut_after = [100_000] + [0] * 20
    one_large.ends_early = True
    with pytest.raises(NetworkError) as e:
        library.pull("org/name", notify=lambda _: None)
    assert "cannot be downloaded" in e.value.message
    assert "it resumes" in e.value.hint
    (part,) = (tmp_path / "hub").rglob("*.incomplete")
    assert part.stat().st_size == 100_000
    assert part.read_bytes() == one_large.files["model.safetensors"][:100_000]
    # The next run continues there.
    one_large.cut_after, one_large.requests = [], []
    pull_files(one_large)
    assert one_large.bytes_sent() == ["bytes=100000-"]


def test_a_server_that_knows_no_ranges(one_large: FakeHub) -> None:
    one_large.cut_after, one_large.ends_early, one_large.ignores_ranges = [100_000], True, True
    seen: list[tuple[int, int, str]] = []
    pulled = library.pull("org/name", convert=False, notify=lambda _: None, progress=lambda *p: seen.append(p))
    assert (pulled.source / "model.safetensors").read_bytes() == one_large.files["model.safetensors"]
    assert all(done <= total for done, total, _ in seen)


@pytest.mark.parametrize("left", [b"wrong" * 100, b"x" * 3_000_000], ids=["other bytes", "too long"])
def test_an_unfinished_file_that_is_wrong(one_large: FakeHub, tmp_path: Path, left: bytes) -> None:
    blobs = tmp_path / "hub" / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    part = blobs / f"{one_large.digest('model.safetensors')}.incomplete"
    part.write_bytes(left)
    if len(left) < 1_000_000:
        with pytest.raises(CheckpointError, match=r"model.safetensors was delivered with sha256"):
            library.pull("org/name", notify=lambda _: None)
        assert not part.exists()
    pull_files(one_large)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_then_run_again(one_large: FakeHub, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C in the middle of a file, or worse; the second run asks for the rest only."""
    one_large.pace = 0.05
    env = os.environ | fake_hub.environment(one_large.url, tmp_path / "hub")
    command = [*LLAMA_JAX, "pull", "org/name", "--no-convert"]
    first = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    part = tmp_path / "hub" / "models--org--name" / "blobs" / f"{one_large.digest('model.safetensors')}.incomplete"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 0):
        assert time.monotonic() < deadline, first.poll()
        time.sleep(0.05)
    first.send_signal(number)
    _, stderr = first.communicate(timeout=60)
    if number == signal.SIGINT:
        assert first.returncode == 130
        assert "what was downloaded is kept" in stderr
        assert "Traceback" not in stderr
    kept = part.stat().st_size
    assert 0 < kept < len(one_large.files["model.safetensors"])
    one_large.pace, one_large.requests = 0, []
    second = subprocess.run([*command, "--json"], env=env, capture_output=True, text=True, check=True)
    assert one_large.bytes_sent() == [f"bytes={kept}-"]
    answer = json.loads(second.stdout)
    assert Path(answer["source"], "model.safetensors").read_bytes() == one_large.files["model.safetensors"]
    assert (answer["revision"], answer["checkpoint"], answer["licence"]) == (COMMIT, None, "apache-2.0")


def test_two_pulls_at_once(one_large: FakeHub, tmp_path: Path, cache: Path) -> None:
    one_large.pace = 0.005
    env = os.environ | fake_hub.environment(one_large.url, tmp_path / "hub")
    command = [*LLAMA_JAX, "pull", "org/name", "--no-convert", "--json"]
    runs = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [json.loads(run.communicate(timeout=100)[0]) for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert answers[0]["source"] == answers[1]["source"]
    assert library.locate("org/name") == Path(answers[0]["source"])
    assert one_large.bytes_sent() == [""]


# --- Other bytes than announced ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "config.json"])
@pytest.mark.parametrize("same_size", [True, False])
def test_wrong_bytes(hub: FakeHub, tmp_path: Path, name: str, same_size: bool) -> None:
    right = hub.files[name]
    hub.delivered[name] = bytes([right[0] ^ 1]) + right[1:] + (b"" if same_size else b"more")
    with pytest.raises((CheckpointError, NetworkError)) as e:
        library.pull("org/name", notify=lambda _: None)
    if same_size:
        assert type(e.value) is CheckpointError
        assert name in e.value.message
        assert hub.digest(name) in e.value.message
    assert not (tmp_path / "cache" / "models").exists()
    # Nothing of it is kept, so that the next run is not misled.
    hub.delivered.clear()
    pull_files(hub)


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "config.json"])
def test_wrong_etag(hub: FakeHub, name: str) -> None:
    hub.announced[name] = "ab" * (32 if hub.is_large(name) else 20)
    with pytest.raises(CheckpointError, match=f"{name} was delivered with .* the hub announces .*abab"):
        library.pull("org/name", notify=lambda _: None)


@pytest.mark.parametrize("announced", ["../../../x", "A" * 64, ""])
def test_hashes_that_are_paths(hub: FakeHub, announced: str, tmp_path: Path) -> None:
    hub.announced["model-00001-of-00003.safetensors"] = announced
    with pytest.raises(NetworkError):
        library.pull("org/name", notify=lambda _: None)
    assert not (tmp_path / "hub").exists()


def test_a_file_that_rotted_here_is_found(hub: FakeHub) -> None:
    pulled = library.pull("org/name", convert=False, notify=lambda _: None)
    file = pulled.source / "model-00001-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.resolve().write_bytes(data)
    with pytest.raises(CheckpointError, match="model-00001"):
        library.pull("org/name", notify=lambda _: None)
    pull_files(hub)


# --- The hub says no --------------------------------------------------------------------------------------------------


def refusal(hub: FakeHub, name: str = "org/name", **options: Any) -> LlamaJaxError:
    with pytest.raises(LlamaJaxError) as e:
        library.pull(name, notify=lambda _: None, **options)
    assert e.value.hint
    assert "\n" not in e.value.message + e.value.hint
    return e.value


@pytest.mark.parametrize("kind", ["info", "resolve", "cdn"])
@pytest.mark.parametrize("status", [401, 403])
def test_gated(hub: FakeHub, kind: str, status: int) -> None:
    hub.fail[kind] = (status, {"X-Error-Code": "GatedRepo"})
    e = refusal(hub)
    assert type(e) is GatedModel
    assert "org/name is gated" in e.message
    assert "https://huggingface.co/org/name" in e.hint
    assert "hf auth login" in e.hint
    assert "the one now comes from HF_TOKEN" in e.hint


def test_gated_without_a_token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    hub.fail["resolve"] = (401, {"X-Error-Code": "GatedRepo"})
    e = refusal(hub)
    assert "there is no token now" in e.hint


def test_unknown_repository(hub: FakeHub) -> None:
    e = refusal(hub, "other/name")
    assert type(e) is ModelNotFound
    assert "other/name" in e.message
    hub.fail["info"] = (401, {"X-Error-Code": "RepoNotFound"})
    assert "or it is private" in refusal(hub).message


def test_a_token_that_is_refused(hub: FakeHub) -> None:
    hub.fail["info"] = (401, {"X-Error-Message": "Invalid credentials in Authorization header"})
    e = refusal(hub)
    assert type(e) is GatedModel
    assert "refuses the token" in e.message
    assert "the one now comes from HF_TOKEN" in e.hint


def test_unknown_revision(hub: FakeHub) -> None:
    e = refusal(hub, "org/name@v9")
    assert type(e) is ModelNotFound
    assert "no revision 'v9'" in e.message


def test_a_file_that_is_gone(hub: FakeHub) -> None:
    hub.fail["cdn"] = (404, {})
    assert type(refusal(hub)) is ModelNotFound


@pytest.mark.parametrize("kind", ["info", "tree", "cdn"])
@pytest.mark.parametrize("after", ["120", None, "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_rate_limit(hub: FakeHub, kind: str, after: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", naps.append)
    hub.fail[kind] = (429, {"Retry-After": after} if after else {})
    e = refusal(hub)
    assert type(e) is NetworkError
    assert "HTTP 429" in e.message
    assert ("in 120 seconds" if after == "120" else "later") in e.hint


@pytest.mark.parametrize("kind", ["info", "cdn"])
def test_a_hub_with_a_fault(hub: FakeHub, kind: str) -> None:
    hub.fail[kind] = (503, {})
    e = refusal(hub)
    assert type(e) is NetworkError
    assert "HTTP 503" in e.message
    assert "try again later" in e.hint
    if kind == "cdn":
        assert len(hub.bytes_sent()) >= transfer.ATTEMPTS


@pytest.mark.parametrize("info", [{"sha": None}, {"sha": "../x"}, {"sha": 5}])
def test_a_server_that_is_no_hub(hub: FakeHub, info: dict[str, Any], tmp_path: Path) -> None:
    hub.info = info
    e = refusal(hub)
    assert type(e) is NetworkError
    assert "HF_ENDPOINT" in e.hint
    assert not (tmp_path / "hub").exists()


def test_a_hub_that_never_answers(one_large: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    one_large.hang = True
    e = refusal(one_large)
    assert type(e) is NetworkError
    assert "Timeout" in e.message
    assert "HF_HUB_DOWNLOAD_TIMEOUT" in e.hint


# --- No network -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["offline", "ours", "down", "proxy"])
@pytest.mark.parametrize("cached", [False, True])
def test_without_network(
    hub: FakeHub, how: str, cached: bool, monkeypatch: pytest.MonkeyPatch, said: list[str], tmp_path: Path
) -> None:
    first = library.pull("org/name", convert=False, notify=said.append) if cached else None
    said.clear()
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "ours":
        monkeypatch.setenv("LLAMA_JAX_OFFLINE", "1")
        hub.requests.clear()
    elif how == "down":
        fake_hub.use("http://127.0.0.1:9", tmp_path / "hub", monkeypatch)
    else:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("NO_PROXY", "")
        fake_hub.use("http://hub.invalid", tmp_path / "hub", monkeypatch)
        huggingface_hub.close_session()
    try:
        if first is None:
            e = refusal(hub)
            assert type(e) is NetworkError
            hints = {"offline": "HF_HUB_OFFLINE", "ours": "LLAMA_JAX_OFFLINE", "down": "check the network", "proxy": ""}
            assert hints[how] in e.hint
            with pytest.raises(NetworkError):
                library.resolve("org/name", notify=said.append)
        else:
            again = library.pull("org/name", notify=said.append)
            assert (again.source, again.revision, again.fresh) == (first.source, COMMIT, False)
            assert said[0].startswith(f"Using the copy of org/name on this machine, commit {COMMIT[:12]}")
            assert library.resolve("org/name") == again.checkpoint
            assert again.licence == "apache-2.0"
            assert again.nbytes == first.nbytes
        if how == "ours":
            assert hub.requests == []
    finally:
        huggingface_hub.close_session()


def test_an_incomplete_copy_is_none(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    pulled = library.pull("org/name", convert=False, notify=lambda _: None)
    (pulled.source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="not on this machine") as e:
        library.locate("org/name")
    assert "llama-jax pull org/name" in e.value.hint
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert type(refusal(hub)) is NetworkError
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert is_checkpoint(library.resolve("org/name", notify=lambda _: None))


def response(status: int, **headers: str) -> Any:
    # Which HTTP library it is depends on the version of huggingface_hub.
    http = importlib.import_module(hub_errors.HTTPError.__module__.split(".")[0])
    return http.Response(status, headers=headers, request=http.Request("GET", "https://huggingface.co/x"))


@pytest.mark.parametrize(
    ("error", "expected", "hint"),
    [
        (type("ProxyError", (Exception,), {"__module__": "httpx"})("tunnel failed"), NetworkError, "HTTPS_PROXY"),
        (ConnectionResetError("reset"), NetworkError, "check the network"),
        (TimeoutError(), NetworkError, "HF_HUB_DOWNLOAD_TIMEOUT"),
        (hub_errors.LocalEntryNotFoundError("no net"), NetworkError, "check the network"),
        (OSError("Consistency check failed: file should be of size 3"), NetworkError, "HF_ENDPOINT"),
        (hub_errors.FileMetadataError("no commit"), NetworkError, "HF_ENDPOINT"),
        (hub_errors.HFValidationError("bad name"), ModelNotFound, "spelling"),
        (hub_errors.HfHubHTTPError("no", response=response(403)), GatedModel, "hf auth login"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_of_the_library(error: Exception, expected: type[LlamaJaxError], hint: str) -> None:
    found = our_hub_errors.translated(error, "org/name", None)
    assert type(found) is expected
    assert hint in found.hint
    wrapped = hub_errors.LocalEntryNotFoundError("not here")
    wrapped.__cause__ = error
    assert type(our_hub_errors.translated(wrapped, "org/name", None)) is expected


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), OSError(errno.ENOSPC, "full"), CheckpointError("ours")])
def test_other_errors_are_not_the_hubs(error: Exception) -> None:
    assert our_hub_errors.translated(error, "org/name", None) is None


# --- The disk ---------------------------------------------------------------------------------------------------------


def test_space_is_looked_at_first(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 64 * 2**20 + 60_000  # enough for the download, not for the conversion as well
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, free))
    e = refusal(hub)
    assert type(e) is DoesNotFit
    assert f"{free:,} are free" in e.message
    assert hub.bytes_sent() == []
    assert library.pull("org/name", convert=False, notify=lambda _: None).source.is_dir()


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, DoesNotFit), (errno.EDQUOT, DoesNotFit), (errno.EROFS, StorageError), (errno.EIO, StorageError)],
)
def test_writing_fails(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[LlamaJaxError]
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(transfer, "_append", fail)
        e = refusal(hub)
    assert type(e) is expected
    assert os.strerror(number) in e.message
    if expected is StorageError:
        assert "HF_HOME" in e.hint
    pull_files(hub)


def test_a_hub_cache_that_cannot_be_made(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    fake_hub.use(hub.url, tmp_path / "file" / "below", monkeypatch)
    e = refusal(hub)
    assert type(e) is StorageError
    assert "HF_HOME" in e.hint


def test_contents_that_models_share(hub: FakeHub, tmp_path: Path) -> None:
    """huggingface_hub may keep contents in one store for all models; another place is still refused."""
    pulled = library.pull("org/name", convert=False, notify=lambda _: None)
    store = tmp_path / "hub" / "blobs" / "ab"
    store.mkdir(parents=True)
    blob = (pulled.source / "model-00001-of-00003.safetensors").resolve()
    shutil.move(blob, store / "abc")
    blob.symlink_to(store / "abc")
    assert is_checkpoint(library.resolve("org/name", notify=lambda _: None))
    shutil.rmtree(tmp_path / "cache")
    shutil.move(store / "abc", tmp_path / "elsewhere")
    blob.unlink()
    blob.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        library.resolve("org/name", notify=lambda _: None)


def test_progress_comes_from_the_calling_thread(one_large: FakeHub) -> None:
    one_large.pace = 0.01
    threads, done = set(), []

    def progress(n: int, total: int, name: str) -> None:
        threads.add(threading.get_ident())
        done.append((n, total, name))

    library.pull("org/name", convert=False, notify=lambda _: None, progress=progress)
    size = len(one_large.files["model.safetensors"])
    assert threads == {threading.get_ident()}
    assert len(done) > 2
    assert done == sorted(done)
    assert done[-1] == (size, size, "model.safetensors")


def test_hashes_are_those_of_git_and_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"hello\n")
    assert transfer.git_sha1_of(tmp_path / "x") == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
    assert transfer.sha256_of(tmp_path / "x").startswith("5891b5b522d5df08")  # sha256sum
