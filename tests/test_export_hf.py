"""Checkpoints to Hugging Face folders: the source's own bytes come back, and nothing half-written ever has the name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers import GOLDEN_CASES
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny_chat_model import write_chat_model
from tiny_models import DTYPES, LLAMA, LLAMA4, MIXTRAL, assert_equal, random_leaves, write_hf

import llama_jax as lj
from llama_jax.checkpoint import open_checkpoint, save, verify
from llama_jax.checkpoint.format import TEMPLATES
from llama_jax.cli import cli
from llama_jax.cli.export import _size
from llama_jax.config import config_from_hf
from llama_jax.convert import convert, export_gguf, export_hf
from llama_jax.convert.export.staging import UNFINISHED
from llama_jax.convert.safetensors_writer import SafetensorsWriter, TensorPlan
from llama_jax.convert.verify import verify_source
from llama_jax.errors import (
    CheckpointError,
    DoesNotFit,
    ModelNotFound,
    RequestError,
    StorageError,
    UnsupportedModel,
)
from llama_jax.params import unflatten
from llama_jax.text.tokenizer import load_tokenizer

# Most are quick; together they take a while.
pytestmark = pytest.mark.slow


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, read by the safetensors library."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        assert not found.keys() & part.keys()
        found |= part
    return found


def assert_same_tensors(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, array in a.items():
        assert (array.dtype, array.shape) == (b[name].dtype, b[name].shape), name
        assert array.tobytes() == b[name].tobytes(), name


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A small converted checkpoint."""
    write_hf(tmp_path / "hf", LLAMA)
    return convert(tmp_path / "hf", tmp_path / "tiny")


