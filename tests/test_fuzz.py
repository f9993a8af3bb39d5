"""Faults that fuzzing found stay fixed, random damage to sound files ends in typed errors, and the fuzzer works."""

from __future__ import annotations

import contextlib
import io
import json
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz.engine import Recorder
from fuzz.guard import check
from fuzz.mutate_binary import _File as GgufParts
from fuzz.targets import TARGETS, Target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_jax.checkpoint import verify
from llama_jax.checkpoint.lock import read_lock
from llama_jax.convert.gguf_file import MAX_HEADER_BYTES, GgufFile
from llama_jax.errors import CheckpointError, LlamaJaxError

FUZZ = Path(__file__).parent / "fuzz"

type Prepared = tuple[Target, Callable[[bytes], None], list[bytes]]


@pytest.fixture(scope="module", params=TARGETS)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    target = TARGETS[request.param]
    return target, *target.prepare(tmp_path_factory.mktemp(target.name))


def test_sound_files_are_read(prepared: Prepared) -> None:
    """Otherwise nothing behind the first check would ever be fuzzed."""
    _, read, seeds = prepared
    read(seeds[0])
    for seed in seeds:
        assert check(lambda seed=seed: read(seed)) is None


def test_found_cases(prepared: Prepared) -> None:
    target, read, _ = prepared
    for case in sorted((FUZZ / "cases" / target.name).glob("*")):
        finding = check(lambda case=case: read(case.read_bytes()))
        assert finding is None, f"{case}\n{finding.detail}"


def test_cases_belong_to_targets() -> None:
    assert {folder.name for folder in (FUZZ / "cases").iterdir()} <= TARGETS.keys()


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, 2**32), steps=st.integers(1, 4))
def test_damaged_files_end_in_typed_errors(prepared: Prepared, number: int, steps: int) -> None:
    target, read, seeds = prepared
    rng, mutate = random.Random(number), target.mutator(seeds)
    data = rng.choice(seeds)
    for _ in range(steps):
        data = mutate(data, rng)
    finding = check(lambda: read(data))
    assert finding is None, finding.detail


def _gguf(data: bytes) -> bool:
    return GgufParts.parse(data).pack() == data


def _safetensors(data: bytes) -> bool:
    length = int.from_bytes(data[:8], "little")
    return bool(json.loads(data[8 : 8 + length]))


def _json(data: bytes) -> bool:
    return json.loads(data) is not None


def _zip(data: bytes) -> bool:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.testzip() is None


def _any(data: bytes) -> bool:
    return True


FORMATS = {
    **{".gguf": _gguf, ".safetensors": _safetensors, ".json": _json, "": _json},
    **{".bin": _zip, ".pth": _zip, ".model": _any},
}


def test_mutated_files_are_read_further_than_their_first_bytes(prepared: Prepared) -> None:
    """Of 200 mutations a good part is still JSON, or a file with the right counts and lengths."""
    target, _, seeds = prepared
    rng, mutate = random.Random(0), target.mutator(seeds)
    made = {mutate(rng.choice(seeds), rng) for _ in range(200)}
    assert len(made) > 100
    sound = 0
    for data in made:
        with contextlib.suppress(Exception):
            sound += FORMATS[Path(target.file).suffix](data)
    assert sound > 100


# --- The limits -------------------------------------------------------------------------------------------------------


def _forever() -> None:
    while True:
        pass


def _stubborn() -> None:
    while True:
        try:
            time.perf_counter()
        except Exception:
            continue


def _raises(error: BaseException) -> Callable[[], None]:
    def read() -> None:
        raise error

    return read


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (_raises(KeyError("x")), "KeyError"),
        (_raises(AssertionError()), "AssertionError"),
        (_raises(RecursionError()), "RecursionError"),
        (_forever, "TooSlow"),
        (_stubborn, "TooSlow"),
        (lambda: np.empty(1 << 30, np.uint8), "MemoryError"),
    ],
    ids=["key", "assert", "recursion", "loop", "stubborn", "memory"],
)
def test_findings(read: Callable[[], None], kind: str) -> None:
    finding = check(read, seconds=0.2, memory=256 << 20)
    assert finding is not None
    assert finding.kind == kind
    assert np.empty(1 << 30, np.uint8).nbytes == 1 << 30  # the limits are gone again


