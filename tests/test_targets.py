"""The table of targets against other people's figures, and how devices are told apart."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llama_jax import plugins
from llama_jax.errors import RequestError
from llama_jax.targets import TARGETS, Target, abstract_device, added_targets, current, detected, find, kfd
from llama_jax.targets.detect import Facts, identify

BY_NAME = {target.name: target for target in TARGETS}
GPUS = [target for target in TARGETS if target.vendor != "cpu"]

# Figures of github.com/openxla/xla, xla/backends/gpu/target_config/specs, at the commits named: core_count,
# threads_per_warp, shared_memory_per_block_optin, registers_per_core_limit, level-2 cache (of one die), clock_rate_ghz,
# memory_bandwidth, device_memory_size.
XLA = {
    "mi250x": (110, 64, 65536, None, 8388608, 1.7, 1638400000000, 67628957696),  # mi200, e66fe789
    "mi300x": (304, 64, 65536, 131072, 4194304, 2.1, 6810000000000, 270566162432),  # mi300, 09e10b8f
    "mi350x": (256, 64, 163840, 131072, 4194304, 2.2, 7782000000000, 270566162432),  # mi350, 4926822b
    "h100": (132, 32, 232448, 65536, 52428800, 1.98, 3352320000000, 84942979072),  # h100_sxm, 0774019d
    "h200": (132, 32, 232448, 65536, 52428800, 1.98, 4800000000000, 151397597184),  # h200, 4336d12e
    "a100": (108, 32, 166912, 65536, 41943040, 1.41, 2039040000000, 85100068864),  # a100_sxm_80, 4336d12e
}
# XLA gives both one memory, which is neither card's, and bandwidths that no data sheet has (5.3 and 8 TB/s): ours are
# the data sheets'.
NOT_XLAS_MEMORY = {"mi300x", "mi350x"}

# Operations of one compute unit in a clock: bf16, fp8, int8, f32. CDNA: the tables in ROCm's docs/conceptual/gpu-arch
# (commit 089d7513) and AMD's CDNA 4 white paper; RDNA: gpuopen.com on WMMA; NVIDIA: its white papers.
PER_CLOCK = {
    "gfx90a": (1024, 0, 1024, 256),
    "gfx942": (2048, 4096, 4096, 256),
    "gfx950": (4096, 8192, 8192, 256),
    "gfx1100": (512, 0, 512, 256),
    "gfx1151": (512, 0, 512, 256),
    "gfx1201": (1024, 2048, 2048, 256),
    "sm_80": (2048, 0, 4096, 128),
    "sm_90": (4096, 8192, 8192, 256),
    "l40s": (1024, 2048, 2048, 256),
    "rtx4090": (512, 1024, 2048, 256),
}


@pytest.mark.parametrize("name", XLA)
def test_figures_equal_xlas(name: str) -> None:
    target = BY_NAME[name]
    units, wave, lds, registers, l2, clock, bandwidth, memory = XLA[name]
    assert (target.compute_units, target.wave_size, target.lds_bytes) == (units, wave, lds)
    assert registers in (None, target.register_bytes // 4)
    assert target.l2 is not None
    assert target.l2.size == l2
    assert target.clock_hz == pytest.approx(clock * 1e9)
    as_xla = target.bandwidth == pytest.approx(bandwidth) and target.memory == pytest.approx(memory, rel=0.02)
    assert as_xla == (name not in NOT_XLAS_MEMORY)


@pytest.mark.parametrize("target", GPUS, ids=lambda t: t.name)
def test_rates_follow_from_units_and_clock(target: Target) -> None:
    per_clock = PER_CLOCK.get(target.name) or PER_CLOCK[target.arch]
    rates = (target.rates.bf16, target.rates.fp8, target.rates.int8, target.rates.f32)
    for rate, operations, is_matrix in zip(rates, per_clock, (True, True, True, False), strict=True):
        # NVIDIA states Hopper's tensor cores at a lower clock than its vector units (1829.5 MHz in XLA's spec).
        clock = 1.8295e9 if target.arch == "sm_90" and is_matrix else target.clock_hz
        assert rate == pytest.approx(operations * target.compute_units * clock, rel=0.015)


@pytest.mark.parametrize("target", GPUS, ids=lambda t: t.name)
def test_figures_fit_together(target: Target) -> None:
    assert target.bus is not None
    width, transfers = target.bus
    assert target.bandwidth == pytest.approx(width * transfers / 8, rel=0.03)
    assert target.rates.f16 == target.rates.bf16 > target.rates.f32
    assert (target.rates.fp8 > 0) == (target.rates.fp8_flavour is not None)
    assert target.l1 is not None
    assert target.l1.instances == target.compute_units
    assert (target.l3 is not None) == (target.vendor == "amd" and target.arch != "gfx90a")
    assert target.wave_size == (64 if target.arch.startswith("gfx9") else 32)
    assert 16 << 30 <= target.memory <= 288 << 30
    assert target.links.count == 0 or target.links.bandwidth > 0


@pytest.mark.parametrize("target", GPUS, ids=lambda t: t.name)
def test_every_figure_has_a_source(target: Target) -> None:
    for field in dataclasses.fields(Target):
        value = getattr(target, field.name)
        if field.name in ("name", "label", "vendor", "arch", "sources") or not value:
            continue
        source = target.source(field.name)
        assert source, f"{target.name}.{field.name}"
        assert source.startswith("https://")


def test_names_are_unique_and_hashable() -> None:
    assert len(BY_NAME) == len({t.label for t in TARGETS}) == len(set(TARGETS)) == len(TARGETS)


def test_rates_by_dtype() -> None:
    cdna3, cdna4 = BY_NAME["mi300x"].rates, BY_NAME["mi355x"].rates
    assert cdna3.of("float8_e4m3fnuz") == cdna4.of("float8_e4m3fn") / 5033.2e12 * 2614.9e12 > cdna3.of("bfloat16")
    assert cdna3.of("float8_e4m3fn") == cdna4.of("float8_e5m2fnuz") == cdna3.of("complex64") == 0
    assert cdna3.of("float16") == cdna3.of("bfloat16") > cdna3.of("float32") > 0


def test_links() -> None:
    mi300x, h100, radeon = (BY_NAME[n].links for n in ("mi300x", "h100", "rx7900xtx"))
    assert [mi300x.ring_bandwidth(n) for n in (1, 2, 8)] == [0, 64e9, 7 * 64e9]
    assert h100.ring_bandwidth(2) == h100.ring_bandwidth(8) == 450e9
    assert radeon.ring_bandwidth(2) == 32e9


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("mi300x", "mi300x"),
        ("MI325X", "mi325x"),
        ("AMD Instinct MI300A", "mi300a"),
        ("gfx942", "mi300x"),
        ("gfx942:sramecc+:xnack-", "mi300x"),
        ("gfx950", "mi355x"),
        ("gfx90a", "mi250x"),
        ("gfx1100", "rx7900xtx"),
        ("gfx1151", "radeon8060s"),
        ("Radeon RX 7900 XTX", "rx7900xtx"),
        ("rx-9070-xt", "rx9070xt"),
        ("Radeon PRO W7900", "w7900"),
        ("AMD Radeon 8060S", "radeon8060s"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("sm_90", "h100"),
        ("GeForce RTX 4090", "rtx4090"),
        ("cpu", "cpu"),
    ],
)
def test_find(name: str, found: str) -> None:
    assert find(name).name == found


@pytest.mark.parametrize("name", ["", "mi", "gfx", "gfx1234", "amd", "instinct", "mi300xx", "\0"])
def test_find_nothing(name: str) -> None:
    with pytest.raises(RequestError, match="unknown target") as caught:
        find(name)
    assert caught.value.param == "target"
    assert "mi300x" in caught.value.hint


# --- Devices ----------------------------------------------------------------------------------------------------------

GIB = 1 << 30


@pytest.mark.parametrize(
    ("facts", "found"),
    [
        (Facts("amd", "AMD Instinct MI300X", "gfx942", 304), "mi300x"),
        (Facts("amd", "AMD Instinct MI325X", "gfx942", 304), "mi325x"),
        (Facts("amd", "AMD Instinct MI300X VF", "gfx942", 304), "mi300x"),
        (Facts("amd", "AMD Instinct MI250X/MI250", "gfx90a", 110), "mi250x"),
        (Facts("amd", "", "gfx942", 304, 206141652992), "mi300x"),
        (Facts("amd", "", "gfx942", 304, 255 * GIB), "mi325x"),
        (Facts("amd", "", "gfx942", 228, 128 * GIB), "mi300a"),
        (Facts("amd", "AMD Radeon Graphics", "gfx1151", 40), "radeon8060s"),
        (Facts("amd", "", "gfx1100", 96, 48 * GIB), "w7900"),
        (Facts("amd", "", "gfx90a", 104, 64 * GIB), "mi210"),
        (Facts("amd", "", "gfx942"), "mi300x"),
        (Facts("nvidia", "NVIDIA H100 80GB HBM3", "sm_90", 132), "h100"),
        (Facts("nvidia", "NVIDIA H200", "sm_90", 132), "h200"),
        (Facts("nvidia", "NVIDIA GeForce RTX 4090", "sm_89", 128), "rtx4090"),
        (Facts("cpu", "AMD EPYC"), "cpu"),
    ],
)
def test_known_devices(facts: Facts, found: str) -> None:
    assert identify(facts) is BY_NAME[found]


def test_part_of_a_device() -> None:
    whole, part = BY_NAME["mi300x"], identify(Facts("amd", "AMD Instinct MI300X", "gfx942", 38, 24 * GIB))
    assert part.name == "mi300x-38cu"
    assert (part.arch, part.wave_size, part.lds_bytes) == (whole.arch, whole.wave_size, whole.lds_bytes)
    assert part.rates.bf16 == pytest.approx(whole.rates.bf16 / 8)
    assert part.rates.fp8_flavour == "fnuz"
    assert part.memory == 24 * GIB
    assert part.bandwidth < whole.bandwidth / 7


@pytest.mark.parametrize(
    ("facts", "name", "wave_size", "lds"),
    [
        (Facts("amd", "AMD Instinct MI308X", "gfx942", 80, 192 * GIB), "amd-instinct-mi308x", 64, 64),
        (Facts("amd", "AMD Instinct MI999", "gfx950", 512), "amd-instinct-mi999", 64, 160),
        (Facts("amd", "AMD Radeon Graphics", "gfx1030", 36), "amd-radeon-graphics", 32, 64),
        (Facts("amd", "", "gfx908", 120), "gfx908", 64, 64),
        (Facts("amd", "AMD Instinct MI300X", "gfx942", 999), "amd-instinct-mi300x", 64, 64),
        (Facts("nvidia", "NVIDIA GH200 480GB", "sm_90", 144), "nvidia-gh200-480gb", 32, 227),
        (Facts("nvidia", "NVIDIA T4", "sm_75", 40), "nvidia-t4", 32, 48),
        (Facts("nvidia"), "unknown", 32, 48),
    ],
)
def test_unknown_devices(facts: Facts, name: str, wave_size: int, lds: int) -> None:
    target = identify(facts)
    assert (target.name, target.wave_size, target.lds_bytes) == (name, wave_size, lds << 10)
    assert (target.arch, target.compute_units) == (facts.arch or "unknown", facts.compute_units)
    assert target.rates.bf16 == 0  # not guessed


class Device:
    """A device as a GPU backend of jax describes it."""

    def __init__(self, **facts: Any):
        self.platform = "gpu"
        self.__dict__.update(facts)


@pytest.mark.parametrize(
    ("device", "found"),
    [
        (Device(device_kind="AMD Instinct MI300X", compute_capability="gfx942", core_count=304), "mi300x"),
        (Device(device_kind="AMD Radeon Graphics", compute_capability="gfx1151", core_count=40), "radeon8060s"),
        (Device(device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0", core_count=132), "h100"),
        (Device(device_kind="Radeon of the future"), "radeon-of-the-future"),
    ],
)
def test_current_is_the_default_device(monkeypatch: pytest.MonkeyPatch, device: Device, found: str) -> None:
    monkeypatch.setattr(jax, "local_devices", lambda **_: [device])
    assert current().name == found


def test_current() -> None:
    if jax.default_backend() == "cpu":
        assert current() is BY_NAME["cpu"]
    with jax.default_device(jax.devices("cpu")[0]):
        assert current() is BY_NAME["cpu"]
    with jax.default_device("cpu"):
        assert current() is BY_NAME["cpu"]


def test_abstract_device_is_part_of_the_cache_key() -> None:
    seen = []

    @jax.jit
    def f(x: jax.Array) -> jax.Array:
        seen.append(current().name)
        return x

    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    for name in ("mi300x", "mi325x", "mi300x", "h100", "cpu"):
        with abstract_device(BY_NAME[name]):
            f.trace(shape)
    assert seen[:4] == ["mi300x", "mi325x", "h100", "cpu"]  # each once: the second mi300x is cached
    mine = dataclasses.replace(BY_NAME["mi300x"], name="mine", compute_units=1)
    with abstract_device(mine):
        assert current() is mine


def test_abstract_mesh_of_others() -> None:
    """Where only jax's own abstract device says what is compiled for."""
    device = jax.sharding.AbstractDevice(device_kind="gfx942", num_cores=228, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        assert current().name == "mi300a"
    device = jax.sharding.AbstractDevice(device_kind="cpu", num_cores=None, platform="cpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        assert current().name == "cpu"


def test_detected(tmp_path: Path) -> None:
    nodes = tmp_path / "sys/class/kfd/kfd/topology/nodes"
    for i, (version, simds, memory) in enumerate(
        [(0, 0, 0), (90402, 1216, 192), (90402, 1216, 256), (90402, 912, 128)]
    ):
        (nodes / f"{i}/mem_banks/0").mkdir(parents=True)
        facts = (
            f"simd_count {simds}\nsimd_per_cu 4\nwave_front_size 64\nlds_size_in_kb 64\ngfx_target_version {version}\n"
        )
        (nodes / f"{i}/properties").write_text(facts)
        (nodes / f"{i}/mem_banks/0/properties").write_text(f"heap_type 1\nsize_in_bytes {memory * GIB}\n")
    assert [target.name for target in detected(tmp_path)] == ["mi300x", "mi325x", "mi300a"]
    first = kfd.gpus(tmp_path)[0]
    assert first == kfd.KfdGpu("gfx942", 304, 192 * GIB)
    assert detected(tmp_path / "nothing") == ()


# --- Targets of others ------------------------------------------------------------------------------------------------


@pytest.fixture
def entry_point(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A dictionary of entry points of the group, as if packages had them."""
    points: dict[str, str] = {}

    def entry_points(*, group: str) -> list[importlib.metadata.EntryPoint]:
        assert group == "llama_jax.targets"
        return [importlib.metadata.EntryPoint(name, value, group) for name, value in points.items()]

    monkeypatch.setattr(plugins, "entry_points", entry_points)
    for cached in (plugins.load, identify):
        cached.cache_clear()
    yield points
    for cached in (plugins.load, identify):
        cached.cache_clear()


NEW = Target("mi999", "amd", "gfx999", 999, 64, 1 << 20, label="AMD Instinct MI999")
NOT_A_TARGET = ["mi999"]


def test_entry_point(entry_point: dict[str, str]) -> None:
    entry_point["new"] = f"{__name__}:NEW"
    assert added_targets() == (NEW,)
    assert find("MI999") is find("gfx999") is NEW
    assert identify(Facts("amd", "AMD Instinct MI999", "gfx999", 999)) is NEW


KNOWN = (Target("mi998", "amd", "gfx999", 1, 64, 1 << 20), Target("mi300x", "amd", "gfx942", 1, 64, 1 << 20))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("no_such_module_at_all:x", "No module named"),
        (f"{__name__}:no_such_name", "no attribute"),
        (f"{__name__}:NOT_A_TARGET", "neither a llama_jax.targets.Target nor a tuple of them"),
        (f"{__name__}:KNOWN", "another target 'mi300x'"),
    ],
)
def test_broken_entry_point(entry_point: dict[str, str], value: str, problem: str) -> None:
    """It is reported, and takes neither another package's targets with it nor ours."""
    entry_point |= {"broken": value, "new": f"{__name__}:NEW"}
    with pytest.warns(RuntimeWarning, match=f"the plugin 'broken' of an unknown package .*{problem}"):
        assert find("mi999") is NEW
    with pytest.raises(RequestError, match="unknown target 'mi998'") as caught:
        find("mi998")
    assert "the plugin 'broken'" in str(caught.value.hint)
    assert problem in str(caught.value.hint)
    # What this package knows works on.
    assert find("mi300x").name == "mi300x"
    assert identify(Facts("amd", "AMD Instinct MI300X", "gfx942", 304)).name == "mi300x"
