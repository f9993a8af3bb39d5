"""AMD GPUs as the kernel's compute driver (amdkfd) reports them: no library is loaded.

Source: https://github.com/torvalds/linux/blob/master/drivers/gpu/drm/amd/amdkfd/kfd_topology.c
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path("/")
_NODES = "sys/class/kfd/kfd/topology/nodes"
# Types and flags of links: drivers/gpu/drm/amd/amdkfd/kfd_crat.h.
_LINK_KINDS: dict[int, Literal["xgmi", "pcie"]] = {2: "pcie", 11: "xgmi"}
_NO_PEER_ACCESS = 1 << 4


@dataclass(frozen=True)
class KfdGpu:
    """One GPU of the driver's topology.

    Attributes:
      arch: the compiler's name, e.g. "gfx942".
      compute_units: those that are enabled.
      memory: bytes of its own memory, 0 if unknown.
    """

    arch: str
    compute_units: int
    memory: int


@dataclass(frozen=True)
class KfdLink:
    """A way from one GPU to another's memory.

    Attributes:
      source, target: numbers of the GPUs, from 0 in the order of `gpus`.
      kind: "xgmi" (Infinity Fabric) or "pcie".
    """

    source: int
    target: int
    kind: Literal["xgmi", "pcie"]


def gpus(root: Path = ROOT) -> tuple[KfdGpu, ...]:
    """Every AMD GPU that the driver has taken, in its order; none where there is no such driver."""
    found = []
    for node, facts in _gpu_nodes(root):
        banks = node.glob("mem_banks/*/properties")
        memory = max((_properties(bank).get("size_in_bytes", 0) for bank in banks), default=0)
        simds, per_unit = facts.get("simd_count", 0), facts.get("simd_per_cu", 0)
        units = simds // per_unit if per_unit else 0
        found.append(KfdGpu(gfx_name(facts["gfx_target_version"]), units, memory))
    return tuple(found)


def links(root: Path = ROOT) -> tuple[KfdLink, ...]:
    """Links between the GPUs that the driver offers: XGMI stands among a node's io_links, peer access over PCIe among
    its p2p_links (and, by some versions, among the former). A link to a processor is none of them."""
    nodes = _gpu_nodes(root)
    number = {int(node.name): i for i, (node, _) in enumerate(nodes) if node.name.isdigit()}
    found = []
    for node, _ in nodes:
        for file in sorted([*node.glob("io_links/*/properties"), *node.glob("p2p_links/*/properties")]):
            facts = _properties(file)
            source, target = (number.get(facts.get(name, -1)) for name in ("node_from", "node_to"))
            kind = _LINK_KINDS.get(facts.get("type", 0))
            if source is not None and target is not None and kind and not facts.get("flags", 0) & _NO_PEER_ACCESS:
                found.append(KfdLink(source, target, kind))
    return tuple(found)


def _gpu_nodes(root: Path) -> list[tuple[Path, dict[str, int]]]:
    """Folders and properties of the nodes that are GPUs, not processors, in the driver's order."""
    nodes = sorted((root / _NODES).glob("*"), key=lambda path: (len(path.name), path.name))
    read = [(node, _properties(node / "properties")) for node in nodes]
    return [(node, facts) for node, facts in read if facts.get("gfx_target_version", 0)]  # 0 is a processor


def gfx_name(version: int) -> str:
    """The compiler's target of KFD's number: 90402 is gfx942, 90010 is gfx90a, 110501 is gfx1151."""
    major, minor, step = version // 10000, version // 100 % 100, version % 100
    return f"gfx{major}{minor:x}{step:x}"


def _properties(path: Path) -> dict[str, int]:
    """A topology file: a name and a number on each line; empty if it cannot be read."""
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
