"""Files of torch.save: every tensor as torch has it, every hostile or damaged one an error, nothing ever run."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import DTYPES, LLAMA, assert_equal, hf_tensors, write_hf
from torch_writer import (
    called,
    integer,
    named,
    pickled,
    state_dict,
    storage,
    tensor,
    text,
    torch_save,
    tupled,
    write_archive,
)

from llama_jax.checkpoint import is_checkpoint
from llama_jax.config import config_from_hf
from llama_jax.convert import convert
from llama_jax.convert.safetensors_file import DTYPES as READ_AS
from llama_jax.convert.torch_file import TorchFile
from llama_jax.errors import CheckpointError, UnsupportedModel
from llama_jax.library import resolve

FORMATS = ("zip.bin", "before_1.6.bin")
NUMPY = {"I64": np.dtype(np.int64), "BOOL": np.dtype(bool)} | dict(READ_AS)
FOUR = {"0": np.arange(4, dtype=np.float32).tobytes()}


@pytest.fixture
def stored(data: Path) -> Path:
    return data / "torch"


def read(file: TorchFile, name: str) -> np.ndarray:
    entry = file.entries[name]
    out = np.empty(entry.shape, NUMPY[entry.dtype])
    file.read_into(name, out)
    return out


# --- What torch wrote -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_every_tensor_is_read_as_torch_has_it(stored: Path, name: str) -> None:
    with np.load(stored / "expected.npz") as expected:
        file = TorchFile(stored / name)
        assert list(file.entries) == expected.files
        for tensor_name in file.entries:
            found = read(file, tensor_name)
            np.testing.assert_array_equal(found.astype(np.float64), expected[tensor_name])
    assert {n: e.dtype for n, e in file.entries.items() if e.dtype != "F32"} == {
        "half": "F16",
        "bfloat16": "BF16",
        "int64": "I64",
        "bool": "BOOL",
    }
    assert not file.entries["transposed"].contiguous
    assert file.entries["shared"] == file.entries["plain"]
    file.close()
    file.close()


@pytest.mark.parametrize("name", FORMATS)
def test_every_part_of_a_tensor_can_be_read(stored: Path, name: str) -> None:
    file = TorchFile(stored / name)
    for tensor_name, entry in file.entries.items():
        whole = read(file, tensor_name).tobytes()
        for size in (entry.itemsize, 3 * entry.itemsize, entry.nbytes):
            for skip in range(0, entry.nbytes - size + 1, entry.itemsize):
                out = np.empty(size, np.uint8)
                file.read_into(tensor_name, out, skip)
                assert out.tobytes() == whole[skip : skip + size]
    with pytest.raises(ValueError, match="bytes 4 to 8 of 4"):
        file.read_into("scalar", np.empty(1, np.float32), 4)
    file.close()


def test_a_pickled_module_is_refused_by_the_name_of_its_class(stored: Path) -> None:
    with pytest.raises(CheckpointError, match=r"module\.bin.*torch\.nn\.modules\.linear\.Linear.*nothing was run"):
        TorchFile(stored / "module.bin")


def test_a_large_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python writes the 64-bit fields that files beyond 4 GiB have, here for small ones."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    arrays = {"a": np.arange(9, dtype=np.float32), "b": np.ones((2, 3), np.float16)}
    torch_save(arrays, tmp_path / "x.bin")
    assert b"PK\x06\x06" in (tmp_path / "x.bin").read_bytes()
    file = TorchFile(tmp_path / "x.bin")
    for name, array in arrays.items():
        np.testing.assert_array_equal(read(file, name), array)
    file.close()


def test_a_file_cut_short_while_it_is_open(tmp_path: Path) -> None:
    torch_save({"a": np.ones(1000, np.float32)}, tmp_path / "x.bin")
    file = TorchFile(tmp_path / "x.bin")
    os.truncate(tmp_path / "x.bin", 500)
    with pytest.raises(CheckpointError, match="ends within tensor a"):
        read(file, "a")
    file.close()


# --- Hostile files ----------------------------------------------------------------------------------------------------


def refused(path: Path, match: str) -> None:
    """Opening fails with our error in less than 5 s."""
    began = time.perf_counter()
    with pytest.raises(CheckpointError, match=match) as e:
        TorchFile(path)
    assert time.perf_counter() - began < 20
    assert str(path) in e.value.message
    assert len(e.value.message) < 1000
    assert e.value.hint


NESTED = b")" + b"\x85" * 490_000
DOUBLING = b")" + b"q\x00h\x00\x86" * 150_000

PICKLES: dict[str, tuple[bytes, str]] = {
    "runs a command": (pickled(called("os", "system", text("touch ran"))), r"names os\.system.*nothing was run"),
    "posix": (pickled(called("posix", "system", text("touch ran"))), r"posix\.system"),
    "evaluates": (pickled(called("builtins", "eval", text("1"))), r"builtins\.eval"),
    "reaches through torch": (pickled(called("torch", "serialization.os.system", text("touch ran"))), "names torch"),
    "loads a library": (pickled(called("torch._utils", "_import_dotted_name", text("os"))), "_import_dotted_name"),
    "name on the stack": (pickled(text("os") + text("system") + b"\x93"), r"os\.system"),
    "number as a name": (pickled(b"K\x01K\x02\x93"), "name that is not a string"),
    "deep tuple as a name": (pickled(text("torch") + NESTED + b"\x93"), "name that is not a string"),
    "old-style instance": (pickled(b"(ios\nsystem\n"), "instruction 0x69"),
    "object": (pickled(b"(cos\nsystem\no"), r"names os\.system"),
    "new object": (pickled(named("collections", "OrderedDict") + b")\x81"), "instruction 0x81"),
    "extension": (pickled(b"\x82\x01"), "instruction 0x82"),
    "attributes": (pickled(b"]}b"), "attributes of a list"),
    "attributes of a tensor": (pickled(tensor(storage("0", 4), 0, [4], [1]) + b"}b"), "attributes of a TensorView"),
    "call of no function": (pickled(b"K\x01)R"), "not a function"),
    "call without arguments": (pickled(named("torch._utils", "_rebuild_tensor_v2") + b")R"), "way that torch does not"),
    "class as a value": (pickled(named("torch", "FloatStorage") + b")R"), "way that torch does not"),
    "parameter of nothing": (pickled(called("torch._utils", "_rebuild_parameter", b"N")), "way that torch does not"),
    "storage of another kind": (pickled(tupled(text("module"), text("x")) + b"Q"), "refers to a storage"),
    "negative storage": (pickled(storage("0", -1)), "refers to a storage"),
    "deep tuple as a storage": (pickled(NESTED + b"Q"), "refers to a storage"),
    "deep lists": (pickled(b"]" * 200_000 + b"a" * 199_999), "holds a list"),
    "deep tuples": (pickled(NESTED), "holds a tuple"),
    "key that doubles": (pickled(b"}" + DOUBLING + b"Ns"), "tuple as the key"),
    "value that doubles": (pickled(b"}" + text("a") + DOUBLING + b"s"), "entry 'a' is a tuple"),
    "endless list": (pickled(b"]q\x00h\x00ah\x00ah\x00a"), "holds a list"),
    "too many instructions": (pickled(b"N" * 2_000_000), "more than 500,000 instructions"),
    "memo far away": (pickled(b"]r\xff\xff\xff\xff"), "holds a list"),
    "memo that is not there": (pickled(b"h\x07"), "malformed"),
    "memo of nothing": (pickled(b"q\x00"), "malformed"),
    "mark that is not there": (pickled(b"t"), "malformed"),
    "mark that stays": (pickled(b"N("), "values left over"),
    "empty stack": (pickled(b"\x87"), "malformed"),
    "odd items": (pickled(b"}(Nu"), "not a dict"),
    "items of a list": (pickled(b"](NNu"), "not a dict"),
    "append to a dict": (pickled(b"}Na"), "not a list"),
    "lying text": (pickled(b"X\xff\xff\xff\xffabc"), "announces 4294967295 bytes"),
    "lying bytes": (pickled(b"\x8d" + b"\xff" * 8), "announces 18446744073709551615 bytes"),
    "lying integer": (pickled(b"\x8b\xff\xff\xff\x7f"), "integer of 2147483647 bytes"),
    "negative length": (pickled(b"\x8b\xff\xff\xff\xff"), "integer of -1 bytes"),
    "text that is not text": (pickled(b"X\x01\x00\x00\x00\xff"), "malformed"),
    "name without an end": (pickled(b"c" + b"a" * 100_000), "name without an end"),
    "no end": (b"\x80\x02N", "ends"),
    "empty": (b"", "ends"),
    "not a dict": (pickled(b"N"), "holds a NoneType"),
    "not a tensor": (state_dict({"epoch": integer(3)}), "entry 'epoch' is a int"),
    "number as a key": (pickled(b"}K\x01Ns"), "not the name of a tensor"),
    "long name": (state_dict({"a" * 100_000: b"N"}), "not the name of a tensor"),
    "unknown storage class": (state_dict({"a": tensor(storage("0", 4, "QInt8Storage"), 0, [4], [1])}), "QInt8Storage"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PICKLES)
def test_hostile_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    data, message = PICKLES[case]
    write_archive(tmp_path / "x.bin", data, FOUR)
    refused(tmp_path / "x.bin", message)
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]


VIEWS: dict[str, tuple[bytes, str]] = {
    "behind the end": (tensor(storage("0", 4), 1, [4], [1]), "its storage has 4 elements"),
    "stride behind the end": (tensor(storage("0", 4), 0, [2, 2], [3, 1]), "its storage has 4 elements"),
    "expanded": (tensor(storage("0", 4), 0, [1 << 40], [0]), "its storage has 4 elements"),
    "expanded rows": (tensor(storage("0", 4), 0, [3, 2], [1, 1]), "its storage has 4 elements"),
    "huge": (tensor(storage("0", 4), 0, [1 << 62] * 8, [1] * 8), "its storage has 4 elements"),
    "beyond 64 bits": (tensor(storage("0", 4), 0, [1 << 70], [1]), "sizes that cannot be"),
    "beyond 128 bits": (tensor(storage("0", 4), 0, [1 << 200], [1]), "integer of 26 bytes"),
    "negative shape": (tensor(storage("0", 4), 0, [-2, -2], [1, 1]), "sizes that cannot be"),
    "negative stride": (tensor(storage("0", 4), 3, [4], [-1]), "sizes that cannot be"),
    "negative offset": (tensor(storage("0", 4), -1, [2], [1]), "sizes that cannot be"),
    "shape and strides differ": (tensor(storage("0", 4), 0, [4], [1, 1]), "sizes that cannot be"),
    "too many dimensions": (tensor(storage("0", 4), 0, [1] * 9, [1] * 9), "sizes that cannot be"),
    "no storage": (tensor(b"N", 0, [4], [1]), "sizes that cannot be"),
    "larger storage than stored": (tensor(storage("0", 5), 0, [4], [1]), "which takes up 16 bytes"),
    "smaller storage than stored": (tensor(storage("0", 3), 0, [3], [1]), "which takes up 16 bytes"),
    "storage of another dtype": (tensor(storage("0", 4, "HalfStorage"), 0, [4], [1]), "which takes up 16 bytes"),
    "storage that is missing": (tensor(storage("1", 4), 0, [4], [1]), "lacks archive/data/1"),
    "storage elsewhere": (tensor(storage("../data.pkl", 4), 0, [4], [1]), "lacks archive/data/../data.pkl"),
}


@pytest.mark.parametrize("case", VIEWS)
def test_tensors_that_cannot_be(tmp_path: Path, case: str) -> None:
    view, message = VIEWS[case]
    write_archive(tmp_path / "x.bin", state_dict({"a": view}), FOUR)
    refused(tmp_path / "x.bin", message)


def test_elements_far_apart(tmp_path: Path) -> None:
    """Reading two numbers must not read megabytes; a part of a joint projection is fine."""
    numel = 1 << 20
    view = {"a": tensor(storage("0", numel), 0, [2], [numel - 1])}
    write_archive(tmp_path / "x.bin", state_dict(view), {"0": bytes(4 * numel)})
    refused(tmp_path / "x.bin", "lie too far apart")
    whole = np.arange(numel, dtype=np.float32)
    view = {"a": tensor(storage("0", numel), 256, [1024, 256], [1024, 1])}
    write_archive(tmp_path / "x.bin", state_dict(view), {"0": whole.tobytes()})
    file = TorchFile(tmp_path / "x.bin")
    np.testing.assert_array_equal(read(file, "a"), whole.reshape(1024, 1024)[:, 256:512])
    file.close()


def archive(path: Path, members: dict[str, bytes], **kwargs: Any) -> None:
    with zipfile.ZipFile(path, "w", **kwargs) as out:
        for name, raw in members.items():
            out.writestr(name, raw)


GOOD = state_dict({"a": tensor(storage("0", 4), 0, [4], [1])})


def edited(change: Callable[[bytearray], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        archive(path, {"x/data.pkl": GOOD, "x/data/0": FOUR["0"]})
        raw = bytearray(path.read_bytes())
        change(raw)
        path.write_bytes(raw)

    return edit


def set_at(mark: bytes, offset: int, fmt: str, value: int, *, last: bool = False) -> Callable[[bytearray], None]:
    """Overwrites a number behind the first or last mark."""
    return lambda raw: struct.pack_into(fmt, raw, (raw.rfind if last else raw.find)(mark) + offset, value)


ENTRY, END, HEADER = b"PK\x01\x02", b"PK\x05\x06", b"PK\x03\x04"
ARCHIVES: dict[str, tuple[Callable[[Path], None], str]] = {
    "bomb": (
        lambda p: archive(p, {"x/data.pkl": GOOD, "x/data/0": bytes(50 << 20)}, compression=zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "another method": (edited(set_at(ENTRY, 10, "<H", 12)), "compressed"),
    "encrypted": (edited(set_at(ENTRY, 8, "<H", 1)), "encrypted"),
    "larger than stored": (edited(set_at(ENTRY, 24, "<I", 1 << 31)), "compressed"),
    "no pickle": (lambda p: archive(p, {"x/data/0": b""}), "0 members called data.pkl"),
    "pickle without a folder": (lambda p: archive(p, {"data.pkl": GOOD}), "0 members called data.pkl"),
    "two pickles": (lambda p: archive(p, {"x/data.pkl": GOOD, "y/data.pkl": GOOD}), "2 members called data.pkl"),
    "big-endian": (lambda p: archive(p, {"x/data.pkl": GOOD, "x/byteorder": b"big"}), "big-endian"),
    "large pickle": (lambda p: archive(p, {"x/data.pkl": GOOD + bytes(17 << 20)}), "more than any state dict needs"),
    "header elsewhere": (edited(set_at(ENTRY, 42, "<I", 7)), "has no header at byte 7"),
    "header behind the end": (edited(set_at(ENTRY, 42, "<I", 1 << 30)), "has no header"),
    "storage behind the end": (
        edited(lambda raw: [set_at(ENTRY, at, "<I", 1 << 30, last=True)(raw) for at in (20, 24)]),
        "it is truncated",
    ),
    "directory behind the end": (edited(set_at(END, 16, "<I", 1 << 30)), "does not fit a file"),
    "huge directory": (edited(set_at(END, 12, "<I", 1 << 30)), "does not fit a file"),
    "directory elsewhere": (edited(set_at(END, 16, "<I", 3)), "directory is malformed"),
    "long name": (edited(set_at(ENTRY, 28, "<H", 0xFFFF)), "directory is malformed"),
    "name that is not text": (edited(set_at(ENTRY, 46, "<B", 0xFF)), "directory is malformed"),
    "64-bit size that is missing": (edited(set_at(ENTRY, 24, "<I", 0xFFFFFFFF)), "size beyond 32 bits is missing"),
    "no directory": (
        edited(lambda raw: raw.__delitem__(slice(raw.find(ENTRY), None))),
        "directory at its end is missing",
    ),
    "only a header": (lambda p: p.write_bytes(HEADER), "directory at its end is missing"),
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "git-lfs": (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "a pointer of Git LFS"),
    "plain pickle": (
        lambda p: p.write_bytes(pickled(called("os", "system", text("true")))),
        "not a file of torch.save",
    ),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_hostile_archives(tmp_path: Path, case: str) -> None:
    make, message = ARCHIVES[case]
    make(tmp_path / "x.bin")
    refused(tmp_path / "x.bin", message)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_stands_twice(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as out:
        for raw in (b"a", b"b"):
            out.writestr("x/data/0", raw)
    refused(tmp_path / "x.bin", "'x/data/0' stands twice")


def test_a_directory_of_fields_that_mean_nothing(tmp_path: Path) -> None:
    """Each entry asks for a 64-bit field behind thousands of empty ones."""
    extra = struct.pack("<2H", 2, 0) * 16_000
    entry = struct.pack("<4s6H3L5H2L", ENTRY, 0, 0, 0, 0, 0, 0, 0, 0xFFFFFFFF, 0, 1, len(extra), 0, 0, 0, 0, 0)
    directory = (entry + b"a" + extra) * 200
    end = struct.pack("<4s4H2LH", END, 0, 0, 200, 200, len(directory), 4, 0)
    (tmp_path / "x.bin").write_bytes(HEADER + directory + end)
    refused(tmp_path / "x.bin", "zip directory is malformed")


def old(*pickles: bytes, data: bytes = b"") -> bytes:
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    return magic + b"".join(map(pickled, pickles)) + data


def old_storage(key: str, numel: int, view: bytes = b"N") -> bytes:
    parts = (text("storage"), named("torch", "FloatStorage"), text(key), text("cpu"), integer(numel), view)
    return tupled(*parts) + b"Q"


VERSION, MACHINE = integer(1001), b"}" + text("little_endian") + b"\x88s"
OLD_DICT = b"}" + text("a") + tensor(old_storage("7", 2), 0, [2], [1]) + b"s"
OLD: dict[str, tuple[bytes, str]] = {
    "no storage": (old(VERSION, MACHINE, OLD_DICT, b"]"), "lacks the storage '7'"),
    "storage that is cut": (
        old(VERSION, MACHINE, OLD_DICT, b"]" + text("7") + b"a", data=b"\x02" + bytes(8)),
        "ends behind",
    ),
    "storage that lies": (
        old(VERSION, MACHINE, OLD_DICT, b"]" + text("7") + b"a", data=b"\xff" * 8 + bytes(8)),
        "ends behind the file",
    ),
    "another size": (
        old(VERSION, MACHINE, OLD_DICT, b"]" + text("7") + b"a", data=struct.pack("<Q", 1) + bytes(4)),
        "which takes up 4 bytes",
    ),
    "storage twice": (
        old(VERSION, MACHINE, OLD_DICT, b"](" + text("7") * 2 + b"e", data=(struct.pack("<Q", 2) + bytes(8)) * 2),
        "stands twice",
    ),
    "unknown storage": (old(VERSION, MACHINE, OLD_DICT, b"]" + text("8") + b"a", data=bytes(99)), "'8' is unknown"),
    "keys that are none": (old(VERSION, MACHINE, OLD_DICT, b"]K\x01a"), "list of storages is malformed"),
    "another version": (old(integer(1000), MACHINE, OLD_DICT, b"]"), "another version or byte order"),
    "big-endian": (old(VERSION, b"}" + text("little_endian") + b"\x89s", OLD_DICT, b"]"), "version or byte order"),
    "view of a storage": (
        old(VERSION, MACHINE, b"}" + text("a") + tensor(old_storage("7", 2, b")"), 0, [2], [1]) + b"s", b"]"),
        "refers to a storage",
    ),
    "code": (old(VERSION, called("os", "system", text("true")), OLD_DICT, b"]"), r"names os\.system"),
    "cut": (old(VERSION, MACHINE)[:-1], "ends"),
}


@pytest.mark.parametrize("case", OLD)
def test_hostile_files_of_the_old_format(tmp_path: Path, case: str) -> None:
    raw, message = OLD[case]
    (tmp_path / "x.bin").write_bytes(raw)
    refused(tmp_path / "x.bin", message)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.slow
def test_hostile_files_take_no_memory(tmp_path: Path) -> None:
    """Measured on a process of its own, since allocations of libraries count too."""
    for i, (data, _) in enumerate(PICKLES.values()):
        write_archive(tmp_path / f"pickle{i}.bin", data, FOUR)
    for i, (view, _) in enumerate(VIEWS.values()):
        write_archive(tmp_path / f"view{i}.bin", state_dict({"a": view}), FOUR)
    for i, (make, _) in enumerate(ARCHIVES.values()):
        make(tmp_path / f"archive{i}.bin")
    for i, (raw, _) in enumerate(OLD.values()):
        (tmp_path / f"old{i}.bin").write_bytes(raw)
    code = """if True:
        import pathlib, resource, sys
        from llama_jax.convert.torch_file import TorchFile
        from llama_jax.errors import CheckpointError
        before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
        for path in pathlib.Path(sys.argv[1]).iterdir():
            try:
                TorchFile(path)
            except CheckpointError:
                refused += 1
        print(refused, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    files, kibibytes = map(int, done.stdout.split())
    assert files == len(list(tmp_path.iterdir()))
    assert kibibytes < 200_000


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot open"):
        TorchFile(tmp_path / "none.bin")


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_any_damage_is_an_error_or_harmless(tmp_path_factory: Any, data: st.DataObject, name: str) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.bin"
    raw = bytearray((Path(__file__).parent / "data" / "torch" / name).read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))])
    try:
        file = TorchFile(path)
    except CheckpointError:
        return
    for tensor_name, entry in file.entries.items():
        file.read_into(tensor_name, np.empty(entry.nbytes, np.uint8))
    file.close()


