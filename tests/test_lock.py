"""model.lock.json, and whether a checkpoint still is what its source gives."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import DTYPES, LLAMA, MIXTRAL, random_leaves, write_gguf, write_hf
from xxhash import xxh3_128_hexdigest

from llama_jax import disk
from llama_jax.checkpoint import open_checkpoint, save, verify, write
from llama_jax.checkpoint.lock import read_lock
from llama_jax.cli import cli
from llama_jax.config import config_from_hf
from llama_jax.convert import convert, run
from llama_jax.convert.file_hashes import FileHashes
from llama_jax.convert.hf import HuggingFaceFolder
from llama_jax.convert.leaves import read_ahead
from llama_jax.convert.verify import verify_source
from llama_jax.errors import CheckpointError
from llama_jax.params import unflatten


def xxh3(array: np.ndarray) -> str:
    return "xxh3_128:" + xxh3_128_hexdigest(array.tobytes())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def changed(path: Path, offset: int) -> None:
    """Flips a bit that keeps a small float32 finite."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


# --- What it says -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_lock_of_a_folder(tmp_path: Path, dtype: str | None) -> None:
    leaves = write_hf(tmp_path / "hf", MIXTRAL, shards=3)
    path = convert(tmp_path / "hf", tmp_path / "out", dtype=dtype, name="org/name", revision="abc")
    value = json.loads((path / "model.lock.json").read_text())
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert value["source_files"] == [{"name": p.name, "bytes": p.stat().st_size, "sha256": sha256(p)} for p in shards]
    assert value["source"] == {
        "kind": "huggingface",
        "name": "org/name",
        "revision": "abc",
        "licence": None,
        "quantization": None,
    }
    assert value["dtype"] == dtype
    assert value["lock_version"] == 1
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())["weight_map"]
    assert value["tensors"].keys() == leaves.keys()
    for name, tensor in value["tensors"].items():
        assert tensor["source_digest"] == xxh3(leaves[name])
        assert tensor["digest"] == xxh3(leaves[name].astype(DTYPES[dtype or "float32"]))
        assert all(index[t["tensor"]] == t["file"] for t in tensor["from"])
    experts = value["tensors"]["layers.1.moe.experts.up_proj.weight"]["from"]
    assert [t["tensor"] for t in experts] == [
        f"model.layers.1.block_sparse_moe.experts.{e}.w3.weight" for e in range(3)
    ]
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert value["files"][name] == "xxh3_128:" + xxh3_128_hexdigest((path / name).read_bytes())
    assert read_lock(path).origins["embed.weight"].tensors == (
        ("model.embed_tokens.weight", index["model.embed_tokens.weight"]),
    )


@pytest.mark.usefixtures("without_tokenizer")
def test_lock_of_a_gguf_file(tmp_path: Path) -> None:
    leaves = write_gguf(tmp_path / "m.gguf", LLAMA)
    path = convert(tmp_path / "m.gguf", tmp_path / "out")
    lock = read_lock(path)
    (file,) = lock.source_files
    assert (file.name, file.sha256) == ("m.gguf", sha256(tmp_path / "m.gguf"))
    # The digest is of the leaf as it is computed with: the file's rows are in another order.
    name = "layers.0.attn.q_proj.weight"
    assert lock.origins[name].digest == lock.tensors[name] == xxh3(leaves[name])
    assert lock.origins[name].tensors == (("blk.0.attn_q.weight", "m.gguf"),)


def test_lock_of_arrays(tmp_path: Path) -> None:
    config = config_from_hf(LLAMA)
    leaves = random_leaves(config)
    lock = read_lock(save(tmp_path / "out", unflatten(leaves), config))
    assert lock.tensors == {name: xxh3(leaf) for name, leaf in leaves.items()}
    assert lock.source_files == ()
    assert lock.origins == {}


def test_sources_without_provenance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source may leave it out: then the lock names the files of its folder and no tensors."""

    class Silent:
        """A source with all that the protocol asks for, and no more."""

        def __init__(self, path: Path, **options: Any):
            self._source = HuggingFaceFolder(path, **options)
            for name in ("path", "config", "source", "generation_config", "files", "dtype", "read", "close"):
                setattr(self, name, getattr(self._source, name))

    write_hf(tmp_path / "hf", LLAMA, shards=2)
    monkeypatch.setattr("llama_jax.convert.hf.HuggingFaceFolder", Silent)
    lock = read_lock(convert(tmp_path / "hf", tmp_path / "out"))
    assert [f.sha256 for f in lock.source_files] == [sha256(p) for p in sorted((tmp_path / "hf").glob("*.safetensors"))]
    assert lock.origins["embed.weight"].tensors == ()
    assert verify_source(tmp_path / "out", tmp_path / "hf").ok


# --- Against the source -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source "hf" and what was made of it, "out" and (in bfloat16) "cast"."""
    folder = tmp_path_factory.mktemp("sound")
    write_hf(folder / "hf", LLAMA, shards=2)
    convert(folder / "hf", folder / "out")
    convert(folder / "hf", folder / "cast", dtype="bfloat16")
    return folder


