"""Announcements before a conversion begins: sizes, free space, and what helps where the result is far larger."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import gguf
import pytest
from click.testing import CliRunner
from tiny_models import LLAMA, write_gguf, write_hf

from llama_jax.cli import cli
from llama_jax.convert import convert
from llama_jax.disk import size_text
from llama_jax.library import resolve

DECODED = gguf.GGMLQuantizationType.TQ2_0
WIDE = LLAMA | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}  # rows of whole blocks


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """GGUF files of these tests have no tokenizer, and the disk has a known size."""
    monkeypatch.setattr("llama_jax.convert.gguf_tokenizer.tokenizer_files", lambda metadata: {})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 123 * 10**9))
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))


def stored(path: Path) -> int:
    from llama_jax.checkpoint import open_checkpoint

    return open_checkpoint(path).nbytes


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_sizes_and_free_space(tmp_path: Path, dtype: str | None) -> None:
    write_hf(tmp_path / "hf", LLAMA)
    told: list[str] = []
    out = convert(tmp_path / "hf", tmp_path / "out", dtype=dtype, notify=told.append)
    size = size_text((tmp_path / "hf" / "model.safetensors").stat().st_size)
    becomes = f"{size_text(stored(out))}, {dtype or 'float32'}; 123 GB are free"
    assert told == [f"Converting {tmp_path / 'hf'} ({size}) to {tmp_path / 'out'} ({becomes})"]


def test_a_quantised_source_is_warned_about(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", WIDE, quantisation=DECODED)
    told: list[str] = []
    out = convert(tmp_path / "m.gguf", tmp_path / "out", notify=told.append)
    warning, begins = told
    assert begins.startswith("Converting ")
    times = stored(out) / (tmp_path / "m.gguf").stat().st_size
    assert times > 2
    assert warning.startswith(f"Warning: the checkpoint will be {times:.1f} times as large as its source (GGUF TQ2_0")
    assert f'--dtype bfloat16` (in Python dtype="bfloat16") makes {size_text(stored(out) // 2)} of it' in warning
    assert "--no-convert" in warning
    assert "load(convert=False)" in warning


def test_what_keeps_its_precision_is_not(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", WIDE, quantisation=gguf.GGMLQuantizationType.Q4_1)
    told: list[str] = []
    convert(tmp_path / "m.gguf", tmp_path / "out", notify=told.append)
    assert len(told) == 1
    assert "int4_g32_min; 123 GB" in told[0]


def test_what_does_not_help_is_not_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", WIDE | {"vocab_size": 2048}, quantisation=DECODED)
    told: list[str] = []
    convert(tmp_path / "m.gguf", tmp_path / "out", dtype="bfloat16", notify=told.append)
    assert "--no-convert" in told[0]
    assert "--dtype" not in told[0]


def test_so_is_a_conversion_into_the_cache(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", WIDE, quantisation=DECODED)
    told: list[str] = []
    resolve(tmp_path / "m.gguf", notify=told.append)
    assert [message.split()[0] for message in told] == ["Warning:", "Converting"]
    told.clear()
    resolve(tmp_path / "m.gguf", notify=told.append)
    assert not told


def test_the_command(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", WIDE, quantisation=DECODED)
    done = CliRunner().invoke(cli, ["convert", str(tmp_path / "m.gguf"), str(tmp_path / "out")])
    assert done.exit_code == 0
    assert re.search(r"^Warning: .*--dtype bfloat16.*--no-convert", done.stderr, re.MULTILINE)
    assert re.search(r"^Converting .* GB are free\)$", done.stderr, re.MULTILINE)
    quiet = CliRunner().invoke(cli, ["convert", str(tmp_path / "m.gguf"), str(tmp_path / "out2"), "-q"])
    assert quiet.exit_code == 0
    assert not quiet.stderr


def test_the_default_model_is_converted_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is small, and is to be exact."""
    write_gguf(tmp_path / "m.gguf", WIDE, quantisation=DECODED)
    monkeypatch.setattr("llama_jax.library._default_gguf", lambda *_: tmp_path / "m.gguf")
    told: list[str] = []
    resolve(notify=told.append)
    assert [message.split()[0] for message in told] == ["Converting"]
    done = CliRunner().invoke(cli, ["convert", "smollm2-135m-instruct", str(tmp_path / "out")])
    assert done.exit_code == 0
    assert "Warning" not in done.stderr