@given(st.binary(max_size=200))
def test_any_pickle_is_an_error_or_harmless(tmp_path_factory: Any, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.bin"
    write_archive(path, b"\x80\x02" + data, FOUR)
    with contextlib.suppress(CheckpointError):
        TorchFile(path).close()


# --- Hugging Face folders ---------------------------------------------------------------------------------------------


def write_bins(folder: Path, hf: dict[str, Any], *, shards: int = 1) -> dict[str, np.ndarray]:
    """A Hugging Face folder with .bin files; returns the canonical leaves."""
    leaves = write_hf(folder, hf)
    (folder / "model.safetensors").unlink()
    tensors = hf_tensors(config_from_hf(hf), leaves)
    if hf["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # as transformers saved them
    if shards == 1:
        torch_save(tensors, folder / "pytorch_model.bin")
        return leaves
    names, index = sorted(tensors), {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        torch_save({n: tensors[n] for n in names[i::shards]}, folder / file)
        index |= dict.fromkeys(names[i::shards], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return leaves


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_folders_of_bin_files(tmp_path: Path, dtype: str, tied: bool, shards: int) -> None:
    leaves = write_bins(tmp_path / "hf", LLAMA | {"dtype": dtype, "tie_word_embeddings": tied}, shards=shards)
    assert_equal(convert(tmp_path / "hf", tmp_path / "out"), leaves)


def test_safetensors_win(tmp_path: Path) -> None:
    leaves = write_hf(tmp_path / "hf", LLAMA)
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"never opened")
    assert_equal(convert(tmp_path / "hf", tmp_path / "out"), leaves)


def test_a_changed_bin_file_is_converted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    write_bins(tmp_path / "hf", LLAMA)
    first = resolve(tmp_path / "hf", notify=lambda _: None)
    assert is_checkpoint(first)
    os.utime(tmp_path / "hf" / "pytorch_model.bin", (1, 1))
    assert resolve(tmp_path / "hf", notify=lambda _: None) != first


def edit_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = folder / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard missing": (lambda f: (f / "pytorch_model-00002-of-00003.bin").unlink(), "00002-of-00003.bin is missing"),
    "shard elsewhere": (
        lambda f: edit_index(f, lambda m: m.update({"model.norm.weight": "../x.bin"})),
        "leads out of the folder",
    ),
    "tensor missing": (
        lambda f: edit_index(f, lambda m: m.update({"extra": "pytorch_model-00001-of-00003.bin"})),
        "lacks tensor extra, which the index promises",
    ),
    "index without a map": (
        lambda f: (f / "pytorch_model.bin.index.json").write_text("{}"),
        r"pytorch_model\.bin\.index\.json has no valid weight_map",
    ),
    "safetensors in disguise": (
        lambda f: (f / "pytorch_model-00001-of-00003.bin").write_bytes(b"\x08\0\0\0\0\0\0\0{}      "),
        "not a file of torch.save",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_wrong_folders_are_named(tmp_path: Path, case: str) -> None:
    write_bins(tmp_path / "hf", LLAMA, shards=3)
    damage, message = FOLDERS[case]
    damage(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=message) as e:
        convert(tmp_path / "hf", tmp_path / "out")
    assert e.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_dtype_that_is_no_weight_is_named(tmp_path: Path) -> None:
    leaves = write_bins(tmp_path / "hf", LLAMA)
    tensors = {
        name: tensor(storage(str(i), a.size, "LongStorage"), 0, a.shape, [s // a.itemsize for s in a.strides])
        for i, (name, a) in enumerate(hf_tensors(config_from_hf(LLAMA), leaves).items())
    }
    sizes = {str(i): bytes(8 * a.size) for i, a in enumerate(hf_tensors(config_from_hf(LLAMA), leaves).values())}
    write_archive(tmp_path / "hf" / "pytorch_model.bin", state_dict(tensors), sizes)
    with pytest.raises(UnsupportedModel, match="has dtype I64"):
        convert(tmp_path / "hf", tmp_path / "out")
