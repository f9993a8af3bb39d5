"""The measured parts of docs/kernels.md, made from files in the form that the benchmarks write, with made-up times."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bench_attention as bench
import bench_shared
import kernel_docs as docs

from llama_jax.measure.bench import Ceilings

LIMITS = Ceilings(read_bytes_per_s=3.06e12, matmul_flops_per_s=795e12)
TILES = {"block_q": 64}


def attention(name: str, backend: str, us: float, *, op: int = 0, **more: Any) -> dict[str, Any]:
    """A row as `bench_attention.py` makes it. op: which of its operations, where both have a case of that name."""
    case = next(case for case in bench.chosen([name]) if bench.is_prefill(case) != bool(op))
    backward = more.pop("backward", False)
    found = {"relative_error": 1e-3, "seconds": us * 1e-6} | more
    return bench.row(case, backend, found, LIMITS, backward=backward)


def cells(section: str, case: str) -> list[str]:
    """The cells behind a case's name."""
    lines = [line for line in section.splitlines() if line.startswith(f"| {case} |")]
    assert len(lines) == 1
    return [cell.strip() for cell in lines[0].strip("|").split("|")[1:]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of three runs."""

    def write(name: str, rows: list[dict[str, Any]], **about: str) -> None:
        bench_shared.write(tmp_path / name, rows, {"bfloat16": LIMITS}, **about)

    model, prompt, step = "llama-3.1-8b", "llama-3.1-8b-b4-t4096", "llama-3.1-8b-b8-s4096"
    rows = [
        attention(model, "pallas_triton", 900.4),
        attention(model, "cudnn", 812.3),
        attention(model, "stock", 1),  # not ours
        attention(model, "cudnn", 2, backward=True),
        attention(model, "pallas_triton", 3, tiles=TILES),
        attention("llama-3.1-8b-f16", "pallas_triton", 4) | {"dtype": "float32"},
        attention("phi-2-heads", "pallas_triton", 50),  # a decode step has this name too
        attention("mistral-7b", "pallas_triton", 5, failed="out of memory"),
        attention(prompt, "pallas_triton", 900),
        attention(prompt, "torch_flash", 800),
        attention(prompt, "stock", 1, relative_error=1.0),
        attention(step, "reference", 110, op=1),
        attention(step, "pallas_triton", 50, op=1),
    ]
    write("h100-attention.json", rows, torch="9.9")
    write("h100-attention-again.json", [attention(step, "reference", 1000, op=1)])  # its name comes first
    moe = {"operation": "moe", "case": "e8k2h4096i14336, 64 tokens", "dtype": "bfloat16", "backend": "reference"}
    write("h100-moe.json", [moe | {"us": 1234.0, "share_of_ceiling": 0.75}])
    return tmp_path


@pytest.mark.slow
def test_floors_and_what_was_measured(folder: Path) -> None:
    sections = docs.sections(folder)
    prompts, steps = sections["floors of flash_attention"], sections["floors of decode_attention"]
    # 4 * 4096 * 4097 / 2 pairs, 4 * 128 operations, 32 heads: 692 us at 795 TFLOP/s.
    assert cells(prompts, "llama-3.1-8b")[-1] == "812 (85%, `cudnn`)"
    assert cells(prompts, "llama-3.1-8b-f16")[-1] == docs.NOT_YET
    assert cells(prompts, "phi-2-heads")[-1] == "50 (54%)"
    assert cells(prompts, "mistral-7b")[-1] == docs.FAILED
    assert cells(steps, "phi-2-heads")[-1] == docs.NOT_YET
    # 134 MB of keys and values: 43.9 us at 3.06 TB/s.
    assert cells(steps, "llama-3.1-8b-b8-s4096")[-1] == "50 (88%)"
    assert cells(sections["floors of moe"], "e8k2h4096i14336, 64 tokens")[-1] == "1234 (75%, `reference`)"


def rows_of(folder: Path, op: str) -> list[dict[str, Any]]:
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return [row for report in reports for row in report["rows"] if row["operation"] == op]


def test_backends_and_peers_beside_each_other(folder: Path) -> None:
    sections = docs.sections(folder)
    prompts, steps = sections["measured flash_attention"], sections["measured decode_attention"]
    none = docs.NO_SUCH_CALL
    found = cells(prompts, "llama-3.1-8b-b4-t4096")
    assert found == [none, none, "611 (77%)", docs.FAILED, "**687 (86%)**", none, none]
    assert "llama-3.2-1b-b4-t4096" not in prompts  # has not been measured
    assert cells(steps, "llama-3.1-8b-b8-s4096") == ["1.22 (40%)", "**2.69 (88%)**", none, none, none, none]
    measured = {row["case"] for row in rows_of(folder, "flash_attention")}
    assert len(prompts.splitlines()) == 1 + 1 + 2 + len(measured & {case.name for case in bench.MEASURED_PREFILLS})
    about = "with jax 0.11.2 and torch 9.9; ceilings in bfloat16: 3.06 TB/s and 795 TFLOP/s."
    assert about.replace("0.11.2", bench.jax.__version__) in prompts
    measured = {row["case"] for row in rows_of(folder, "decode_attention")}
    # Of the run whose only row was measured again nothing is said.
    assert len(steps.splitlines()) == 1 + 1 + 2 + len(measured & {case.name for case in bench.MEASURED_DECODES})


@pytest.mark.slow
def test_the_page_without_files(tmp_path: Path) -> None:
    pages = [path.read_text(encoding="utf-8") for path in docs.PAGES]
    filled = docs.filled(pages, tmp_path)
    assert docs.filled(filled, tmp_path) == filled
    assert docs.sections(tmp_path)["measured flash_attention"] == docs.NOTHING
    assert {cells(docs.sections(tmp_path)["floors of moe"], "e8k2h4096i14336, 64 tokens")[-1]} == {docs.NOT_YET}