def test_no_findings() -> None:
    assert check(lambda: None) is None
    assert check(_raises(CheckpointError("damaged", hint="again"))) is None


def test_long_and_unprintable_errors_are_findings() -> None:
    class Raw(LlamaJaxError):
        def __str__(self) -> str:
            return self.args[0]

    long, odd = Raw("x"), Raw("x")
    long.args, odd.args = ("x" * 20_000,), ("\ud800",)
    assert [f.kind for e in (long, odd) if (f := check(_raises(e)))] == ["TooLong", "Unprintable"]


def test_the_smallest_case_of_a_finding_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def read(data: bytes) -> None:
        if data != b"fine":
            raise ValueError(data)

    record = Recorder(read, tmp_path / "cases")
    for data in (b"fine", b"four4", b"one", b"seven77"):
        record(data)
    (case,) = (tmp_path / "cases").iterdir()
    assert case.name.startswith("ValueError-test_fuzz-read-")
    assert case.read_bytes() == b"one"
    assert record.executions == 4
    assert capsys.readouterr().out.count("FINDING") == 1


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """A run without findings; with atheris it is the same command without --engine."""
    command = [sys.executable, str(FUZZ / "run.py"), "safetensors", "--seconds", "1", "--engine", "random"]
    done = subprocess.run([*command, "--cases", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    name, runs, *_, findings = done.stdout.split()
    assert (name, findings) == ("safetensors", "0")
    assert int(runs.replace(",", "")) > 10
    assert not list(tmp_path.rglob("*-*"))


# --- What was found, each with the error that it now gives ------------------------------------------------------------


def _header(
    shape: Any = (2,), offsets: Any = (0, 8), name: str = "a", notes: Any = None, more: Mapping[str, Any] | None = None
) -> bytes:
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": offsets} | dict(more or {})}
    raw = json.dumps(header if notes is None else header | {"__metadata__": notes}).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(8)


DIGITS = 10**4300 - 1


@pytest.mark.parametrize(
    ("target", "data", "message"),
    [
        ("safetensors", _header([DIGITS, DIGITS]), "tensor a is malformed.*63 bits"),
        ("safetensors", _header([1] * 65), "tensor a is malformed.*65 dimensions"),
        ("safetensors", _header({}), "tensor a is malformed.*not lists"),
        ("safetensors", _header(more={"x": float("-inf")}), "-Infinity is not JSON"),
        ("safetensors", _header(more={"x": 1}), "more keys"),
        ("safetensors", _header(name="\ud800"), "not valid JSON.*surrogates"),
        ("safetensors", _header(notes=[1]), "__metadata__"),
        ("safetensors", _header(notes={"a": 1}), "__metadata__"),
        ("safetensors", _header(notes={"a": "\ud800"}), "not valid JSON.*surrogates"),
        ("safetensors", b"\x03" + bytes(7) + b" {}", "not a JSON object"),
        ("hf_index", b'{"weight_map": {"x": "a\\u0000b"}}', "cannot be looked up"),
        ("hf_index", b'{"weight_map": {"x": "\\ud800"}}', "cannot be looked up"),
        ("hf_index", json.dumps({"weight_map": {"x": "y" * 300}}).encode(), "cannot be looked up"),
        ("hf_generation", b'{"eos_token_id": "2"}', "eos_token_id is not a token id: '2'"),
        ("hf_generation", b'{"eos_token_id": [2, null]}', "eos_token_id is not a token id: None"),
        ("hf_generation", b'{"eos_token_id": [2, 2.5]}', "eos_token_id is not a token id: 2.5"),
        ("hf_generation", b'{"x": "' + b"y" * (32 << 20) + b'"}', "33,554,4.. bytes"),
    ],
)
def test_refused(tmp_path: Path, target: str, data: bytes, message: str) -> None:
    read, _ = TARGETS[target].prepare(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        read(data)
    assert TARGETS[target].file.split("/")[-1] in str(error.value) or target == "hf_index"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dtype", ["float32"]),
        ("dtype", "int8"),
        ("source", {"kind": 1}),
        ("source", {"licence": []}),
        ("tool", {"name": 1}),
        ("files", {"../config.json": "x"}),
        ("files", {"/etc/passwd": "x"}),
        ("files", {"a/b": "x"}),
        ("files", {"..": "x"}),
        ("files", {"": "x"}),
        ("files", {"a\0": "x"}),
        ("files", {"\ud800": "x"}),
        ("files", {"config.json": 1}),
    ],
)
def test_markers_refused(tmp_path: Path, key: str, value: Any) -> None:
    read, (marker,) = TARGETS["checkpoint_marker"].prepare(tmp_path)
    with pytest.raises(CheckpointError, match=r"llama_jax\.json is damaged"):
        read(json.dumps(json.loads(marker) | {key: value}).encode())


@pytest.mark.parametrize("shape", [[float("inf")], [1e400], ["8"], "88", [2**63], [1] * 9, [True, 8], None])
def test_shapes_refused(tmp_path: Path, shape: Any) -> None:
    read, (seed,) = TARGETS["checkpoint_tensors"].prepare(tmp_path)
    metadata = json.loads(seed)
    metadata["custom_metadata"]["tensors"]["final_norm.weight"]["shape"] = shape
    with pytest.raises(CheckpointError, match="list of tensors"):
        read(json.dumps(metadata).encode())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("store", None),
        ("store", {"/dev/zero": "x"}),
        ("store", {"../x": "x"}),
        ("source_files", [{"name": "a", "bytes": "1", "sha256": "x"}]),
        ("source", {"kind": None}),
        ("files", {"config.json": 1}),
        ("tool", {"version": []}),
    ],
)
def test_locks_refused(tmp_path: Path, key: str, value: Any) -> None:
    TARGETS["checkpoint_lock"].prepare(tmp_path)
    path = tmp_path / "input" / "out"
    lock = path / "model.lock.json"
    lock.write_text(json.dumps(json.loads(lock.read_text()) | {key: value}))
    assert any("model.lock.json is damaged" in failure for failure in verify(path).failures)
    with pytest.raises(CheckpointError, match=r"model\.lock\.json is damaged"):
        read_lock(path)


