"""Checkpoints on disk: what is written comes back bit for bit, and damage of every kind is named."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from orbax.checkpoint import v1 as ocp
from tiny_models import DTYPES, LLAMA, MIXTRAL, random_leaves

from llama_jax.checkpoint import Source, is_checkpoint, journal, load_params, open_checkpoint, save, verify, write
from llama_jax.checkpoint.array_store import open_arrays
from llama_jax.checkpoint.format import TensorInfo, digest
from llama_jax.checkpoint.read import ALIGNMENT, TensorReader, empty_aligned
from llama_jax.config import config_from_hf
from llama_jax.errors import CheckpointError, DoesNotFit, ModelNotFound, RequestError, StorageError
from llama_jax.params import flatten, unflatten

CONFIG = config_from_hf(LLAMA)


def written(folder: Path, hf: dict[str, Any] = LLAMA, **options: Any) -> tuple[Path, dict[str, np.ndarray]]:
    config = config_from_hf(hf)
    leaves = random_leaves(config)
    return save(folder / "model", unflatten(leaves), config, **options), leaves


def bits(array: Any) -> bytes:
    return np.asarray(array).tobytes()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no test changes."""
    return written(
        tmp_path_factory.mktemp("sound"), files={"tokenizer.json": "{}"}, generation_config={"eos_token_id": 2}
    )[0]


@pytest.fixture
def copied(sound: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return shutil.copytree(sound, tmp_path / "copy")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hf", [LLAMA, MIXTRAL], ids=["dense", "experts"])
def test_round_trip(tmp_path: Path, hf: dict[str, Any], dtype: str) -> None:
    path, leaves = written(
        tmp_path,
        hf | {"dtype": dtype},
        source=Source("huggingface", "org/name", "abc", "mit"),
        generation_config={"eos_token_id": [2, 3]},
        files={"tokenizer.json": "{}", "tokenizer.model": b"\x00\xff"},
    )
    opened = open_checkpoint(path)
    assert opened.config == config_from_hf(hf | {"dtype": dtype})
    assert opened.dtype == dtype
    assert opened.source == Source("huggingface", "org/name", "abc", "mit")
    assert opened.generation_config == {"eos_token_id": [2, 3]}
    assert (path / "tokenizer.model").read_bytes() == b"\x00\xff"
    assert opened.nbytes == sum(a.nbytes for a in leaves.values())
    loaded = flatten(load_params(path))
    assert list(loaded) == list(leaves)
    for name, leaf in leaves.items():
        assert loaded[name].dtype == leaf.dtype
        assert bits(loaded[name]) == bits(leaf), name
    assert verify(path).ok


def test_orbax_reads_it(sound: Path) -> None:
    """It is an Orbax checkpoint like any other, and our metadata is where Orbax keeps such."""
    metadata = ocp.metadata(sound / "params")
    assert metadata.custom_metadata["format_version"] == 1
    assert metadata.custom_metadata["digests"] == {n: t.digest for n, t in open_checkpoint(sound).tensors.items()}
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), load_params(sound))
    with ocp.Context():
        loaded = ocp.load(sound / "params", abstract)
    assert {n: bits(a) for n, a in flatten(loaded).items()} == {n: bits(a) for n, a in random_leaves(CONFIG).items()}


def test_save_takes_jax_arrays(tmp_path: Path) -> None:
    leaves = random_leaves(CONFIG)
    path = save(tmp_path / "m", unflatten({n: jax.numpy.asarray(a) for n, a in leaves.items()}), CONFIG)
    assert {n: bits(a) for n, a in flatten(load_params(path)).items()} == {n: bits(a) for n, a in leaves.items()}


def test_large_tensors_are_written_in_batches_and_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "BATCH_BYTES", 1500)
    monkeypatch.setattr(journal, "CHUNK_BYTES", 1000)
    path, leaves = written(tmp_path)
    assert {n: bits(a) for n, a in flatten(load_params(path)).items()} == {n: bits(a) for n, a in leaves.items()}
    name = "embed.weight"
    store = TensorReader(open_checkpoint(path))._open(name)
    assert np.prod(store.chunk_layout.write_chunk.shape) * 4 <= 1000 < leaves[name].nbytes


