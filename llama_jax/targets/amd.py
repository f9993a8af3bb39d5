"""AMD GPUs. Rates are dense, without structured sparsity; GB/s and TFLOP/s are decimal, caches and LDS binary."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from llama_jax.targets.target import Cache, Links, Rates, Source, Target

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30

# Compute units, wave size, LDS, vector registers, caches and memory of every model but the 8060S (read at commit
# 089d7513 of the ROCm repository):
_HARDWARE = "https://rocm.docs.amd.com/en/latest/reference/gpu-arch-specs.html"
_HARDWARE_FIELDS = "compute_units wave_size lds_bytes register_bytes l1 l2 l3 memory"
_DATA_SHEETS = "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs"
_CDNA2 = f"{_DATA_SHEETS}/white-papers/amd-cdna2-white-paper.pdf"
_CDNA3 = f"{_DATA_SHEETS}/white-papers/amd-cdna-3-white-paper.pdf"
_CDNA4 = f"{_DATA_SHEETS}/white-papers/amd-cdna-4-architecture-whitepaper.pdf"
_SHEET_FIELDS = "clock_hz bandwidth bus rates links"


def _instinct(sheet: str, architecture: str) -> tuple[Source, ...]:
    """Sources of an Instinct accelerator: ROCm's table, its own data sheet, its architecture's white paper."""
    return (Source(_HARDWARE_FIELDS, _HARDWARE), Source(_SHEET_FIELDS, sheet), Source("links rates", architecture))


_cdna = partial(Target, vendor="amd", wave_size=64, register_bytes=512 * _KIB)

MI210 = _cdna(
    name="mi210",
    label="AMD Instinct MI210",
    arch="gfx90a",
    compute_units=104,
    lds_bytes=64 * _KIB,
    clock_hz=1.7e9,
    l1=Cache(16 * _KIB, 104),
    l2=Cache(8 * _MIB),
    memory=64 * _GIB,
    bandwidth=1638.4e9,
    bus=(4096, 3.2e9),
    rates=Rates(bf16=181.0e12, int8=181.0e12, f32=45.3e12),
    links=Links(3, 50e9, "full mesh"),
    sources=_instinct("https://www.amd.com/en/products/accelerators/instinct/mi200/mi210.html", _CDNA2),
)

MI250X = replace(
    # One of its two dies: each is a separate device, with half of the memory.
    MI210,
    name="mi250x",
    label="AMD Instinct MI250X",
    compute_units=110,
    l1=Cache(16 * _KIB, 110),
    rates=Rates(bf16=191.5e12, int8=191.5e12, f32=47.9e12),
    # Links differ by pair: four to the die in the same package, one or two to some of the others, none to the rest.
    links=Links(1, 50e9, "full mesh"),
    sources=_instinct("https://www.amd.com/en/products/accelerators/instinct/mi200/mi250x.html", _CDNA2),
)

MI300X = _cdna(
    name="mi300x",
    label="AMD Instinct MI300X",
    arch="gfx942",
    compute_units=304,
    lds_bytes=64 * _KIB,
    clock_hz=2.1e9,
    l1=Cache(32 * _KIB, 304),
    l2=Cache(4 * _MIB, 8),
    l3=Cache(256 * _MIB),
    memory=192 * _GIB,
    bandwidth=5325e9,
    bus=(8192, 5.2e9),
    rates=Rates(bf16=1307.4e12, fp8=2614.9e12, fp8_flavour="fnuz", int8=2614.9e12, f32=163.4e12),
    links=Links(7, 64e9, "full mesh"),
    sources=_instinct(f"{_DATA_SHEETS}/data-sheets/amd-instinct-mi300x-data-sheet.pdf", _CDNA3),
)

MI325X = replace(
    MI300X,
    name="mi325x",
    label="AMD Instinct MI325X",
    memory=256 * _GIB,
    bandwidth=6000e9,
    bus=(8192, 6.0e9),
    sources=_instinct(f"{_DATA_SHEETS}/product-briefs/instinct-mi325x-datasheet.pdf", _CDNA3),
)

MI300A = replace(
    MI300X,
    name="mi300a",
    label="AMD Instinct MI300A",
    compute_units=228,
    l1=Cache(32 * _KIB, 228),
    l2=Cache(4 * _MIB, 6),
    memory=128 * _GIB,
    rates=Rates(bf16=980.6e12, fp8=1961.2e12, fp8_flavour="fnuz", int8=1961.2e12, f32=122.6e12),
    # Four of them in a node, two links to each other one.
    links=Links(3, 128e9, "full mesh"),
    sources=_instinct(f"{_DATA_SHEETS}/data-sheets/amd-instinct-mi300a-data-sheet.pdf", _CDNA3),
)

MI355X = _cdna(
    name="mi355x",
    label="AMD Instinct MI355X",
    arch="gfx950",
    compute_units=256,
    lds_bytes=160 * _KIB,
    clock_hz=2.4e9,
    l1=Cache(32 * _KIB, 256),
    l2=Cache(4 * _MIB, 8),
    l3=Cache(256 * _MIB),
    memory=288 * _GIB,
    bandwidth=8000e9,
    bus=(8192, 8.0e9),
    rates=Rates(bf16=2516.6e12, fp8=5033.2e12, fp8_flavour="ocp", int8=5033.2e12, f32=157.3e12),
    links=Links(7, 76.8e9, "full mesh"),
    sources=_instinct(f"{_DATA_SHEETS}/product-briefs/amd-instinct-mi355x-gpu-brochure.pdf", _CDNA4),
)

MI350X = replace(
    MI355X,
    name="mi350x",
    label="AMD Instinct MI350X",
    clock_hz=2.2e9,
    rates=Rates(bf16=2306.9e12, fp8=4613.7e12, fp8_flavour="ocp", int8=4613.7e12, f32=144.2e12),
    sources=_instinct(f"{_DATA_SHEETS}/product-briefs/amd-instinct-mi350x-gpu-brochure.pdf", _CDNA4),
)


def _radeon(page: str, rates: str) -> tuple[Source, ...]:
    return (
        Source(_HARDWARE_FIELDS, _HARDWARE),
        Source("clock_hz bandwidth bus links", page),
        Source("rates", rates),
    )


_WMMA = "https://gpuopen.com/learn/wmma_on_rdna3/"
# RDNA: a work-group may use 64 of the 128 KiB that two compute units share (LLVM, AMDGPUUsage); rates of WMMA products.
_rdna = partial(Target, vendor="amd", wave_size=32, lds_bytes=64 * _KIB, register_bytes=768 * _KIB)

RX7900XTX = _rdna(
    name="rx7900xtx",
    label="AMD Radeon RX 7900 XTX",
    arch="gfx1100",
    compute_units=96,
    clock_hz=2.5e9,
    l1=Cache(32 * _KIB, 96),
    l2=Cache(6 * _MIB),
    l3=Cache(96 * _MIB),
    memory=24 * _GIB,
    bandwidth=960e9,
    bus=(384, 20e9),
    rates=Rates(bf16=122.8e12, int8=122.8e12, f32=61.4e12),
    links=Links(1, 32e9, "pcie"),
    sources=_radeon(
        "https://www.amd.com/en/products/graphics/desktops/radeon/7000-series/amd-radeon-rx-7900xtx.html", _WMMA
    ),
)

W7900 = replace(
    RX7900XTX,
    name="w7900",
    label="AMD Radeon PRO W7900",
    clock_hz=2.495e9,
    memory=48 * _GIB,
    bandwidth=864e9,
    bus=(384, 18e9),
    rates=Rates(bf16=122.6e12, int8=122.6e12, f32=61.3e12),
    sources=_radeon("https://www.amd.com/en/products/graphics/workstations/radeon-pro/w7900.html", _WMMA),
)

RADEON8060S = _rdna(
    name="radeon8060s",
    label="AMD Radeon 8060S",
    arch="gfx1151",
    compute_units=40,
    clock_hz=2.9e9,
    l1=Cache(32 * _KIB, 40),
    l2=Cache(2 * _MIB),
    l3=Cache(32 * _MIB),
    # Shared with the processor: up to 96 of 128 GB can be set apart for graphics.
    memory=96 * _GIB,
    bandwidth=256e9,
    bus=(256, 8e9),
    rates=Rates(bf16=59.4e12, int8=59.4e12, f32=29.7e12),
    sources=(
        Source(
            "compute_units clock_hz memory bandwidth bus links",
            "https://www.amd.com/en/products/processors/laptop/ryzen/ai-300-series/amd-ryzen-ai-max-plus-395.html",
        ),
        Source("l1 l2 l3", "https://chipsandcheese.com/p/strix-halos-memory-subsystem-tackling"),
        Source("wave_size lds_bytes register_bytes", "https://llvm.org/docs/AMDGPUUsage.html"),
        Source("rates", _WMMA),
    ),
)

RX9070XT = _rdna(
    name="rx9070xt",
    label="AMD Radeon RX 9070 XT",
    arch="gfx1201",
    compute_units=64,
    clock_hz=2.97e9,
    l1=Cache(32 * _KIB, 64),
    l2=Cache(8 * _MIB),
    l3=Cache(64 * _MIB),
    memory=16 * _GIB,
    bandwidth=640e9,
    bus=(256, 20e9),
    rates=Rates(bf16=194.6e12, fp8=389.3e12, fp8_flavour="ocp", int8=389.3e12, f32=48.7e12),
    links=Links(1, 64e9, "pcie"),
    sources=_radeon(
        "https://www.amd.com/en/products/graphics/desktops/radeon/9000-series/amd-radeon-rx-9070xt.html",
        "https://gpuopen.com/learn/using_matrix_core_amd_rdna4/",
    ),
)

TARGETS = (
    # The first of an architecture stands for it where nothing more is known of a device.
    MI250X,
    MI210,
    MI300X,
    MI325X,
    MI300A,
    MI355X,
    MI350X,
    RX7900XTX,
    W7900,
    RADEON8060S,
    RX9070XT,
)