def test_chat_templates_in_their_own_folder_stay_there(tmp_path: Path) -> None:
    source = write_chat_model(tmp_path / "hf")
    (source / TEMPLATES).mkdir()
    (source / TEMPLATES / "tool_use.jinja").write_text("T")
    (source / TEMPLATES / "notes.txt").write_text("")
    checkpoint = convert(source, tmp_path / "checkpoint")
    assert verify_source(checkpoint, source).ok
    templates = load_tokenizer(source).chat_templates
    assert templates["tool_use"] == "T"
    assert lj.load(checkpoint)[1].chat_templates == templates
    export_hf(checkpoint, tmp_path / "out")
    assert os.listdir(tmp_path / "out" / TEMPLATES) == ["tool_use.jinja"]
    assert load_tokenizer(tmp_path / "out").chat_templates == templates
    (checkpoint / TEMPLATES / "tool_use.jinja").write_text("U")
    assert "tool_use.jinja" in verify(checkpoint).failures[0]


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_the_bytes_of_every_golden_come_back(tmp_path: Path, goldens: Path, case: str) -> None:
    """Names, dtypes, shapes and bytes are those that `save_pretrained` of transformers wrote."""
    checkpoint = convert(goldens / case, tmp_path / "checkpoint")
    made = export_hf(checkpoint, tmp_path / "out")
    assert_same_tensors(tensors(tmp_path / "out"), tensors(goldens / case))
    assert made.tensors == len(tensors(goldens / case))
    config = config_from_hf(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert config == config_from_hf(json.loads((goldens / case / "config.json").read_text()))
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("hf", [LLAMA, MIXTRAL, LLAMA4], ids=["dense", "experts", "fused"])
@pytest.mark.parametrize("shard_bytes", [1, 3000, 10**9])
def test_shards(tmp_path: Path, hf: dict[str, Any], shard_bytes: int) -> None:
    leaves = write_hf(tmp_path / "hf", hf)
    convert(tmp_path / "hf", tmp_path / "checkpoint")
    made = export_hf(tmp_path / "checkpoint", tmp_path / "out", shard_bytes=shard_bytes)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == list(made.files)
    source, found = tensors(tmp_path / "hf"), tensors(tmp_path / "out")
    assert_same_tensors(found, source)
    if shard_bytes == 10**9:
        assert "model.safetensors" in made.files
    else:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == made.bytes == sum(a.nbytes for a in source.values())
        files = set(index["weight_map"].values())
        assert files == {f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))}
        for file in files:
            part = load_file(tmp_path / "out" / file)
            assert part.keys() == {name for name, where in index["weight_map"].items() if where == file}
            assert len(part) == 1 or sum(a.nbytes for a in part.values()) <= shard_bytes
    assert_equal(convert(tmp_path / "out", tmp_path / "again"), leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_dtype(tmp_path: Path, dtype: str) -> None:
    write_hf(tmp_path / "hf", LLAMA4)
    made = export_hf(convert(tmp_path / "hf", tmp_path / "c"), tmp_path / "out", dtype=dtype)
    source = tensors(tmp_path / "hf")
    assert_same_tensors(tensors(tmp_path / "out"), {name: a.astype(DTYPES[dtype]) for name, a in source.items()})
    assert made.dtype == dtype
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_large_tensors_are_cast_in_blocks(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_jax.convert.casting._BLOCK_BYTES", 100)
    export_hf(tiny, tmp_path / "out", dtype="bfloat16")
    expected = {name: a.astype(ml_dtypes.bfloat16) for name, a in tensors(tmp_path / "hf").items()}
    assert_same_tensors(tensors(tmp_path / "out"), expected)


def test_values_too_large_for_the_dtype(tmp_path: Path) -> None:
    config = config_from_hf(LLAMA)
    leaves = random_leaves(config)
    leaves["final_norm.weight"][3] = 7e4
    save(tmp_path / "c", unflatten(leaves), config)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds 1 values that are too large for float16"):
        export_hf(tmp_path / "c", tmp_path / "out", dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]


def test_nonfinite_weights_that_were_let_in_are_let_out(tmp_path: Path) -> None:
    config = config_from_hf(LLAMA)
    leaves = random_leaves(config)
    leaves["final_norm.weight"][3] = np.nan
    save(tmp_path / "c", unflatten(leaves), config)
    export_hf(tmp_path / "c", tmp_path / "out", dtype="bfloat16")
    assert np.isnan(tensors(tmp_path / "out")["model.norm.weight"].astype(np.float32)[3])


def test_mixed_dtypes_keep_their_own_and_stay_aligned(tmp_path: Path) -> None:
    config = config_from_hf(LLAMA)
    leaves = random_leaves(config)
    leaves["layers.0.mlp.up_proj.weight"] = leaves["layers.0.mlp.up_proj.weight"].astype(ml_dtypes.bfloat16)
    save(tmp_path / "c", unflatten(leaves), config)
    export_hf(tmp_path / "c", tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert found["model.layers.0.mlp.up_proj.weight"].dtype == ml_dtypes.bfloat16
    assert found["model.layers.0.mlp.gate_proj.weight"].dtype == np.float32
    assert_equal(convert(tmp_path / "out", tmp_path / "again"), leaves)


def test_halves_of_one_tensor_must_have_one_dtype(tmp_path: Path) -> None:
    config = config_from_hf(LLAMA4)
    leaves = random_leaves(config)
    name = next(n for n in leaves if n.endswith("experts.up_proj.weight"))
    leaves[name] = leaves[name].astype(np.float16)
    save(tmp_path / "c", unflatten(leaves), config)
    with pytest.raises(UnsupportedModel, match=r"experts\.up_proj\.weight differ in dtype"):
        export_hf(tmp_path / "c", tmp_path / "out")
    export_hf(tmp_path / "c", tmp_path / "out", dtype="float32")


def test_small_files_go_along(tmp_path: Path) -> None:
    write_chat_model(tmp_path / "hf")
    (tmp_path / "hf" / "LICENSE").write_text("terms")
    made = export_hf(convert(tmp_path / "hf", tmp_path / "c"), tmp_path / "out")
    assert made.files == (
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    )
    for name in ("LICENSE", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_progress_counts_bytes(tmp_path: Path, tiny: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    export_hf(tiny, tmp_path / "out", progress=lambda *step: steps.append(step))
    assert [name for *_, name in steps] == list(open_checkpoint(tiny).tensors)
    assert steps[-1][0] == steps[-1][1] == open_checkpoint(tiny).nbytes


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_memory_is_that_of_the_largest_tensor(tmp_path: Path, dtype: str | None) -> None:
    hf = LLAMA | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "vocab_size": 1000}
    write_hf(tmp_path / "hf", hf)
    checkpoint = open_checkpoint(convert(tmp_path / "hf", tmp_path / "c"))
    largest = max(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert checkpoint.nbytes > 20 * largest
    export_hf(checkpoint.path, tmp_path / "warm", dtype=dtype)
    tracemalloc.start()
    try:
        export_hf(checkpoint.path, tmp_path / "out", dtype=dtype)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * largest + 500_000


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_wrong_arguments(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(RequestError, match="int4"):
        export_hf(tiny, tmp_path / "out", dtype="int4")
    with pytest.raises(RequestError, match="shard"):
        export_hf(tiny, tmp_path / "out", shard_bytes=0)
    with pytest.raises(ModelNotFound):
        export_hf(tmp_path / "absent", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def flip(path: Path) -> None:
    largest = max((path / "params" / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0x10
    largest.write_bytes(data)


def change_config(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped bit": (flip, r"tensor \S+ (has digest|cannot be read)"),
    "unfinished": (lambda p: (p / "llama_jax.json").unlink(), "did not finish|not a finished checkpoint"),
    "changed small file": (lambda p: (p / "tokenizer.json").write_text("{ }"), r"tokenizer\.json has digest"),
    "missing small file": (lambda p: (p / "tokenizer.json").unlink(), r"tokenizer\.json cannot be read"),
    "another config": (change_config, r"lacks tensor layers\.2\."),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoints_are_named_and_leave_nothing(tmp_path: Path, tiny: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(tiny)
    with pytest.raises(CheckpointError, match=message):
        export_hf(tiny, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "tiny"]


def test_existing_destinations(tmp_path: Path, tiny: Path) -> None:
    export_hf(tiny, tmp_path / "out")
    with pytest.raises(StorageError, match="exists"):
        export_hf(tiny, tmp_path / "out")
    export_hf(tiny, tmp_path / "out", dtype="float16", overwrite=True)
    assert tensors(tmp_path / "out")["model.norm.weight"].dtype == np.float16
    # A download, a checkpoint and a file are not exports, whatever the flag says.
    for other in ("hf", "tiny", "file"):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(StorageError, match="not an export"):
            export_hf(tiny, tmp_path / other, overwrite=True)
    (tmp_path / "empty").mkdir()
    export_hf(tiny, tmp_path / "empty", overwrite=True)
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob("*.lock"))


def test_an_old_export_stays_when_the_new_one_fails(tmp_path: Path, tiny: Path) -> None:
    export_hf(tiny, tmp_path / "out")
    before = tensors(tmp_path / "out")
    flip(tiny)
    with pytest.raises(CheckpointError):
        export_hf(tiny, tmp_path / "out", overwrite=True)
    assert_same_tensors(tensors(tmp_path / "out"), before)


def test_leftovers(tmp_path: Path, tiny: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="in the way"):
        export_hf(tiny, tmp_path / "out")
    (partial / UNFINISHED).touch()
    export_hf(tiny, tmp_path / "out")
    assert not partial.exists()
    assert not (tmp_path / "out" / UNFINISHED).exists()


def test_disk_space_is_checked_first(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(DoesNotFit, match=r"needs [\d,]+ bytes, but 1,000 are free"):
        export_hf(tiny, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "tiny"]


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DoesNotFit),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DoesNotFit),
        (OSError(errno.EROFS, "Read-only file system"), StorageError),
        (OSError(errno.EIO, "Input/output error"), StorageError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_failures_while_writing_leave_nothing(
    tmp_path: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    error: BaseException,
    expected: type[BaseException],
) -> None:
    calls, real = iter(range(100)), getattr(os, call)

    def fail(*args: Any) -> Any:
        if next(calls) == 2:
            raise error
        return real(*args)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(expected):
        export_hf(tiny, tmp_path / "out")
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "tiny"]


def test_parent_is_a_file(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        export_hf(tiny, tmp_path / "file" / "out")


CHILD = """
import sys, time
from llama_jax.convert import export_gguf, export_hf
def progress(done, total, name):
    if name == "layers.0.mlp.up_proj.weight":
        print("writing", flush=True)
        time.sleep({pause})
export_{kind}({source!r}, {target!r}, progress=progress)
"""


@pytest.mark.parametrize(("how", "kind"), [(signal.SIGKILL, "hf"), (signal.SIGINT, "hf"), (signal.SIGKILL, "gguf")])
def test_killed_exports(tmp_path: Path, how: signal.Signals, kind: str) -> None:
    write_chat_model(tmp_path / "source")
    source = convert(tmp_path / "source", tmp_path / "checkpoint")
    out = tmp_path / "out" / "model.gguf"
    code = CHILD.format(kind=kind, source=str(source), target=str(out), pause=60)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(how)
        process.wait()
    assert not out.exists()
    if how == signal.SIGINT:
        assert list(out.parent.iterdir()) == []
    (export_hf if kind == "hf" else export_gguf)(source, out)
    assert [p.name for p in out.parent.iterdir()] == ["model.gguf"]


def test_the_second_export_waits_for_the_first(tmp_path: Path, tiny: Path) -> None:
    code = CHILD.format(kind="hf", source=str(tiny), target=str(tmp_path / "out"), pause=1.5)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        start = time.monotonic()
        with pytest.raises(StorageError, match="exists"):
            export_hf(tiny, tmp_path / "out")
        assert time.monotonic() - start > 0.5
        assert process.wait() == 0
    assert_same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "hf"))


# --- the writer and the command line ----------------------------------------------------------------------------------


def test_a_file_is_what_the_library_writes(tmp_path: Path) -> None:
    """The same header (its own order of tensors, padding) and the same data."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    arrays = {
        "b": rng.standard_normal((3, 5)).astype(np.float16),
        "ä": rng.standard_normal((7,)).astype(np.float32),
        "a": rng.standard_normal((2, 3, 4)).astype(np.float32),
        "c": rng.standard_normal((1, 1)).astype(ml_dtypes.bfloat16),
    }
    save_file(arrays, tmp_path / "theirs", metadata={"format": "pt"})
    plan = {name: TensorPlan(array.dtype.name, array.shape) for name, array in arrays.items()}
    writer = SafetensorsWriter(tmp_path / "ours", plan, {"format": "pt"})
    for name, array in arrays.items():
        writer.write(name, array[:1])
        if len(array) > 1:
            writer.write(name, array[1:], array[:1].nbytes)
    writer.close()
    assert_same_tensors(load_file(tmp_path / "ours"), arrays)
    with safe_open(tmp_path / "ours", "np") as ours, safe_open(tmp_path / "theirs", "np") as theirs:
        assert ours.metadata() == theirs.metadata()
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size


def run(*args: object) -> Result:
    # As in the installed program, errors end in an exit code.
    return CliRunner().invoke(cli, ["export", *map(str, args)])


def test_command_line(tmp_path: Path, tiny: Path) -> None:
    result = run(tiny, tmp_path / "out", "--to", "hf", "--shard-size", "2kB", "--dtype", "float16", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["path"], said["format"], said["dtype"]) == (str(tmp_path / "out"), "hf", "float16")
    assert said["bytes"] == sum(a.nbytes for a in tensors(tmp_path / "out").values())
    assert run(tiny, tmp_path / "out", "--to", "hf").exit_code == 73
    assert run(tiny, tmp_path / "out", "--to", "hf", "--overwrite", "-q").exit_code == 0
    flip(tiny)
    failed = run(tiny, tmp_path / "two", "--to", "hf")
    assert failed.exit_code == 4
    assert "tensor" in failed.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--to", "hf", "--type", "q8_0"], "--type goes with --to gguf"),
        (["--to", "gguf", "--dtype", "float16"], "--dtype goes with --to hf"),
        (["--to", "gguf", "--shard-size", "1GB"], "--shard-size goes with --to hf"),
        (["--to", "hf", "--shard-size", "many"], "'many' is not a size"),
        (["--to", "hf", "--shard-size", "0"], "'0' is not a size"),
        ([], "--to"),
    ],
)
def test_usage_errors(tmp_path: Path, args: list[str], message: str) -> None:
    result = run(tmp_path / "c", tmp_path / "out", *args)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("42", 42), ("7k", 7000)])
def test_sizes(text: str, size: int) -> None:
    assert _size(text) == size