@pytest.mark.parametrize("checkpoint", ["out", "cast"])
def test_a_copy_of_the_source_is_the_same(sound: Path, tmp_path: Path, checkpoint: str) -> None:
    copy = shutil.copytree(sound / "hf", tmp_path / "elsewhere")
    steps: list[tuple[int, int, str]] = []
    report = verify_source(sound / checkpoint, copy, lambda *s: steps.append(s))
    assert report.ok
    assert report.failures == ()
    assert report.tensors == len(steps) == 21
    assert steps[-1][0] == steps[-1][1] == report.bytes


def flip_in_tensor(hf: Path) -> None:
    changed(hf / "model-00001-of-00002.safetensors", -40)


def flip_in_header(hf: Path) -> None:
    """Of no tensor, and of no consequence: yet another file."""
    path = hf / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"pu"', 1))


def edit_config(hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))


def edit_tokenizer(hf: Path) -> None:
    (hf / "tokenizer.json").write_text('{"version": "2.0"}')


def rename_shard(hf: Path) -> None:
    index = (hf / "model.safetensors.index.json").read_text()
    (hf / "model.safetensors.index.json").write_text(index.replace("00002-of", "00003-of"))
    (hf / "model-00002-of-00002.safetensors").rename(hf / "model-00003-of-00002.safetensors")


def add_template(hf: Path) -> None:
    (hf / "chat_template.jinja").write_text("{{ messages }}")


