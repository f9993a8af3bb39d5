"""Conversions that are killed, run out of space, meet one another or a failing disk: nothing lost, nothing bad."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from tiny_models import LLAMA, assert_equal, write_hf

from llama_jax import disk
from llama_jax.checkpoint import journal, open_checkpoint, save, verify, write
from llama_jax.checkpoint.leftovers import leftovers
from llama_jax.checkpoint.lock import read_lock
from llama_jax.config import config_from_hf
from llama_jax.convert import convert
from llama_jax.convert.hf import HuggingFaceFolder
from llama_jax.errors import CheckpointError, DoesNotFit, LlamaJaxError, StorageError
from llama_jax.library import removal
from llama_jax.params import unflatten

# Most are quick; together they take a while.
pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handful of parts in a model of 30 kB."""
    monkeypatch.setattr(write, "BATCH_BYTES", 6000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_hf(tmp_path / "hf", LLAMA, shards=2)
    return tmp_path / "hf"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the leaves that are read from sources, as they are read."""
    names: list[str] = []
    read = HuggingFaceFolder.read

    def noted(self: HuggingFaceFolder, spec: Any) -> np.ndarray:
        names.append(spec.name)
        return read(self, spec)

    monkeypatch.setattr(HuggingFaceFolder, "read", noted)
    return names


def stop_after(n: int, error: BaseException | None = None) -> Callable[[int, int, str], None]:
    """A `progress` that raises at the n-th tensor, KeyboardInterrupt if not told otherwise."""
    calls = []

    def stop(*step: Any) -> None:
        calls.append(step)
        if len(calls) == n:
            raise error or KeyboardInterrupt

    return stop


def stopped(source: Path, dst: Path, n: int = 10, **options: Any) -> None:
    """A conversion that is interrupted while it writes the n-th tensor."""
    with pytest.raises(KeyboardInterrupt):
        convert(source, dst, progress=stop_after(n), **options)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def contents(path: Path) -> dict[str, Any]:
    """All of a checkpoint that does not hold times or random names."""
    lock = json.loads((path / "model.lock.json").read_text())
    del lock["store"]
    custom = json.loads((path / "params" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    small = {p.name: p.read_bytes() for p in path.iterdir() if p.is_file() and not p.name.endswith("lock.json")}
    marker = json.loads(small.pop("llama_jax.json"))
    del marker["digest"], marker["files"]["model.lock.json"]
    return {"lock": lock, "custom": custom, "marker": marker, "order": list(custom["digests"])} | small


# --- Killed -----------------------------------------------------------------------------------------------------------


def kills(folder: Path, n: int, seed: int) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(TESTS / "kill_conversions.py"), str(folder), str(n), str(seed)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_kills(results: list[dict[str, Any]], n: int) -> None:
    assert len(results) == n
    for result in results:
        assert result["left"] in result["expected"], result
        assert result["rerun"] == 0, result
        assert result["same"], result
        assert result["litter"] == [], result
    # The moments were what they should be: most before the end, and not all before the first part.
    assert sum(result["killed"] for result in results) >= n * 0.6
    assert any(result["parts"] for result in results)


@pytest.mark.timeout(1200)
def test_kill_at_random_moments(tmp_path: Path) -> None:
    check_kills(kills(tmp_path, 20, seed=1), 20)


# --- Going on ---------------------------------------------------------------------------------------------------------


def test_goes_on_where_it_was_stopped(source: Path, tmp_path: Path, reads: list[str]) -> None:
    whole = convert(source, tmp_path / "whole")
    total = len(reads)
    said: list[str] = []
    stopped(source, tmp_path / "out", notify=said.append)
    assert len(said) == 2
    assert said[0].startswith("Converting ")
    assert "run it again" in said[1]
    assert names(tmp_path) == ["hf", "out.partial", "whole"]
    left = {n for p in journal.read_parts(tmp_path / "out.partial" / "parts") for n in p.tensors}
    assert 0 < len(left) < total
    reads.clear()
    steps: list[tuple[int, int, str]] = []
    convert(source, tmp_path / "out", progress=lambda *s: steps.append(s))
    assert len(reads) == total - len(left)
    assert not left & set(reads)
    assert sorted(n for *_, n in steps) == sorted(open_checkpoint(whole).tensors)
    assert steps[-1][0] == steps[-1][1]
    assert verify(tmp_path / "out").ok
    assert contents(tmp_path / "out") == contents(whole)
    assert names(tmp_path) == ["hf", "out", "whole"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "store", "journal", "no journal", "empty"])
def test_damaged_parts_are_redone(source: Path, tmp_path: Path, reads: list[str], damage: str) -> None:
    whole = convert(source, tmp_path / "whole")
    stopped(source, tmp_path / "out")
    first = min((tmp_path / "out.partial" / "parts").iterdir())
    largest = max((p for p in first.rglob("d/*")), key=lambda p: p.stat().st_size)
    if damage == "flip":
        raw = bytearray(largest.read_bytes())
        raw[len(raw) // 2] ^= 4
        largest.write_bytes(raw)
    elif damage == "truncate":
        os.truncate(largest, 100)
    elif damage == "store":
        next(first.rglob("manifest.ocdbt")).unlink()
    elif damage == "journal":
        (first / "part.json").write_text('{"tensors": {"embed.weight": 1}}')
    elif damage == "no journal":
        (first / "part.json").unlink()
    else:
        shutil.rmtree(first)
        first.mkdir()
    reads.clear()
    convert(source, tmp_path / "out")
    assert 0 < len(reads) < 21
    assert contents(tmp_path / "out") == contents(whole)
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize("change", ["touched", "another source", "dtype", "nonfinite", "older writer", "marker"])
def test_another_conversion_begins_afresh(source: Path, tmp_path: Path, reads: list[str], change: str) -> None:
    convert(source, tmp_path / "whole")
    total = len(reads)
    stopped(source, tmp_path / "out")
    options: dict[str, Any] = {}
    if change == "touched":
        os.utime(source / "model-00001-of-00002.safetensors", ns=(1, 1))
    elif change == "another source":
        shutil.copytree(source, tmp_path / "copy")
        source = tmp_path / "copy"
    elif change == "dtype":
        options["dtype"] = "bfloat16"
    elif change == "nonfinite":
        options["allow_nonfinite"] = True
    elif change == "older writer":
        (tmp_path / "out.partial" / disk.UNFINISHED).write_bytes(b"")
    else:
        (tmp_path / "out.partial" / disk.UNFINISHED).write_bytes(b"{")
    reads.clear()
    assert verify(convert(source, tmp_path / "out", **options)).ok
    assert len(reads) == total
    assert not (tmp_path / "out.partial").exists()


def test_finalize_can_be_repeated(source: Path, tmp_path: Path, reads: list[str], monkeypatch: Any) -> None:
    """Orbax's own finalize moves its input about; ours is given links, so the parts outlive a kill in its middle."""
    whole = convert(source, tmp_path / "whole")
    finalize = ocp.partial.finalize

    def half(path: Path) -> None:
        finalize(path)
        (path / "state" / "manifest.ocdbt").write_bytes(b"")
        raise KeyboardInterrupt

    monkeypatch.setattr(ocp.partial, "finalize", half)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out")
    monkeypatch.undo()
    reads.clear()
    convert(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


def test_file_systems_without_links(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def no_link(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    whole = convert(source, tmp_path / "whole")
    monkeypatch.setattr(os, "link", no_link)
    assert contents(convert(source, tmp_path / "out")) == contents(whole)
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize("kept", [True, False])
def test_what_is_kept_depends_on_the_error(source: Path, tmp_path: Path, monkeypatch: Any, kept: bool) -> None:
    """A disk that could not be read just now is worth another try; NaN in the source is not."""
    read, seen = HuggingFaceFolder.read, []

    def failing(self: HuggingFaceFolder, spec: Any) -> np.ndarray:
        array = read(self, spec)
        seen.append(spec)
        if len(seen) == 15 and kept:
            raise CheckpointError("cannot read tensor") from OSError(errno.EIO, "Input/output error")
        if len(seen) == 15:
            array.reshape(-1)[3] = np.nan
        return array

    monkeypatch.setattr(HuggingFaceFolder, "read", failing)
    with pytest.raises(CheckpointError) as e:
        convert(source, tmp_path / "out")
    assert ("run it again" in e.value.hint) == kept
    assert names(tmp_path) == (["hf", "out.partial"] if kept else ["hf"])


def test_a_source_that_changes_meanwhile(source: Path, tmp_path: Path) -> None:
    def touch(*_: Any) -> None:
        os.utime(source / "model-00002-of-00002.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match="was changed while it was read"):
        convert(source, tmp_path / "out", progress=touch)
    assert names(tmp_path) == ["hf"]


# --- Two at once ------------------------------------------------------------------------------------------------------


def test_the_second_conversion_waits(source: Path, tmp_path: Path) -> None:
    waits, said = threading.Event(), []

    def first_progress(*_: Any) -> None:
        assert waits.wait(60)

    def notify(message: str) -> None:
        said.append(message)
        waits.set()

    errors: list[BaseException] = []

    def second() -> None:
        try:
            convert(source, tmp_path / "out", notify=notify)
        except BaseException as e:
            errors.append(e)

    def begin(*step: Any) -> None:
        if not thread.is_alive() and not errors:
            thread.start()
        first_progress()

    thread = threading.Thread(target=second)
    convert(source, tmp_path / "out", progress=begin)
    thread.join(60)
    assert said[1:] == [f"Waiting for another conversion to {tmp_path / 'out'} to end"]
    assert [type(e) for e in errors] == [StorageError]
    assert "exists" in str(errors[0])
    assert verify(tmp_path / "out").ok
    assert names(tmp_path) == ["hf", "out"]


# --- Failing disks ----------------------------------------------------------------------------------------------------

EXPECTED = {errno.ENOSPC: DoesNotFit, errno.EDQUOT: DoesNotFit, errno.EROFS: StorageError, errno.EIO: StorageError}


def fail_nth(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, n: int, error: BaseException) -> list[int]:
    """Makes the n-th call of a function raise; returns a list that grows with each call."""
    real, calls = getattr(owner, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == n:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [
        (os, "fsync", errno.EIO),
        (os, "fsync", errno.EDQUOT),
        (os, "link", errno.ENOSPC),
        (Path, "rename", errno.EROFS),
        (Path, "write_bytes", errno.ENOSPC),
        (shutil, "copyfile", errno.EIO),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else value if isinstance(value, str) else "",
)
def test_every_write_may_fail(
    source: Path, tmp_path: Path, monkeypatch: Any, owner: Any, name: str, number: int
) -> None:
    """Of the calls that this program makes itself, the first, a middle and a late one."""
    leaves = write_hf(tmp_path / "hf2", LLAMA, seed=1)
    convert(tmp_path / "hf2", tmp_path / "out")
    with monkeypatch.context() as patch:
        calls = fail_nth(patch, owner, name, -1, OSError())
        convert(source, tmp_path / "count")
        count = len(calls)
    assert count
    # Not the very last calls: then the new checkpoint has its name already.
    for n in sorted({1, count // 2, 3 * count // 4} - {0}):
        for path in leftovers(tmp_path):
            disk.remove(path)
        with monkeypatch.context() as patch:
            fail_nth(patch, owner, name, n, OSError(number, os.strerror(number)))
            with pytest.raises(EXPECTED[number]) as e:
                convert(source, tmp_path / "out", overwrite=True)
        assert e.value.hint
        assert str(tmp_path / "out") in e.value.message
        if EXPECTED[number] is DoesNotFit:
            assert "bytes are free" in e.value.message
        assert_equal(tmp_path / "out", leaves)
    convert(source, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "count")
    assert names(tmp_path) == ["count", "hf", "hf2", "out"]


@pytest.mark.parametrize("number", sorted(EXPECTED), ids=lambda n: errno.errorcode[n])
def test_the_array_store_fails(source: Path, tmp_path: Path, monkeypatch: Any, number: int) -> None:
    """It reports its system errors in this form (measured with strace's fault injection)."""
    text = f"UNKNOWN: Error writing ...: Failed to fsync file: {os.strerror(number)} [os_error_code='{number}']"
    with monkeypatch.context() as patch:
        fail_nth(patch, ocp.partial, "save", 4, ValueError(text))
        with pytest.raises(EXPECTED[number], match=os.strerror(number)) as e:
            convert(source, tmp_path / "out")
    assert "run it again to go on" in e.value.hint
    if EXPECTED[number] is DoesNotFit:
        assert "bytes are needed" in e.value.message
    assert names(tmp_path) == ["hf", "out.partial"]
    assert len(list((tmp_path / "out.partial" / "parts").iterdir())) == 3
    assert verify(convert(source, tmp_path / "out")).ok


LIMITED = """
import resource, sys
from llama_jax.checkpoint import write
from llama_jax.convert import convert
from llama_jax.errors import StorageError
write.BATCH_BYTES = 6000
for limit in map(int, sys.argv[3:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        convert(sys.argv[1], sys.argv[2])
    except StorageError as e:
        print(limit, e.message)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
convert(sys.argv[1], sys.argv[2])
"""


def test_writes_that_the_kernel_refuses(source: Path, tmp_path: Path) -> None:
    """Real errors of write(2), wherever a file would pass a size: ours and those inside the array store."""
    limits = [0, 50, 150, 250, 600, 1500, 4000, 5500]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(source), str(tmp_path / "out"), *map(str, limits)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "absl" not in done.stderr
    refused = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert [int(limit) for limit, _ in refused] == limits
    assert all("File too large" in message for _, message in refused)
    assert verify(tmp_path / "out").ok
    assert names(tmp_path) == ["hf", "out"]


FULL = """
mount -t tmpfs -o size={size} tmpfs "$1" || exit 77
"$3" -c '
import os, sys
from pathlib import Path
from llama_jax import disk
from llama_jax.checkpoint import verify, write
from llama_jax.convert import convert
from llama_jax.errors import DoesNotFit
write.BATCH_BYTES = 6000
dst = Path(sys.argv[1], "out")
try:
    convert(sys.argv[2], dst)
    print("not refused")
except DoesNotFit as e:
    print(e.message)
disk.SPARE_BYTES = -(1 << 40)
try:
    convert(sys.argv[2], dst)
    print("not full")
except DoesNotFit as e:
    print(e.message)
    print(e.hint)
print(sorted(os.listdir(sys.argv[1])))
' "$1" "$2"
"""


def test_a_disk_that_is_full(source: Path, tmp_path: Path) -> None:
    """A real one, of 60 kB: refused before anything is written, and where that is left out, while it is written."""
    (tmp_path / "mnt").mkdir()
    if not shutil.which("unshare"):
        pytest.skip("needs unshare(1)")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", FULL.format(size="60k"), "sh", tmp_path / "mnt", source, sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77 or "unshare failed" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip("may not mount a file system")
    before, during, hint, left = done.stdout.splitlines()[-4:]
    assert "needs" in before
    assert "are free" in before
    assert "No space left on device" in during
    assert "bytes are free" in during
    assert "out'" not in left.replace("out.partial'", "")
    assert "free some space" in hint


def test_read_only_target(source: Path, tmp_path: Path) -> None:
    if not shutil.which("unshare"):
        pytest.skip("needs unshare(1)")
    script = (
        'mount -t tmpfs tmpfs "$1" && mount -o remount,ro "$1" || exit 77; "$3" -m llama_jax.cli convert "$2" "$1/out"'
    )
    (tmp_path / "mnt").mkdir()
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", tmp_path / "mnt", source, sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("may not mount a file system")
    assert done.returncode == StorageError.exit_code
    assert "Read-only file system" in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr


# --- Damage of every kind (the checkpoint's own files) ----------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_hf(folder / "hf", LLAMA)
    return convert(folder / "hf", folder / "out")


def all_files(checkpoint: Path) -> list[Path]:
    return sorted(p for p in checkpoint.rglob("*") if p.is_file())


def is_named(checkpoint: Path, file: Path) -> bool:
    """Whether damage of a file is reported, in words that name the file or a tensor."""
    try:
        report = verify(checkpoint)
    except LlamaJaxError as e:
        # It cannot even be opened: of its one sentence every word counts.
        return bool(e.hint) and (file.name in e.message or "tensor" in e.message or "config.json" in str(file))
    if report.ok:
        return False
    return any(file.name in failure or "tensor" in failure for failure in report.failures)


@pytest.fixture
def restored(checkpoint: Path) -> Iterator[None]:
    before = {path: path.read_bytes() for path in all_files(checkpoint)}
    yield
    for path, data in before.items():
        path.write_bytes(data)
    assert verify(checkpoint).ok


def test_there_is_every_class_of_file(checkpoint: Path) -> None:
    found = {path.relative_to(checkpoint).as_posix() for path in all_files(checkpoint)}
    assert found >= {
        "config.json",
        "generation_config.json",
        "llama_jax.json",
        "model.lock.json",
        "tokenizer.json",
        "params/_CHECKPOINT_METADATA",
        "params/commit_success.txt",
        "params/orbax.checkpoint",
        "params/state/_METADATA",
        "params/state/manifest.ocdbt",
    }
    assert any("/d/" in name for name in found)
    assert any("ocdbt.process" in name for name in found)


def test_deleted_files_are_noticed(checkpoint: Path, restored: None) -> None:
    for path in all_files(checkpoint):
        data = path.read_bytes()
        path.unlink()
        assert is_named(checkpoint, path), path
        path.write_bytes(data)


def test_truncated_files_are_noticed(checkpoint: Path, restored: None) -> None:
    for path in all_files(checkpoint):
        data = path.read_bytes()
        for size in {0, len(data) // 2, len(data) - 2} - {len(data), -2}:
            path.write_bytes(data[:size])
            assert is_named(checkpoint, path), (path, size)
        path.write_bytes(data)


def test_flipped_bits_are_noticed(checkpoint: Path, restored: None) -> None:
    rng = np.random.default_rng(0)
    for path in all_files(checkpoint):
        data = path.read_bytes()
        for bit in rng.integers(0, max(8 * len(data), 1), 6 if data else 0):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << (bit % 8)
            path.write_bytes(damaged)
            assert is_named(checkpoint, path), (path, bit)
        path.write_bytes(data)


def test_every_bit_of_the_marker_counts(checkpoint: Path, restored: None) -> None:
    """No other file holds its digest, so it holds one itself. White space may change: that is no damage."""
    path = checkpoint / "llama_jax.json"
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 17):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        assert is_named(checkpoint, path), (bit, damaged[max(0, bit // 8 - 20) : bit // 8 + 20])


def test_temporary_folders_do_no_harm(checkpoint: Path, tmp_path: Path) -> None:
    """Leftovers of a copying or a killed program, beside or in a checkpoint, are not taken for a part of it."""
    path = shutil.copytree(checkpoint, tmp_path / "out")
    (path / "params" / "state.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "out.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / disk.UNFINISHED).write_bytes(b"null")
    assert verify(path).ok
    for unfinished in (tmp_path / "out.partial", tmp_path / "out.orbax-checkpoint-tmp"):
        with pytest.raises(CheckpointError, match="not a finished checkpoint"):
            verify(unfinished)


def test_checkpoints_without_a_lock_still_verify(checkpoint: Path, tmp_path: Path) -> None:
    """Those of format version 1 that were written before there were locks."""
    path = shutil.copytree(checkpoint, tmp_path / "out")
    (path / "model.lock.json").unlink()
    marker = json.loads((path / "llama_jax.json").read_text())
    del marker["digest"], marker["files"]["model.lock.json"]
    (path / "llama_jax.json").write_text(json.dumps(marker))
    assert verify(path).ok
    with pytest.raises(CheckpointError, match=r"has no model\.lock\.json"):
        read_lock(path)


# --- Leftovers --------------------------------------------------------------------------------------------------------


def test_leftovers(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    folder = tmp_path / "models"
    folder.mkdir()
    stopped(source, folder / "stopped")
    convert(source, folder / "whole")
    shutil.copytree(folder / "whole", folder / "whole.llama_jax-old")
    (folder / "whole.lock").touch()
    # Not ours, or of use, or being written.
    shutil.copytree(folder / "whole", folder / "lost.llama_jax-old")
    (folder / "poetry.lock").write_text("[[package]]")
    (folder / "thesis.partial").mkdir()
    (folder / "thesis.partial" / "thesis.txt").write_text("years of work")
    (folder / "busy.partial").mkdir()
    (folder / "busy.partial" / disk.UNFINISHED).touch()
    with disk.file_lock(folder / "busy.lock"):
        found = removal.find_leftovers()
        assert [left.name for left in found] == ["stopped.partial", "whole.llama_jax-old", "whole.lock"]
        assert found[0].nbytes > 6000
        assert found[2].nbytes == 0
        assert removal.remove(found) == sum(left.nbytes for left in found)
        assert leftovers(folder) == []
    expected = ["busy.partial", "lost.llama_jax-old", "poetry.lock", "thesis.partial", "whole"]
    assert names(folder) == expected
    assert verify(folder / "whole").ok
    assert leftovers(tmp_path / "none") == []


def test_save_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    """Arrays in memory are gone after a crash, so there is nothing to go on with."""
    from tiny_models import random_leaves

    config = config_from_hf(LLAMA)
    fail_nth(monkeypatch, ocp.partial, "save", 3, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(DoesNotFit):
        save(tmp_path / "out", unflatten(random_leaves(config)), config)
    assert names(tmp_path) == []
