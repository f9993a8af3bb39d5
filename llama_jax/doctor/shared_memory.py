"""Shared memory, through which NCCL and RCCL exchange what GPUs cannot copy to one another."""

from __future__ import annotations

import shutil
from pathlib import Path

from llama_jax.doctor.report import Check
from llama_jax.targets import hardware

LEAST = 1 << 30
"""Bytes of /dev/shm. RCCL takes some tens of megabytes for each pair of GPUs; containers have 64 MB by default
(https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html)."""

_FIX = (
    "docker run --shm-size=16g (or --ipc=host); Kubernetes: an emptyDir with medium Memory at /dev/shm; "
    "without a container: sudo mount -o remount,size=16g /dev/shm"
)


def check_shared_memory(root: Path = hardware.ROOT) -> list[Check]:
    """/dev/shm of a machine with several GPUs."""
    try:
        size = shutil.disk_usage(root / "dev/shm").total
    except OSError:
        return [Check("shared memory", "warning", "there is no /dev/shm, which NCCL and RCCL use", _FIX)]
    if size < LEAST:
        detail = f"/dev/shm has {size / 1e6:.0f} MB; NCCL and RCCL fail where it is too small for all GPUs"
        return [Check("shared memory", "warning", detail, _FIX)]
    return [Check("shared memory", "ok", f"/dev/shm has {size / 1e9:.1f} GB")]
