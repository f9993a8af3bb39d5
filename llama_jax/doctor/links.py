"""Checks of the paths between GPUs: by links (AMD's compute driver, `nvidia-smi topo -m`), else by shared memory."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from llama_jax.doctor.child import run_child
from llama_jax.doctor.report import Check
from llama_jax.targets import hardware, kfd

NVIDIA_SMI_DEADLINE_S = 10.0

_NAME = "links"
_P2P_FIX = (
    "in the firmware turn on Above 4G Decoding and Resizable BAR, and ACS off; boot with iommu=pt; "
    "the kernel needs CONFIG_HSA_AMD_P2P and CONFIG_DMABUF_MOVE_NOTIFY"
)
_FINE_GRAIN = "HSA_FORCE_FINE_GRAIN_PCIE"
LEAST_SHARED_MEMORY = 1 << 30
"""Bytes of /dev/shm. RCCL takes some tens of megabytes for each pair of GPUs; containers have 64 MB by default
(https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html)."""

_SHARED_MEMORY_FIX = (
    "docker run --shm-size=16g (or --ipc=host); Kubernetes: an emptyDir with medium Memory at /dev/shm; "
    "without a container: sudo mount -o remount,size=16g /dev/shm"
)

type Pairs = Mapping[tuple[int, int], str]
"""GPUs by their numbers, the smaller first, and what is between them."""


def check_links(
    environ: Mapping[str, str],
    found: tuple[hardware.Gpu, ...],
    root: Path = hardware.ROOT,
    *,
    deadline_s: float = NVIDIA_SMI_DEADLINE_S,
) -> list[Check]:
    """Of each vendor of which there are several GPUs; nothing where it cannot be read.

    Args:
      environ: where `nvidia-smi` is looked for, and its environment.
      deadline_s: seconds that it has.
    """
    checks = []
    count = {vendor: sum(g.vendor == vendor and g.driver for g in found) for vendor in ("amd", "nvidia")}
    if count["amd"] > 1:
        checks += check_amd_links(environ, count["amd"], kfd.links(root))
    if count["nvidia"] > 1:
        checks += _nvidia(environ, deadline_s)
    return checks


def check_amd_links(environ: Mapping[str, str], gpus: int, links: tuple[kfd.KfdLink, ...]) -> list[Check]:
    """XGMI, PCIe, or nothing: what the driver does not list as a link, GPUs cannot use to read one another's memory.

    Args:
      gpus: how many the driver has taken.
      links: between them.
    """
    pairs: dict[tuple[int, int], str] = {}
    # XGMI last, so that it stands where there are both.
    for link in sorted(links, key=lambda link: link.kind == "xgmi"):
        pairs[min(link.source, link.target), max(link.source, link.target)] = link.kind
    everyone = list(itertools.combinations(range(gpus), 2))
    apart = [pair for pair in everyone if pair not in pairs]
    pcie = [pair for pair in everyone if pairs.get(pair, "xgmi") != "xgmi"]
    checks = []
    if apart:
        detail = f"{_some(apart)} cannot read each other's memory, so RCCL goes through the host's"
        checks.append(Check(_NAME, "warning", detail, _P2P_FIX))
    if pcie and environ.get(_FINE_GRAIN) != "1":
        detail = f"{_some(pcie)} reach each other over PCIe, directly only with {_FINE_GRAIN}=1 (RCCL's usage tips)"
        checks.append(Check(_NAME, "warning", detail, f"export {_FINE_GRAIN}=1"))
    if not checks:
        checks.append(Check(_NAME, "ok", _summary({pair: pairs[pair].replace("pcie", "PCIe") for pair in everyone})))
    return checks


def _nvidia(environ: Mapping[str, str], deadline_s: float) -> list[Check]:
    command = shutil.which("nvidia-smi", path=environ.get("PATH", ""))
    if command is None:
        return []
    try:
        done = run_child([command, "topo", "-m"], environ, deadline_s=deadline_s)
    except OSError as error:
        return [
            Check(_NAME, "warning", f"{command} cannot be started: {error.strerror}", "install NVIDIA's driver anew")
        ]
    if done is None:
        detail = f"`nvidia-smi topo -m` did not answer within {deadline_s:g} s"
        return [Check(_NAME, "warning", detail, "look for errors of the driver in `dmesg`; a restart may be needed")]
    pairs = read_nvidia_topology(done.stdout)
    if not pairs:
        said = (done.stderr or done.stdout).strip().splitlines()
        detail = (
            f"`nvidia-smi topo -m` names no links (exit status {done.returncode}): {said[-1][:200] if said else ''}"
        )
        return [Check(_NAME, "warning", detail, "run it by hand; its driver and library have to be of one version")]
    return check_nvidia_links(pairs)


def check_nvidia_links(pairs: Pairs) -> list[Check]:
    """NVLink and PCIe are fine; pairs on different sockets of the host communicate through both processors."""
    across = [pair for pair, link in pairs.items() if link == "SYS"]
    if not across:
        return [Check(_NAME, "ok", _summary(pairs))]
    numbers = sorted({number for pair in pairs for number in pair})
    near = [n for n in numbers if n == numbers[0] or pairs.get((numbers[0], n)) != "SYS"]
    fix = "split a model over GPUs of one socket"
    if len(near) > 1:
        fix += f": CUDA_VISIBLE_DEVICES={','.join(map(str, near))} and --tp {len(near)}"
    detail = f"{_some(across)} reach each other only through the link between the processors (SYS)"
    return [Check(_NAME, "warning", detail, fix)]


def read_nvidia_topology(text: str) -> dict[tuple[int, int], str]:
    """The links between GPUs in the matrix of `nvidia-smi topo -m`: NV# (NVLinks), PIX, PXB, PHB, NODE or SYS.

    Columns are found by the names in the first line, since adapters and processors have columns too.
    """
    # The first line is underlined on a terminal, and by some versions everywhere.
    lines = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    header = next((line for line in lines if line[0] == "GPU0"), [])
    columns = {i: int(name[3:]) for i, name in enumerate(header) if re.fullmatch(r"GPU\d+", name)}
    pairs: dict[tuple[int, int], str] = {}
    for row in lines:
        if row is header or not re.fullmatch(r"GPU\d+", row[0]) or len(row) < 2:
            continue
        first = int(row[0][3:])
        for i, second in columns.items():
            if first < second and i + 1 < len(row):
                pairs[first, second] = row[i + 1]
    return pairs


def _some(pairs: list[tuple[int, int]]) -> str:
    """The first pairs, and how many more there are."""
    listed = ", ".join(f"{first}-{second}" for first, second in pairs[:4])
    more = f" and {len(pairs) - 4} more pairs" if len(pairs) > 4 else ""
    return f"GPUs {listed}{more}"


def _summary(pairs: Pairs) -> str:
    """The number of pairs with each kind of link."""
    kinds = {kind: sum(link == kind for link in pairs.values()) for kind in dict.fromkeys(pairs.values())}
    each = ", ".join(f"{number} over {kind.upper() if kind == 'xgmi' else kind}" for kind, number in kinds.items())
    return f"pairs of GPUs: {each}"


def check_shared_memory(root: Path = hardware.ROOT) -> list[Check]:
    """/dev/shm, through which NCCL and RCCL exchange what GPUs cannot copy to one another."""
    try:
        size = shutil.disk_usage(root / "dev/shm").total
    except OSError:
        return [Check("shared memory", "warning", "there is no /dev/shm, which NCCL and RCCL use", _SHARED_MEMORY_FIX)]
    if size < LEAST_SHARED_MEMORY:
        detail = f"/dev/shm has {size / 1e6:.0f} MB; NCCL and RCCL fail where it is too small for all GPUs"
        return [Check("shared memory", "warning", detail, _SHARED_MEMORY_FIX)]
    return [Check("shared memory", "ok", f"/dev/shm has {size / 1e9:.1f} GB")]