@pytest.mark.parametrize("shape", [[1 << 33, 1 << 10], [1 << 62], [0], [[]], None])
def test_shapes_take_no_memory(tmp_path: Path, shape: Any) -> None:
    """Neither the list of tensors nor the store's own metadata can announce more than there is."""
    read, (seed,) = TARGETS["checkpoint_zarr"].prepare(tmp_path)
    zarr = json.loads(seed) | {"shape": shape}
    finding = check(lambda: read(json.dumps(zarr).encode()), seconds=1, memory=64 << 20)
    assert finding is None, finding.detail


def test_messages_are_bounded_and_can_be_written() -> None:
    error = CheckpointError("a\ud800b" + "x" * 100_000 + "end", hint="\udfff")
    assert len(str(error)) < 5_000
    assert str(error).startswith("a\\ud800b")
    assert error.message.endswith("end")
    str(error).encode("utf-8")


def test_gguf_headers_are_bounded(tmp_path: Path) -> None:
    """A sparse file of any size costs nothing to make."""
    path = tmp_path / "m.gguf"
    count = MAX_HEADER_BYTES + 1
    head = b"GGUF" + b"".join(n.to_bytes(s, "little") for n, s in ((3, 4), (0, 8), (1, 8), (1, 8)))
    path.write_bytes(head + b"k" + b"".join(n.to_bytes(s, "little") for n, s in ((9, 4), (0, 4), (count, 8))))
    with path.open("ab") as file:
        file.truncate(count + 100)
    with pytest.raises(CheckpointError, match="more than 67,108,864 bytes"):
        GgufFile(path)