CHANGES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "tensor": (flip_in_tensor, ["file model-00001-of-00002.safetensors has", "tensor .* has digest"]),
    "header": (flip_in_header, ["file model-00001-of-00002.safetensors has"]),
    "config": (edit_config, ["gives config.json with digest"]),
    "tokenizer": (edit_tokenizer, ["gives tokenizer.json with digest"]),
    "shard": (rename_shard, ["lacks file model-00002", "has weights in file model-00003"]),
    "template": (add_template, ["gives chat_template.jinja with digest xxh3_128:.*, the checkpoint has None"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_has_changed(sound: Path, tmp_path: Path, change: str) -> None:
    import re

    edit, expected = CHANGES[change]
    copy = shutil.copytree(sound / "hf", tmp_path / "hf")
    edit(copy)
    report = verify_source(sound / "out", copy)
    assert not report.ok
    assert len(report.failures) == len(expected)
    for pattern in expected:
        assert any(re.search(pattern, failure) for failure in report.failures), report.failures


def test_another_model(sound: Path, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LLAMA | {"num_hidden_layers": 3}, seed=1)
    failures = "\n".join(verify_source(sound / "out", tmp_path / "hf").failures)
    assert "gives tensor layers.2.attn.q_proj.weight, which the checkpoint does not have" in failures
    write_hf(tmp_path / "small", LLAMA | {"num_hidden_layers": 1})
    failures = "\n".join(verify_source(sound / "out", tmp_path / "small").failures)
    assert "does not give tensor layers.1.attn.q_proj.weight" in failures


def test_command_line(sound: Path, tmp_path: Path) -> None:
    run_cli = CliRunner().invoke
    good = run_cli(cli, ["verify", str(sound / "out"), "--source", str(sound / "hf")])
    assert good.exit_code == 0, good.output
    assert "gives the same" in good.stdout
    copy = shutil.copytree(sound / "hf", tmp_path / "hf")
    flip_in_tensor(copy)
    bad = run_cli(cli, ["verify", str(sound / "out"), "--source", str(copy)])
    assert bad.exit_code == 4
    assert "model-00001-of-00002.safetensors" in bad.stderr
    as_json = run_cli(cli, ["verify", str(sound / "out"), "--source", str(copy), "--json"])
    assert as_json.exit_code == 4
    assert json.loads(as_json.stdout)["ok"] is False


def test_a_lock_that_disagrees(sound: Path, tmp_path: Path) -> None:
    """Lock and marker changed together, as no single fault would: the tensors' own digests are in a third place."""
    path = shutil.copytree(sound / "out", tmp_path / "out")
    lock = json.loads((path / "model.lock.json").read_text())
    lock["tensors"]["embed.weight"]["digest"] = lock["tensors"]["lm_head.weight"]["digest"]
    lock["source"]["revision"] = "abc"
    lock["files"]["tokenizer.json"] = "xxh3_128:0"
    (path / "model.lock.json").write_text(json.dumps(lock))
    failures = "\n".join(verify(path).failures)
    assert "model.lock.json has digest" in failures
    assert "tensor embed.weight has digest" in failures
    assert "name different sources" in failures
    assert "list other files or digests" in failures


@pytest.mark.parametrize("text", ["{}", "[]", '{"lock_version": 2}', '{"lock_version": 1, "source": {"x": 1}}', "{"])
def test_damaged_locks(sound: Path, tmp_path: Path, text: str) -> None:
    path = shutil.copytree(sound / "out", tmp_path / "out")
    (path / "model.lock.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.lock\.json"):
        read_lock(path)
    assert not verify(path).ok


# --- The machinery ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 300), max_size=30))
def test_batches(sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "BATCH_BYTES", 100)
        named = {str(i): size for i, size in enumerate(sizes)}
        groups = write.batches(named)
    assert [name for group in groups for name in group] == list(named)
    for group in groups:
        assert len(group) == 1 or sum(named[name] for name in group) <= 100
    for one, other in itertools.pairwise(groups):
        assert sum(named[name] for name in one) + named[other[0]] > 100


@given(st.lists(st.lists(st.integers(1, 120), max_size=5), max_size=12))
def test_read_ahead_stays_within_its_limit(batches: list[list[int]]) -> None:
    """Whatever the sizes: results in order, never more than the limit held but for one large item, and no deadlock."""
    batches = [batch for batch in batches if len(batch) == 1 or sum(batch) <= 100]
    held, most, guard = [0], [0], threading.Lock()

    def read(size: int) -> int:
        with guard:
            held[0] += size
            most[0] = max(most[0], held[0])
        return size

    with read_ahead(batches, read, int, 100) as results:
        found = []
        for batch in results:
            found.append(list(batch))
            with guard:
                held[0] -= sum(batch)
    assert found == batches
    assert most[0] <= max([100, *(size for batch in batches for size in batch)])


def test_read_ahead_raises_what_the_reader_raised() -> None:
    def read(n: int) -> int:
        if n == 3:
            raise CheckpointError("three")
        return n

    with read_ahead([[1], [2], [3], [4]], read, int, 100) as results:
        assert [list(next(results)), list(next(results))] == [[1], [2]]
        with pytest.raises(CheckpointError, match="three"):
            next(results)


def test_read_ahead_ends_with_its_user() -> None:
    before = threading.active_count()
    with read_ahead([[60]] * 50, lambda n: n, int, 100) as results:
        next(results)
    assert threading.active_count() == before


@given(st.binary(max_size=5000), st.lists(st.integers(0, 6000), max_size=6))
def test_file_hashes(data: bytes, ends: list[int]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        one, other = Path(folder, "one"), Path(folder, "other")
        one.write_bytes(data)
        other.write_bytes(data[::-1])
        with FileHashes([one, other], keep=False) as hashes:
            for end in ends:
                hashes.follow(one, end)
            found = hashes.finish()
        assert found == {one: sha256(one), other: sha256(other)}


def test_file_hashes_skip_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    with FileHashes([tmp_path / "a"], {tmp_path / "a": "known"}) as hashes:
        assert hashes.finish() == {tmp_path / "a": "known"}


def test_file_hashes_of_a_missing_file(tmp_path: Path) -> None:
    with FileHashes([tmp_path / "none"]) as hashes, pytest.raises(CheckpointError, match=r"cannot read .*none"):
        hashes.finish()


def test_large_models_leave_the_file_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of a model that would crowd the memory is let go: the source's once hashed, ours once on the disk."""
    write_hf(tmp_path / "hf", LLAMA)
    forgotten: set[Path] = set()

    def forget(fd: int, start: int, length: int) -> None:
        forgotten.add(Path(os.readlink(f"/proc/self/fd/{fd}")))

    monkeypatch.setattr(disk, "forget", forget)
    monkeypatch.setattr("llama_jax.convert.file_hashes.forget", forget)
    convert(tmp_path / "hf", tmp_path / "small")
    assert forgotten == set()
    monkeypatch.setattr(disk, "fits_file_cache", lambda nbytes: False)
    convert(tmp_path / "hf", tmp_path / "large")
    assert tmp_path / "hf" / "model.safetensors" in forgotten
    assert any("ocdbt.process_0/d/" in str(path) for path in forgotten)
    monkeypatch.undo()
    assert disk.fits_file_cache(1)
    assert not disk.fits_file_cache(1 << 60)


def test_resumed_conversions_hash_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "hf", LLAMA, shards=2)
    monkeypatch.setattr(write, "BATCH_BYTES", 3000)

    def stop(done: int, total: int, name: str) -> None:
        time.sleep(0.05)  # the first file's hash is done by then
        if done > 0.9 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "hf", tmp_path / "out", progress=stop)
    known: list[Any] = []
    real = run._known
    monkeypatch.setattr(run, "_known", lambda *args: known.append(real(*args)) or known[-1])
    lock = read_lock(convert(tmp_path / "hf", tmp_path / "out"))
    assert known[0]
    assert [f.sha256 for f in lock.source_files] == [sha256(p) for p in sorted((tmp_path / "hf").glob("*.safetensors"))]
    assert open_checkpoint(tmp_path / "out").file_digests["model.lock.json"]