@pytest.mark.parametrize(
    ("stored", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")]
)
def test_casts_on_load_after_checking_the_stored_bytes(tmp_path: Path, stored: str, wanted: str) -> None:
    path, leaves = written(tmp_path, LLAMA | {"dtype": stored})
    for name, leaf in flatten(load_params(path, dtype=wanted)).items():
        assert bits(leaf) == bits(leaves[name].astype(DTYPES[wanted]))


def test_refuses_dtypes_that_weights_cannot_have(sound: Path) -> None:
    with pytest.raises(RequestError, match="int8"):
        load_params(sound, dtype="int8")


def test_places_each_leaf(sound: Path) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    seen = []

    def place(spec: Any) -> jax.sharding.Sharding:
        seen.append(spec.name)
        names = ["x"] + [None] * (len(spec.shape) - 1)
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))

    loaded = flatten(load_params(sound, sharding=place))
    assert sorted(seen) == sorted(loaded)
    assert all(isinstance(a.sharding, jax.sharding.NamedSharding) for a in loaded.values())
    on_device = flatten(load_params(sound, sharding=jax.devices()[0]))
    assert all(a.devices() == {jax.devices()[0]} for a in on_device.values())


def test_reports_progress(sound: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    load_params(sound, progress=lambda *step: steps.append(step))
    total = open_checkpoint(sound).nbytes
    assert [name for *_, name in steps] == list(random_leaves(CONFIG))
    assert steps[-1][:2] == (total, total)
    assert [done for done, *_ in steps] == sorted(done for done, *_ in steps)


@given(hnp.array_shapes(min_dims=1, max_dims=3), st.sampled_from(sorted(DTYPES)))
def test_buffers_are_aligned(shape: tuple[int, ...], dtype: str) -> None:
    array = empty_aligned(TensorInfo(shape, dtype, ""))
    assert array.ctypes.data % ALIGNMENT == 0
    assert array.shape == shape
    assert array.flags.c_contiguous
    assert array.dtype == DTYPES[dtype]


@given(hnp.arrays(np.uint8, st.integers(1, 300)), st.data())
def test_digest_sees_every_bit(data: np.ndarray, draw: st.DataObject) -> None:
    bit = draw.draw(st.integers(0, 8 * data.size - 1))
    flipped = data.copy()
    flipped[bit // 8] ^= 1 << (bit % 8)
    assert digest(data) != digest(flipped)


def flip_a_bit(path: Path) -> None:
    """Flips one bit in the middle of the embedding."""
    file, offset, size = open_arrays(path / "params" / "state")["embed.weight"].chunks[0, 0]  # type: ignore[index,misc]
    data = bytearray(file.read_bytes())
    data[offset + size // 2] ^= 0x10
    file.write_bytes(data)


def truncate_data(path: Path) -> None:
    largest = max((p for p in (path / "params" / "state").rglob("d/*")), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def remove_data(path: Path) -> None:
    max((p for p in (path / "params" / "state").rglob("d/*")), key=lambda p: p.stat().st_size).unlink()


def edit_json(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        value = json.loads((path / file).read_text())
        change(value)
        (path / file).write_text(json.dumps(value))

    return edit


METADATA = "params/_CHECKPOINT_METADATA"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (flip_a_bit, r"tensor \S+ has digest"),
    "truncated data": (truncate_data, r"tensor \S+ cannot be read"),
    "missing data": (remove_data, r"tensor \S+ cannot be read"),
    "no manifest": (lambda p: (p / "params/state/manifest.ocdbt").unlink(), r"tensor \S+ cannot be read"),
    "broken manifest": (lambda p: (p / "params/state/manifest.ocdbt").write_bytes(b"x" * 90), r"cannot be read"),
    "wrong digest": (
        edit_json(METADATA, lambda m: m["custom_metadata"]["digests"].update({"embed.weight": "xxh3_128:00"})),
        r"tensor embed.weight has digest",
    ),
    "missing tensor": (
        edit_json(METADATA, lambda m: [m["custom_metadata"][k].pop("embed.weight") for k in ("digests", "tensors")]),
        r"lacks tensor embed.weight",
    ),
    "unknown tensor": (
        edit_json(
            METADATA,
            lambda m: [
                m["custom_metadata"][k].update(odd=m["custom_metadata"][k]["embed.weight"])
                for k in ("digests", "tensors")
            ],
        ),
        r"holds tensor odd",
    ),
    "list of tensors disagrees with the data": (
        edit_json(METADATA, lambda m: m["custom_metadata"]["tensors"]["embed.weight"].update(dtype="float16")),
        r"tensor embed.weight is float32",
    ),
    "inconsistent list": (
        edit_json(METADATA, lambda m: m["custom_metadata"]["tensors"].pop("embed.weight")),
        r"list of tensors is damaged",
    ),
    "wrong shape": (edit_json("config.json", lambda c: c.update(vocab_size=50)), r"tensor embed.weight has shape"),
    "another layer": (edit_json("config.json", lambda c: c.update(num_hidden_layers=3)), r"lacks tensor layers\.2\."),
    "newer marker": (edit_json("llama_jax.json", lambda m: m.update(format_version=2)), "format version 2"),
    "newer metadata": (
        edit_json(METADATA, lambda m: m["custom_metadata"].update(format_version=9)),
        "format version 9",
    ),
    "no version": (edit_json("llama_jax.json", lambda m: m.pop("format_version")), "no valid format_version"),
    "odd version": (edit_json("llama_jax.json", lambda m: m.update(format_version=True)), "no valid format_version"),
    "no marker": (lambda p: (p / "llama_jax.json").unlink(), "not a finished checkpoint"),
    "odd source": (edit_json("llama_jax.json", lambda m: m.update(source={"colour": 1})), "llama_jax.json is damaged"),
    "no metadata": (lambda p: (p / METADATA).unlink(), "_CHECKPOINT_METADATA is missing"),
    "foreign metadata": (edit_json(METADATA, lambda m: m.pop("custom_metadata")), "no metadata of llama_jax"),
    "no config": (lambda p: (p / "config.json").unlink(), "config.json is missing"),
    "broken config": (lambda p: (p / "config.json").write_text('{"a": '), "config.json is not valid JSON"),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), "does not hold a JSON object"),
    "deep config": (lambda p: (p / "config.json").write_text("[" * 100_000), "config.json is not valid JSON"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(copied: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(copied)
    with pytest.raises(CheckpointError, match=message) as e:
        load_params(copied)
    assert e.value.hint
    assert str(copied) in e.value.message


def test_a_flipped_bit_loads_unnoticed_without_verification(copied: Path) -> None:
    """The control: it is our digest that notices it, nothing below."""
    flip_a_bit(copied)
    loaded = flatten(load_params(copied, verify=False))
    different = [n for n, a in random_leaves(CONFIG).items() if bits(a) != bits(loaded[n])]
    assert len(different) == 1
    report = verify(copied)
    assert not report.ok
    # The tensor, and the file that it lies in: both have a digest in a model this small.
    assert different[0] in report.failures[0]
    assert "/d/" in report.failures[1]
    assert len(report.failures) == 2


def test_verify_checks_the_small_files(copied: Path) -> None:
    (copied / "tokenizer.json").write_text("{ }")
    (copied / "generation_config.json").unlink()
    report = verify(copied)
    assert len(report.failures) == 2
    assert "tokenizer.json" in "".join(report.failures)
    assert report.tensors == len(random_leaves(CONFIG))


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no checkpoint folder"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="not a finished checkpoint"):
        open_checkpoint(tmp_path)


def test_existing_folders_are_safe(tmp_path: Path) -> None:
    path, leaves = written(tmp_path)
    params = unflatten(random_leaves(CONFIG, seed=1))
    with pytest.raises(StorageError, match="exists"):
        save(path, params, CONFIG)
    assert bits(flatten(load_params(path))["embed.weight"]) == bits(leaves["embed.weight"])
    save(path, params, CONFIG, overwrite=True)
    assert bits(flatten(load_params(path))["embed.weight"]) != bits(leaves["embed.weight"])
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(StorageError, match="not a checkpoint"):
        save(mine, params, CONFIG, overwrite=True)
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(StorageError, match="in the way"):
        save(tmp_path / "new", params, CONFIG)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "model", "new.partial"]


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "dtype"])
def test_save_checks_the_tree(tmp_path: Path, change: str) -> None:
    leaves = random_leaves(CONFIG)
    if change == "missing":
        del leaves["final_norm.weight"]
    elif change == "unknown":
        leaves["odd.weight"] = leaves["embed.weight"]
    elif change == "shape":
        leaves["final_norm.weight"] = leaves["final_norm.weight"][:-1]
    else:
        leaves["final_norm.weight"] = leaves["final_norm.weight"].astype(np.float64)
    name = "odd.weight" if change == "unknown" else "final_norm.weight"
    with pytest.raises(CheckpointError, match=name):
        save(tmp_path / "m", unflatten(leaves), CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_disk_space_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(DoesNotFit, match=r"needs [\d,]+ bytes, but 1,000 are free"):
        written(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DoesNotFit),
        (OSError(errno.EROFS, "Read-only file system"), StorageError),
        (ValueError("RESOURCE_EXHAUSTED: disk"), DoesNotFit),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_failures_while_writing_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, expected: type[BaseException]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(ocp.partial, "finalize", fail)
    with pytest.raises(expected):
        written(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="cannot write"):
        written(tmp_path)


def test_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        written(tmp_path / "file")


def test_old_checkpoint_comes_back_after_a_kill_between_the_renames(tmp_path: Path) -> None:
    path, leaves = written(tmp_path)
    path.rename(tmp_path / "model.llama_jax-old")
    with pytest.raises(StorageError, match="exists"):
        save(path, unflatten(leaves), CONFIG)
    assert verify(path).ok


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from tiny_models import LLAMA, random_leaves
from llama_jax.checkpoint import write
from llama_jax.config import config_from_hf
config = config_from_hf(LLAMA)
with write.CheckpointWriter({path!r}, total_bytes=0) as writer:
    for n, (name, leaf) in enumerate(random_leaves(config).items()):
        if n == 2:
            print("writing", flush=True)
            time.sleep({sleep})
        writer.write({{name: leaf}})
    writer.commit(config, source=write.fmt.Source())
"""


def child(path: Path, sleep: float) -> subprocess.Popen[str]:
    code = CHILD.format(tests=str(Path(__file__).parent), path=str(path), sleep=sleep)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_writers(tmp_path: Path, how: signal.Signals) -> None:
    path = tmp_path / "model"
    with child(path, 60) as process:
        process.send_signal(how)
        process.wait()
    assert not path.exists()
    if how == signal.SIGINT:
        assert list(tmp_path.iterdir()) == []
    written(tmp_path)
    assert verify(path).ok
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_the_second_writer_waits_for_the_first(tmp_path: Path) -> None:
    with child(tmp_path / "model", 1.5) as process:
        start = time.monotonic()
        with pytest.raises(StorageError, match="exists"):
            written(tmp_path)
        assert time.monotonic() - start > 0.5
        assert process.wait() == 0
    assert is_checkpoint(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_opening_needs_neither_jax_nor_orbax(sound: Path) -> None:
    code = (
        "import sys; from llama_jax.checkpoint import open_checkpoint, verify; "
        f"open_checkpoint({str(sound)!r}); assert verify({str(sound)!r}).ok; "
        "assert not {'jax', 'orbax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
