"""The entry of a device model in the table of targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Vendor = Literal["amd", "nvidia", "cpu"]
Topology = Literal["full mesh", "switch", "pcie", "none"]
Fp8 = Literal["fnuz", "ocp"]


@dataclass(frozen=True)
class Cache:
    """One level of data cache: `instances` of `size` bytes each."""

    size: int
    instances: int = 1

    @property
    def total(self) -> int:
        return self.size * self.instances


@dataclass(frozen=True)
class Rates:
    """Dense peak rates, in operations a second (a multiply-add counts as two); 0 where the hardware has none.

    Attributes:
      bf16: with float32 accumulation; `f16` is the same on every device of the table.
      fp8: 8-bit floats, of the flavour in `fp8_flavour`.
      fp8_flavour: "fnuz" (float8_e4m3fnuz, CDNA 3) or "ocp" (float8_e4m3fn); None without fp8 products.
      int8: with int32 accumulation.
      f32: in full float32: by the matrix units on CDNA, else by the vector units.
    """

    bf16: float = 0
    fp8: float = 0
    fp8_flavour: Fp8 | None = None
    int8: float = 0
    f32: float = 0

    @property
    def f16(self) -> float:
        return self.bf16

    def of(self, dtype: str) -> float:
        """The rate for operands of a dtype by its numpy name; 0 if it is not known.

        `float8_e4m3fnuz` and `float8_e4m3fn` have a rate only where the hardware has that flavour.
        """
        if dtype.startswith("float8"):
            return self.fp8 if ("fnuz" in dtype) == (self.fp8_flavour == "fnuz") else 0
        names = {"bfloat16": self.bf16, "float16": self.f16, "float32": self.f32, "int8": self.int8}
        return names.get(dtype, 0)


@dataclass(frozen=True)
class Links:
    """The links between the devices of one host.

    Attributes:
      count: links of one device to the others.
      bandwidth: bytes a second of one link in one direction.
      topology: "full mesh" (a link to each other device), "switch" (all links to any device), "pcie", or "none".
    """

    count: int = 0
    bandwidth: float = 0
    topology: Topology = "none"

    @property
    def host_devices(self) -> int:
        """Devices that reach one another so: of a full mesh as many as have links, else the eight of a common host."""
        return self.count + 1 if self.topology == "full mesh" else 8

    def ring_bandwidth(self, devices: int) -> float:
        """Bytes a second that one of `devices` can send in a collective that uses all of its links to the others."""
        used = min(self.count, devices - 1) if self.topology == "full mesh" else self.count
        return used * self.bandwidth


@dataclass(frozen=True)
class Source:
    """The source of figures: `fields` of a `Target`, separated by spaces, and a document's address."""

    fields: str
    document: str


@dataclass(frozen=True)
class Target:
    """One device model. A figure is 0 or None where it is not known.

    Attributes:
      name: how it is named on the command line, e.g. "mi300x".
      vendor: "amd", "nvidia" or "cpu".
      arch: the compiler's name of the architecture: "gfx942", "sm_90", "cpu".
      compute_units: CUs (AMD), SMs (NVIDIA), 0 for a CPU.
      wave_size: threads that run in step: 64 (CDNA), 32 (RDNA, NVIDIA), 0 for a CPU.
      lds_bytes: the most local (shared) memory of one work-group.
      label: the product's name, as drivers report it.
      register_bytes: vector registers of one compute unit.
      clock_hz: peak engine clock.
      l1, l2, l3: data caches; l1 is that of a compute unit (L0 in RDNA's terms), l3 AMD's Infinity Cache.
      memory: bytes of device memory.
      bandwidth: bytes a second to and from it.
      bus: width of the memory bus in bits, and transfers a second of each of its pins.
      rates: peak arithmetic.
      links: to other devices of the host.
      sources: where the figures come from.
    """

    name: str
    vendor: Vendor
    arch: str
    compute_units: int
    wave_size: int
    lds_bytes: int
    label: str = ""
    register_bytes: int = 0
    clock_hz: float = 0
    l1: Cache | None = None
    l2: Cache | None = None
    l3: Cache | None = None
    memory: int = 0
    bandwidth: float = 0
    bus: tuple[int, float] | None = None
    rates: Rates = Rates()
    links: Links = Links()
    sources: tuple[Source, ...] = ()

    def source(self, field: str) -> str | None:
        """Address of the document that a figure comes from."""
        return next((source.document for source in self.sources if field in source.fields.split()), None)
