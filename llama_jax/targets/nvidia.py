"""NVIDIA GPUs. Rates are dense; the data sheets' own figures are often with structured sparsity, twice as high."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from llama_jax.targets.target import Cache, Links, Rates, Source, Target

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30

# Shared memory of a block, registers, L1 by compute capability:
_CAPABILITIES = "https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities"
_XLA = "https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs"


def _sources(paper: str, sheet: str) -> tuple[Source, ...]:
    return (
        Source("wave_size lds_bytes register_bytes", _CAPABILITIES),
        Source("compute_units clock_hz l1 l2 rates", paper),
        Source("memory bandwidth bus links", sheet),
    )


_sm = partial(Target, vendor="nvidia", wave_size=32, register_bytes=256 * _KIB)
_HOPPER = "https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper"
_AMPERE = "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"

H100 = _sm(
    name="h100",
    label="NVIDIA H100 80GB HBM3",
    arch="sm_90",
    compute_units=132,
    lds_bytes=227 * _KIB,
    # The tensor cores' rates belong to a clock of 1.83 GHz (1830 x 132 x 4096 operations).
    clock_hz=1.98e9,
    l1=Cache(256 * _KIB, 132),
    l2=Cache(50 * _MIB),
    memory=80 * _GIB,
    bandwidth=3352.32e9,
    bus=(5120, 5.238e9),
    rates=Rates(bf16=989.4e12, fp8=1978.9e12, fp8_flavour="ocp", int8=1978.9e12, f32=66.9e12),
    links=Links(18, 25e9, "switch"),
    sources=(
        *_sources(_HOPPER, "https://resources.nvidia.com/en-us-gpu-resources/h100-datasheet-24306"),
        Source("bandwidth bus clock_hz", f"{_XLA}/h100_sxm.txtpb"),
    ),
)

H200 = replace(
    H100,
    name="h200",
    label="NVIDIA H200",
    memory=141 * _GIB,
    bandwidth=4800e9,
    bus=(6144, 6.25e9),
    sources=(
        *_sources(_HOPPER, "https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200"),
        Source("bandwidth bus clock_hz", f"{_XLA}/h200.txtpb"),
    ),
)

A100 = _sm(
    name="a100",
    label="NVIDIA A100-SXM4-80GB",
    arch="sm_80",
    compute_units=108,
    lds_bytes=163 * _KIB,
    clock_hz=1.41e9,
    l1=Cache(192 * _KIB, 108),
    l2=Cache(40 * _MIB),
    memory=80 * _GIB,
    bandwidth=2039.04e9,
    bus=(5120, 3.186e9),
    rates=Rates(bf16=312e12, int8=624e12, f32=19.5e12),
    links=Links(12, 25e9, "switch"),
    sources=_sources(
        _AMPERE, "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet.pdf"
    ),
)

L40S = _sm(
    name="l40s",
    label="NVIDIA L40S",
    arch="sm_89",
    compute_units=142,
    lds_bytes=99 * _KIB,
    clock_hz=2.52e9,
    l1=Cache(128 * _KIB, 142),  # L2: 48 or 96 MiB, depending on whom one reads
    memory=48 * _GIB,
    bandwidth=864e9,
    bus=(384, 18e9),
    rates=Rates(bf16=362.05e12, fp8=733e12, fp8_flavour="ocp", int8=733e12, f32=91.6e12),
    links=Links(1, 32e9, "pcie"),
    sources=_sources(_ADA, "https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413"),
)

RTX4090 = _sm(
    name="rtx4090",
    label="NVIDIA GeForce RTX 4090",
    arch="sm_89",
    compute_units=128,
    lds_bytes=99 * _KIB,
    clock_hz=2.52e9,
    l1=Cache(128 * _KIB, 128),
    l2=Cache(72 * _MIB),
    memory=24 * _GIB,
    bandwidth=1008e9,
    bus=(384, 21e9),
    # Half the rate with float32 accumulation.
    rates=Rates(bf16=165.2e12, fp8=330.3e12, fp8_flavour="ocp", int8=660.6e12, f32=82.6e12),
    links=Links(1, 32e9, "pcie"),
    sources=_sources(_ADA, "https://www.nvidia.com/en-us/geforce/graphics-cards/40-series/rtx-4090/"),
)

TARGETS = (H100, H200, A100, RTX4090, L40S)
