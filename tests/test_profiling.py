"""Reading profiles: kernels by device and program."""

from __future__ import annotations

import json

import jax
import pytest
from click.testing import CliRunner
from helpers import tiny_config
from jax.profiler import ProfileData

from llama_jax.cli import cli
from llama_jax.errors import NoDevice
from llama_jax.measure import bench, profiling
from llama_jax.measure.profiling import KernelTime, profile, programs
from llama_jax.model.loaded import Model
from llama_jax.params import init_params

PROFILE = """
planes {
  name: "/device:GPU:0"
  stat_metadata { key: 1 value { id: 1 name: "hlo_module" } }
  event_metadata { key: 1 value { id: 1 name: "gemm_fusion_dot_3" } }
  event_metadata { key: 2 value { id: 2 name: "decode_attention_shares" } }
  event_metadata { key: 3 value { id: 3 name: "ncclDevKernel_AllReduce_Sum_bf16_RING_LL" } }
  event_metadata { key: 4 value { id: 4 name: "jit_step" } }
  lines {
    name: "Stream #24(Compute)"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 4000000 stats { metadata_id: 1 str_value: "jit_step(7)" } }
    events { metadata_id: 2 offset_ps: 5000000 duration_ps: 2000000 stats { metadata_id: 1 str_value: "jit_step(7)" } }
    events { metadata_id: 1 offset_ps: 9000000 duration_ps: 1000000 stats { metadata_id: 1 str_value: "jit_step(7)" } }
    events { metadata_id: 1 offset_ps: 90000000 duration_ps: 9 stats { metadata_id: 1 str_value: "jit_other(1)" } }
  }
  lines {
    name: "Stream #25(Compute)"
    events { metadata_id: 3 offset_ps: 6000000 duration_ps: 2000000 stats { metadata_id: 1 str_value: "jit_step(7)" } }
  }
  lines { name: "XLA Modules" events { metadata_id: 4 offset_ps: 0 duration_ps: 10000000 } }
}
planes {
  name: "/host:CPU"
  event_metadata { key: 1 value { id: 1 name: "call" } }
  lines { name: "Stream of consciousness" events { metadata_id: 1 offset_ps: 0 duration_ps: 1000 } }
}
"""


def test_programs_of_a_profile() -> None:
    data = ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(PROFILE))
    other, step = programs(data)
    assert (other.program, step.program, step.device) == ("jit_other", "jit_step", "/device:GPU:0")
    assert step.span_s == pytest.approx(10e-6)
    assert step.busy_s == pytest.approx(4e-6 + 3e-6 + 1e-6)  # what overlaps counts once
    assert [(k.name[:4], k.calls) for k in step.kernels] == [("gemm", 2), ("deco", 1), ("nccl", 1)]
    assert step.by_kind() == pytest.approx({"product": 5e-6, "attention": 2e-6, "communication": 2e-6})


def test_calls_of_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(PROFILE))
    monkeypatch.setattr(profiling, "_profiles", lambda run: [data])
    calls = profiling.calls_of(lambda: None)
    assert calls["jit_step"]["gemm_fusion_dot_3"] == pytest.approx([4e-6, 1e-6])
    assert calls["jit_step"]["decode_attention_shares"] == pytest.approx([2e-6])
    assert set(calls) == {"jit_step", "jit_other"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_128x128_64x6_2x1_v_bz_TNT", "product"),
        ("Cijk_Alik_Bljk_BBS_BH_MT128x128x64", "product"),
        ("flash_attention_forward", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("moe_gate_up", "experts"),
        ("all_reduce_256_0_fusion_1", "communication"),
        ("MemcpyD2D", "copy"),
        ("loop_multiply_fusion_31", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert KernelTime(name, 1, 1.0).kind == kind


@pytest.mark.slow
def test_a_cpu_has_no_such_profile() -> None:
    with pytest.raises(NoDevice, match="no kernel"):
        profile(lambda: jax.block_until_ready(jax.numpy.ones(3) + 1))


@pytest.mark.parametrize("as_json", [False, True])
def test_bench_shows_where_the_time_goes(monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    data = ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(PROFILE))
    found = tuple(programs(data))
    model = Model(init_params(tiny_config(), jax.random.key(0)), tiny_config(), name="tiny")
    timed = bench.BenchResult(2, 4, 3, *[1.0] * 7)
    monkeypatch.setattr(bench, "random_model", lambda *args, **options: model)
    monkeypatch.setattr(bench, "measure_ceilings", lambda dtype: bench.Ceilings(1e9, 1e9))
    monkeypatch.setattr(bench, "bench", lambda model, ceilings, **options: timed)
    monkeypatch.setattr(bench, "profile_generation", lambda model, **options: found)
    args = ["bench", "--preset", "tiny", "--batch", "2", "--profile", *(["--json"] if as_json else [])]
    done = CliRunner().invoke(cli, args, catch_exceptions=False)
    assert done.exit_code == 0
    if as_json:
        (profiled,) = json.loads(done.stdout)["profiles"]
        assert profiled["batch"] == 2
        assert [program["program"] for program in profiled["programs"]] == ["jit_other", "jit_step"]
    else:
        times = "0.008 ms in kernels, of 0.010 from first to last"
        assert f"jit_step: {times} (product 0.005, attention 0.002, communication 0.002)" in done.stdout
        assert "2 x     2.50 us  gemm_fusion_dot_3" in done.stdout
