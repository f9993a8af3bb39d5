"""`scripts/bench_attention.py` on the CPU, with tiny shapes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bench_attention as bench

TINY = ["--ceiling-size", "64", "--repeats", "1", "--calls", "1", "--dtype", "float32"]


@pytest.mark.slow
def test_prefill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    shape = ["--shape", "1,16,16,2,1,16", "--backends", "reference", "pallas_interpret"]
    rows = bench.main([*TINY, *shape, "--backward", "--sweep", "1", "--json", str(out)])
    assert [(row["backend"], row["backward"], "tiles" in row) for row in rows] == [
        ("reference", False, False),
        ("reference", True, False),
        ("pallas_interpret", False, False),
        ("pallas_interpret", True, False),
        ("pallas_interpret", False, True),
    ]
    assert not [row["failed"] for row in rows if "failed" in row]
    assert all(row["relative_error"] < 1e-6 and row["TFLOP_per_s"] > 0 for row in rows)
    assert json.loads(out.read_text())["rows"] == rows
    assert "TFLOP/s" in capsys.readouterr().out


def test_decode() -> None:
    rows = bench.main([*TINY, "--shape", "2,1,32,2,1,16,8", "--backends", "reference", "pallas_interpret"])
    assert [row["backend"] for row in rows] == ["reference", "pallas_interpret"]
    assert all(row["relative_error"] < 1e-6 and row["TB_per_s"] > 0 for row in rows)


def test_backends_that_cannot_run_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ["--shape", "1,16,16,2,1,16"]
    rows = bench.main([*TINY, *shape, "--backends", "cudnn", "nonsense"])
    assert "NVIDIA" in rows[0]["failed"]
    assert "no backend" in rows[1]["failed"]
    monkeypatch.setattr(bench, "attention", lambda **kwargs: jnp.zeros_like(kwargs["q"]))
    rows = bench.main([*TINY, *shape, "--backends", "reference"])
    assert "relative error 1.00e+00" in rows[0]["failed"]


def test_cases_by_name() -> None:
    assert bench.chosen(["llama-3.1-8b-b4-t4096"])[0].kv_len == 4096
    assert len(bench.chosen(["prefill", "decode"])) == len(bench.PREFILL) + len(bench.DECODE)
    with pytest.raises(SystemExit, match="no case is called x"):
        bench.chosen(["x"])


def test_stock_kernels_take_the_same_arguments() -> None:
    """They compile for GPUs only; here, that they are called as they want to be."""
    for text in ("2,128,128,4,2,64", "2,1,256,4,2,64"):
        case = bench.parse_shape(text)
        call = bench.stock(case)
        assert call is not None
        out = jax.eval_shape(call, **case.arguments())
        assert out.shape == (case.batch, case.q_len, 4, 64)
    assert bench.stock(bench.parse_shape("2,1,256,4,2,64,16")) is None
    assert bench.stock(bench.parse_shape("2,64,128,4,2,64")) is None
