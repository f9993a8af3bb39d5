"""`scripts/bench_attention.py` on the CPU, with tiny shapes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bench_attention as bench

from llama_jax.kernels.registry import operation

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


@pytest.mark.slow
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


def test_backends_of_the_other_operation_are_left_out() -> None:
    rows = bench.main([*TINY, "--shape", "2,1,32,2,1,16", "--backends", "cudnn", "reference"])
    assert [row["backend"] for row in rows] == ["reference"]
    assert rows[0]["operation"] == "decode_attention"


def test_peers(tmp_path: Path) -> None:
    """Peers answer from a process of their own; here a stand-in for torch's, which knows one case and then dies."""
    fake = tmp_path / "python"
    answer = {"relative_error": 1e-7, "seconds": 1e-3, "timing": "CUDA graph", "torch": "2.11.0"}
    fake.write_text(f"#!/bin/sh\ncat > {tmp_path}/$$.json\necho noise\necho 'result: {json.dumps(answer)}'\nexit 3\n")
    fake.chmod(0o755)
    cases = ["--shape", "1,64,64,2,1,16", "--shape", "2,1,32,2,1,16,8", "--shape", "2,1,32,2,1,16"]
    out = tmp_path / "rows.json"
    args = ["--backends", "torch_flex", "torch_flash", "--torch-python", str(fake), "--json", str(out)]
    rows = bench.main([*TINY, *cases, *args])
    assert [(row["case"], row["backend"]) for row in rows] == [
        ("1,64,64,2,1,16", "torch_flash"),
        ("1,64,64,2,1,16", "torch_flex"),
        ("2,1,32,2,1,16", "torch_flash"),
        ("2,1,32,2,1,16", "torch_flex"),
    ]
    work = 64 * 65 // 2 * 2 * 16 * 4
    assert rows[0]["us"] == pytest.approx(1000)
    assert rows[0]["TFLOP_per_s"] == pytest.approx(work / 1e-3 / 1e12)
    assert "ended early (exit code 3)" in rows[2]["failed"]
    assert json.loads(out.read_text())["torch"] == "2.11.0"
    requests = [json.loads(path.read_text()) for path in tmp_path.glob("[0-9]*.json")]
    assert {request["backend"] for request in requests} == {"torch_flash", "torch_flex"}
    assert [case["q_len"] for case in requests[0]["cases"]] == [64, 1]


def test_peers_without_torch() -> None:
    if importlib.util.find_spec("torch"):
        pytest.skip("torch is here")
    rows = bench.main([*TINY, "--shape", "1,16,16,2,1,16", "--backends", "reference", "--peers"])
    assert [row["backend"] for row in rows] == ["reference", *bench.peers.BACKENDS]
    assert all("torch cannot be imported" in row["failed"] for row in rows[1:])
    with pytest.raises(SystemExit, match="--torch-python"):
        bench.main([*TINY, "--shape", "1,16,16,2,1,16", "--peers", "--torch-python", "/no/such/python"])


def test_which_cases_torch_has() -> None:
    has = {
        text: [name for name in bench.peers.BACKENDS if bench.torch_has(name, bench.parse_shape(text))]
        for text in ("1,64,64,2,1,16", "1,1,64,2,1,16", "1,4,64,2,1,16", "1,1,64,2,1,16,16")
    }
    assert list(has.values()) == [list(bench.peers.BACKENDS), list(bench.peers.BACKENDS), ["torch_flex"], []]
    packed = next(case for case in bench.chosen(["floors"]) if case.name == "llama-3.1-8b-packed")
    assert not bench.torch_has("torch_flex", packed)
    assert bench.stock(packed) is None


def test_cases_by_name() -> None:
    assert {case.name for case in bench.chosen(["floors"])} == {
        case.name for name in bench.OPERATIONS for case in operation(name).models(None)
    }
    assert [case.q_len for case in bench.chosen(["phi-2-heads"])] == [2048, 1]
    assert bench.chosen(["llama-3.1-8b-b4-t4096"])[0].kv_len == 4096
    assert len(bench.chosen(["prefill", "decode"])) == len(bench.MEASURED_PREFILLS) + len(bench.MEASURED_DECODES)
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
