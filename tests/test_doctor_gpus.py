"""Reports of `doctor` on machines with several GPUs: shared memory, links, and variables."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from test_doctor import ON_CPU, ON_GPU, amd_machine, write

from llama_jax.cli import cli
from llama_jax.doctor import Check, doctor, examination
from llama_jax.doctor.environment import check_environment, shown
from llama_jax.doctor.examination import check_several, gpus_in_use
from llama_jax.doctor.kernels import check_graphs
from llama_jax.doctor.links import check_links, check_shared_memory, read_nvidia_topology
from llama_jax.doctor.probe import Probe
from llama_jax.doctor.rocm import check_workarounds
from llama_jax.doctor.visibility import check_visibility
from llama_jax.targets import hardware, kfd
from llama_jax.targets.hardware import Gpu

FINE = {"HSA_FORCE_FINE_GRAIN_PCIE": "1"}
NVIDIA = (Gpu("nvidia", "NVIDIA H100"),) * 2


def link(root: Path, folder: str, source: int, target: int, kind: int, flags: int = 1) -> None:
    """A link between the nodes of two GPUs, which are numbered from 1: node 0 is the processor."""
    nodes = root / "sys/class/kfd/kfd/topology/nodes" / str(source + 1)
    number = len(list(nodes.glob(f"{folder}/*")))
    write(
        nodes / folder / str(number) / "properties",
        f"type {kind}\nversion_major 0\nnode_from {source + 1}\nnode_to {target + 1}\nweight 15\nflags {flags}\n",
    )


def linked(root: Path, gpus: int, *xgmi: tuple[int, int]) -> Path:
    """GPUs with a link to the processor each, and XGMI between these pairs."""
    amd_machine(root, *[90402] * gpus)
    for gpu in range(gpus):
        link(root, "io_links", gpu, -1, 2)
    for first, second in xgmi:
        link(root, "io_links", first, second, 11)
        link(root, "io_links", second, first, 11)
    return root


def only(checks: list[Check]) -> Check:
    (check,) = checks
    return check


# --- Shared memory ----------------------------------------------------------------------------------------------------


def test_small_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(total=64 << 20)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    check = only(check_shared_memory(tmp_path))
    assert asked == [tmp_path / "dev/shm"]
    assert check.status == "warning"
    assert "67 MB" in check.detail
    assert "--shm-size" in check.fix
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=(1 << 30) - 1))
    assert only(check_shared_memory(tmp_path)).status == "warning"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 30))
    assert only(check_shared_memory(tmp_path)).status == "ok"


def test_no_shared_memory(tmp_path: Path) -> None:
    assert "there is no /dev/shm" in only(check_shared_memory(tmp_path)).detail


def test_one_gpu_needs_none(tmp_path: Path) -> None:
    """GPUs count as jax sees them: one of eight is one."""
    root = amd_machine(tmp_path, 90402, 90402)
    found = hardware.gpus(root)
    assert gpus_in_use(found, ON_CPU) == gpus_in_use(found, Probe(error="hangs")) == 2
    assert gpus_in_use((Gpu("amd", "PCI", driver=False),) * 2, ON_CPU) == 0
    one = Probe({"backend": "gpu", "devices": [{"name": "d:0", "kind": "AMD", "memory": 1}]})
    assert check_several({}, found, one, root) == []
    assert {check.name for check in check_several({}, found, ON_GPU, root)} == {"shared memory", "links"}


# --- Links of AMD GPUs ------------------------------------------------------------------------------------------------


def test_links_of_the_driver(tmp_path: Path) -> None:
    root = linked(tmp_path, 3, (0, 1))
    link(root, "p2p_links", 2, 0, 2)
    link(root, "p2p_links", 1, 2, 2, flags=1 | 1 << 4)  # peers may not
    assert set(kfd.links(root)) == {kfd.KfdLink(0, 1, "xgmi"), kfd.KfdLink(1, 0, "xgmi"), kfd.KfdLink(2, 0, "pcie")}
    assert kfd.links(tmp_path / "nothing") == ()


def test_all_over_xgmi(tmp_path: Path) -> None:
    root = linked(tmp_path, 4, *itertools.combinations(range(4), 2))
    check = only(check_links({}, hardware.gpus(root), root))
    assert (check.status, check.detail) == ("ok", "pairs of GPUs: 6 over XGMI")


def test_pairs_without_a_link(tmp_path: Path) -> None:
    root = linked(tmp_path, 4, (0, 1), (2, 3))
    check = only(check_links({}, hardware.gpus(root), root))
    assert check.status == "warning"
    assert check.detail.startswith("GPUs 0-2, 0-3, 1-2, 1-3 cannot read each other's memory")
    assert "Above 4G Decoding" in check.fix
    assert "iommu=pt" in check.fix
    many = linked(tmp_path / "eight", 8)
    assert "and 24 more pairs" in only(check_links({}, hardware.gpus(many), many)).detail


def test_peers_over_pcie(tmp_path: Path) -> None:
    root = linked(tmp_path, 2)
    link(root, "p2p_links", 0, 1, 2)
    check = only(check_links({}, hardware.gpus(root), root))
    assert check.fix == "export HSA_FORCE_FINE_GRAIN_PCIE=1"
    assert "GPUs 0-1 reach each other over PCIe" in check.detail
    check = only(check_links(FINE, hardware.gpus(root), root))
    assert (check.status, check.detail) == ("ok", "pairs of GPUs: 1 over PCIe")


def test_one_gpu_has_no_links(tmp_path: Path) -> None:
    root = linked(tmp_path, 1)
    assert check_links({}, hardware.gpus(root), root) == []


# --- Links of NVIDIA GPUs ---------------------------------------------------------------------------------------------

NVLINK = """\
\x1b[4m\tGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tPIX\t0-47,96-143\t0\t\tN/A
GPU1\tNV18\t X \tSYS\t48-95\t1\t\tN/A
NIC0\tPIX\tSYS\t X \t\t\t\t

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
"""
SOCKETS = """\
\tGPU0\tGPU1\tGPU2\tGPU3\tCPU Affinity
GPU0\t X \tPHB\tSYS\tSYS\t0-15
GPU1\tPHB\t X \tSYS\tSYS\t0-15
GPU2\tSYS\tSYS\t X \tNODE\t16-31
GPU3\tSYS\tSYS\tNODE\t X \t16-31
"""


def fake_smi(folder: Path, script: str) -> dict[str, str]:
    """An environment in which `nvidia-smi` is this shell script."""
    write(folder / "bin/nvidia-smi", f"#!/bin/sh\n{script}\n")
    (folder / "bin/nvidia-smi").chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:/usr/bin:/bin"}


def answer(text: str) -> str:
    return f'test "$*" = "topo -m" || exit 9\ncat <<"END"\n{text}END'


def test_topology() -> None:
    assert read_nvidia_topology(NVLINK) == {(0, 1): "NV18"}
    assert read_nvidia_topology(SOCKETS) == {
        (0, 1): "PHB",
        (0, 2): "SYS",
        (0, 3): "SYS",
        (1, 2): "SYS",
        (1, 3): "SYS",
        (2, 3): "NODE",
    }
    for nothing in ("", "No devices were found\n", "GPU0\n", "\tGPU0\tGPU1\nGPU0\n"):
        assert read_nvidia_topology(nothing) == {}


def test_nvlink(tmp_path: Path) -> None:
    check = only(check_links(fake_smi(tmp_path, answer(NVLINK)), NVIDIA, tmp_path))
    assert (check.status, check.detail) == ("ok", "pairs of GPUs: 1 over NV18")


def test_two_sockets(tmp_path: Path) -> None:
    check = only(check_links(fake_smi(tmp_path, answer(SOCKETS)), NVIDIA * 2, tmp_path))
    assert check.status == "warning"
    assert "GPUs 0-2, 0-3, 1-2, 1-3 reach each other only" in check.detail
    assert check.fix.endswith("CUDA_VISIBLE_DEVICES=0,1 and --tp 2")


def test_nvidia_smi_that_is_not_there(tmp_path: Path) -> None:
    assert check_links({"PATH": str(tmp_path)}, NVIDIA, tmp_path) == []
    assert check_links({}, NVIDIA, tmp_path) == []


def test_nvidia_smi_that_hangs(tmp_path: Path) -> None:
    began = time.monotonic()
    check = only(check_links(fake_smi(tmp_path, "exec sleep 60"), NVIDIA, tmp_path, deadline_s=0.3))
    assert time.monotonic() - began < 10
    assert "did not answer within 0.3 s" in check.detail
    assert check.fix


def test_nvidia_smi_that_fails(tmp_path: Path) -> None:
    environ = fake_smi(tmp_path, "echo Driver/library version mismatch >&2; exit 18")
    check = only(check_links(environ, NVIDIA, tmp_path))
    assert "exit status 18): Driver/library version mismatch" in check.detail
    broken = fake_smi(tmp_path / "broken", "")
    (tmp_path / "broken/bin/nvidia-smi").write_bytes(b"\x7fELF nonsense")
    assert "cannot be started" in only(check_links(broken, NVIDIA, tmp_path)).detail


# --- Variables --------------------------------------------------------------------------------------------------------


def test_variables_that_are_shown() -> None:
    environ = {
        "HOME": "/root",
        "NCCL_DEBUG": "INFO",
        "RCCL_MSCCL_ENABLE": "0",
        "HSA_ENABLE_SDMA": "0",
        "XLA_FLAGS": "--xla_gpu_x=1",
        "AMD_COMGR_NAMESPACE": "1",
    }
    assert shown(environ) == {name: value for name, value in environ.items() if name != "HOME"}


@pytest.mark.parametrize("name", ["NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE"])
def test_ways_between_gpus_that_are_shut(name: str) -> None:
    check = only(check_environment({name: "1"}, NVIDIA))
    assert check.status == "warning"
    assert check.detail.startswith(f"{name}=1: GPUs")
    assert check.fix.startswith(f"unset {name}")
    assert check_environment({name: "0"}, NVIDIA) == []
    assert check_environment({name: "1"}, NVIDIA[:1]) == []


@pytest.mark.parametrize(
    ("arch", "rocm", "environ", "probe", "warned"),
    [
        (90500, "7.2.0-43", {}, ON_GPU, True),
        (90500, "7.13.0", {}, ON_GPU, False),
        (90500, "10.1.0", {}, ON_GPU, False),
        (90500, "", {}, ON_GPU, False),  # it has started
        (90500, "", {}, Probe(error="jax did not name its devices within 90 s"), True),
        (90500, "7.2.0", {"AMD_COMGR_NAMESPACE": "1"}, ON_GPU, False),
        (90500, "7.2.0", {"AMD_COMGR_NAMESPACE": "0"}, ON_GPU, True),
        (90402, "7.2.0", {}, Probe(error="hangs"), False),
        (90402, "7.12.0", {}, ON_GPU, True),
    ],
)
def test_namespace_of_an_older_rocm(
    tmp_path: Path, arch: int, rocm: str, environ: dict[str, str], probe: Probe, warned: bool
) -> None:
    root = amd_machine(tmp_path, arch)
    if rocm:
        write(root / "opt/rocm/.info/version", rocm)
    checks = check_workarounds(environ, hardware.gpus(root), probe, hardware.rocm(root, []))
    fixes = [check.fix for check in checks if "COMGR" in check.fix]
    assert fixes == ["export AMD_COMGR_NAMESPACE=1"] * warned


NO_GRAPHS = "--xla_gpu_enable_command_buffer="


@pytest.mark.parametrize(
    ("rocm", "flags", "probe", "fix"),
    [
        ("7.13.0", None, ON_GPU, f"export XLA_FLAGS={NO_GRAPHS}"),
        ("7.13.0", "--xla_dump_to=/d", ON_GPU, f"export XLA_FLAGS='{NO_GRAPHS} --xla_dump_to=/d'"),
        ("7.13.0", f"{NO_GRAPHS}FUSION", ON_GPU, None),  # the user's own choice
        ("7.14.0", None, ON_GPU, None),
        ("10.1.0", None, Probe(error="jax failed (exit status -11): no message"), f"export XLA_FLAGS={NO_GRAPHS}"),
        ("10.1.0", None, Probe(error="jax failed (exit status 1): no message"), None),
        ("", None, ON_GPU, None),
    ],
)
def test_graphs_that_fail(tmp_path: Path, rocm: str, flags: str | None, probe: Probe, fix: str | None) -> None:
    root = amd_machine(tmp_path, 90402)
    if rocm:
        write(root / "opt/rocm/.info/version", rocm)
    environ = {} if flags is None else {"XLA_FLAGS": flags}
    found = hardware.rocm(root, [])
    fixes = [check.fix for check in check_workarounds(environ, hardware.gpus(root), probe, found)]
    assert fixes == ([fix] if fix else [])
    assert check_workarounds(environ, NVIDIA, probe, found) == []


def test_libraries_of_wheels(tmp_path: Path) -> None:
    root, rocm = amd_machine(tmp_path, 90402), hardware.Rocm("10.1.0", Path("/p/_rocm_sdk_core/lib"), wheels=True)
    found = hardware.gpus(root)
    check = only(check_workarounds({"LD_LIBRARY_PATH": "/mine"}, found, ON_CPU, rocm))
    assert check.fix == "export LD_LIBRARY_PATH=/p/_rocm_sdk_core/lib:/mine"
    assert check_workarounds({"LD_LIBRARY_PATH": "/p/_rocm_sdk_core/lib"}, found, ON_CPU, rocm) == []
    assert check_workarounds({}, found, ON_GPU, rocm) == []


AMD = (Gpu("amd", "gfx942"),) * 4


@pytest.mark.parametrize(
    ("found", "environ", "status", "said"),
    [
        (AMD, {"HIP_VISIBLE_DEVICES": "0,1"}, "ok", "2 of 4 can be seen"),
        (AMD, {"ROCR_VISIBLE_DEVICES": "GPU-deadbeef"}, "ok", "1 of 4"),
        (AMD, {"CUDA_VISIBLE_DEVICES": ""}, "warning", "hides all GPUs"),
        (AMD, {"HIP_VISIBLE_DEVICES": "-1"}, "warning", "hides all GPUs"),
        (AMD, {"HIP_VISIBLE_DEVICES": "0,4,1"}, "warning", "there is no GPU 4 among 4"),
        (AMD, {"HIP_VISIBLE_DEVICES": "1,1"}, "warning", "names a GPU twice"),
        (AMD, {"HIP_VISIBLE_DEVICES": "0", "ROCR_VISIBLE_DEVICES": "2,3"}, "warning", "the one before it leaves"),
        (NVIDIA, {"CUDA_VISIBLE_DEVICES": "1"}, "ok", "1 of 2"),
        (NVIDIA, {"CUDA_VISIBLE_DEVICES": "2"}, "warning", "hides all GPUs"),
    ],
)
def test_hidden_gpus(found: tuple[Gpu, ...], environ: dict[str, str], status: str, said: str) -> None:
    check = only(check_visibility(environ, found))
    assert (check.name, check.status) == ("visible GPUs", status)
    assert said in check.detail
    assert bool(check.fix) == (status == "warning")


def test_nothing_is_hidden() -> None:
    assert check_visibility({}, AMD) == []
    assert check_visibility({"HIP_VISIBLE_DEVICES": "0"}, NVIDIA) == []
    assert check_visibility({"CUDA_VISIBLE_DEVICES": "0"}, ()) == []


# --- Graphs -----------------------------------------------------------------------------------------------------------


def test_options_of_decode_steps() -> None:
    assert check_graphs([{}, {}]) == []  # AMD
    (one,) = check_graphs([{"xla_a": "1,2", "xla_b": ""}])
    assert one == Check("graphs", "ok", "decode steps of a batch are compiled with xla_a=1,2 xla_b=")
    _, several = check_graphs([{"xla_a": "1"}, {"xla_c": "3"}])
    assert several.detail == "a split model's decode steps of a batch are compiled with xla_c=3"


# --- All together -----------------------------------------------------------------------------------------------------


def test_command_on_two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Advice is a warning: it does not change the exit code."""
    root = linked(tmp_path, 2)
    monkeypatch.setattr(examination, "probe_jax", lambda *_, **__: ON_GPU)
    report = doctor(root=root, environ={"NCCL_P2P_DISABLE": "1", "XLA_FLAGS": "--xla_dump_to=x"})
    by_name = {check.name: check.status for check in report.checks}
    assert by_name["shared memory"] == by_name["links"] == by_name["environment"] == "warning"
    assert report.exit_code == 0
    monkeypatch.setattr("llama_jax.doctor.doctor", lambda **_: report)
    text = CliRunner().invoke(cli, ["doctor"]).stdout
    assert "WARNING shared memory: there is no /dev/shm" in text
    assert "        fix: docker run --shm-size" in text
    assert "variables:  XLA_FLAGS=--xla_dump_to=x NCCL_P2P_DISABLE=1" in text
    found = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)
    assert {"shared memory", "links"} <= {check["name"] for check in found["checks"]}
