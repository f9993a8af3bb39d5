#!/usr/bin/env python
"""Time and memory of loading a checkpoint onto several devices, beside the rates of the disk and of the link.

Makes a checkpoint of random weights in the shape of a published model (or takes one), then loads it over a mesh of all
devices, split along "tensor", each time in a process of its own:

    cold        with the checkpoint's files dropped from the page cache (posix_fadvise DONTNEED)
    warm        with the files in the page cache
    unverified  warm, without checking digests
    orbax       warm, through `orbax.checkpoint` with the same shardings, for comparison (--orbax)

The disk's rate is that of reading the same files from one end to the other, cold and warm; the link's that of copying
from the host to one device and to all at once. On a machine without a GPU, --devices simulated ones take part: their
memory is the host's, so what the host needs beyond the parameters is its peak less their size, and in place of the link
stands the rate at which the system hands out fresh memory, which on a virtual machine can be slower than its disk.

    python scripts/bench_load.py --layers 8 --json load.json
    python scripts/bench_load.py --checkpoint ./llama-8b
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_convert import drop, files

RUNS = ("cold", "warm", "unverified")
BLOCK = 16 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint, or a source to load without conversion")
    parser.add_argument("--shape", default="llama-3.1-8b", help="preset of the checkpoint to make")
    parser.add_argument("--layers", type=int, help="number of its layers, instead of the preset's")
    parser.add_argument(
        "--folder", type=Path, help="where to make it (and remove it again); a temporary folder if unset"
    )
    parser.add_argument("--devices", type=int, default=8, help="simulated devices where there is no GPU")
    parser.add_argument("--orbax", action="store_true", help="also load through Orbax itself")
    parser.add_argument("--json", type=Path, dest="out", help="write the numbers to this file")
    parser.add_argument("--child", choices=[*RUNS, "orbax"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(load_once(args.checkpoint, args.child)))
    elif args.checkpoint:
        report(args, args.checkpoint)
    else:
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-load-") as folder:
            report(args, make(Path(folder) / "model", args.shape, args.layers))


def make(path: Path, shape: str, layers: int | None) -> Path:
    """Writes a bfloat16 checkpoint of random weights."""
    import ml_dtypes
    import numpy as np

    from llama_jax.checkpoint import CheckpointWriter, Source
    from llama_jax.checkpoint.write import batches
    from llama_jax.config import preset
    from llama_jax.params import count_params, param_specs

    config = preset(shape).replace(dtype="bfloat16")
    if layers:
        config = config.replace(layers=config.layers[:layers])
    specs, rng = {spec.name: spec for spec in param_specs(config)}, np.random.default_rng(0)

    def random(size: int, dims: tuple[int, ...]) -> np.ndarray:
        bits = np.frombuffer(rng.bytes(2 * size), np.uint16) & np.uint16(0xBFFF)  # below 2 in size, so finite
        return bits.view(ml_dtypes.bfloat16).reshape(dims)

    with CheckpointWriter(path, total_bytes=2 * count_params(config)) as writer:
        for names in batches({name: 2 * spec.size for name, spec in specs.items()}):
            writer.write({name: random(specs[name].size, specs[name].shape) for name in names})
        return writer.commit(config, source=Source(name=shape))


def report(args: argparse.Namespace, path: Path) -> None:
    result: dict[str, Any] = {"checkpoint": path.name, "disk": {}, "loads": {}}
    result["disk"]["cold"] = read_rate(path, cold=True)
    result["disk"]["warm"] = statistics.median(read_rate(path, cold=False) for _ in range(3))
    for run in (*RUNS, *(["orbax"] if args.orbax else [])):
        if run == "cold":
            drop(path)
        else:
            read_rate(path, cold=False)
        result["loads"][run] = start(args, path, run)
    print_report(result)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def start(args: argparse.Namespace, path: Path, run: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--checkpoint", str(path), "--child", run]
    # The flag concerns the CPU backend alone.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices}".strip()
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def print_report(result: dict[str, Any]) -> None:
    disk = result["disk"]
    print(f"disk: {disk['cold'] / 1e9:.2f} GB/s cold, {disk['warm'] / 1e9:.2f} GB/s warm")
    for run, load in result["loads"].items():
        rate = load["bytes"] / load["seconds"]
        of_disk = rate / disk["cold" if run == "cold" else "warm"]
        print(
            f"{run:10} {load['bytes'] / 1e9:.2f} GB in {load['seconds']:.2f} s, {rate / 1e9:.2f} GB/s, "
            f"{of_disk:.0%} of the disk's rate; host beyond the parameters: {load['host_beyond'] / 1e6:.0f} MB, "
            f"peak {load['host_peak_share']:.2f} of them"
        )
    warm = result["loads"]["warm"]
    for device, held in warm["devices"].items():
        print(f"  {device}: {held / 1e9:.3f} GB")
    for name, rate in warm["link"].items():
        print(f"{name}: {rate / 1e9:.2f} GB/s")


def read_rate(path: Path, *, cold: bool) -> float:
    """Bytes a second of reading all files one after the other."""
    if cold:
        drop(path)
    buffer, done = memoryview(bytearray(BLOCK)), 0
    began = time.monotonic()
    for file in files(path):
        fd = os.open(file, os.O_RDONLY)
        while n := os.readv(fd, [buffer]):
            done += n
        os.close(fd)
    return done / (time.monotonic() - began)


def load_once(path: Path, run: str) -> dict[str, Any]:
    """Loads in this process; what has to be imported and started is not counted."""
    import jax
    import numpy as np

    from llama_jax.checkpoint import is_checkpoint, load_params, open_checkpoint
    from llama_jax.checkpoint.build import load_source
    from llama_jax.convert.opening import opened
    from llama_jax.layout import param_sharding
    from llama_jax.params import flatten

    mesh = jax.make_mesh((jax.device_count(),), ("tensor",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    jax.block_until_ready(jax.device_put(np.zeros(8, np.float32), everywhere))
    before = reset_peak()
    began = time.monotonic()
    if run == "orbax":
        params = load_with_orbax(path, mesh)
    elif is_checkpoint(path):
        sharding = param_sharding(open_checkpoint(path).config, mesh)
        params = load_params(path, sharding=sharding, verify=run != "unverified")
    else:
        with opened(path) as source:
            sharding = param_sharding(source.config, mesh)
            params = load_source(source, sharding=sharding, verify=run != "unverified")
    jax.block_until_ready(params)
    seconds = time.monotonic() - began
    leaves, devices = flatten(params), dict.fromkeys(map(str, jax.devices()), 0)
    for leaf in leaves.values():
        for shard in leaf.addressable_shards:
            devices[str(shard.device)] += shard.data.nbytes
    size = sum(leaf.nbytes for leaf in leaves.values())
    peak = memory("VmHWM") - before
    in_host = size if jax.default_backend() == "cpu" else 0
    return {
        "bytes": size,
        "seconds": seconds,
        "devices": devices,
        "host_peak": peak,
        "host_peak_share": peak / size,
        "host_beyond": peak - in_host,
        "device_peak": {str(d): (d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.devices()},
        "link": {"fresh memory": fresh_memory_rate()} if in_host else link_rates(),
    }


def load_with_orbax(path: Path, mesh: Any) -> Any:
    import jax
    from orbax.checkpoint import v1 as ocp

    from llama_jax.checkpoint import open_checkpoint
    from llama_jax.layout import param_sharding
    from llama_jax.params import param_specs, unflatten

    config = open_checkpoint(path).config
    sharding = param_sharding(config, mesh)
    leaves = {s.name: jax.ShapeDtypeStruct(s.shape, config.dtype, sharding=sharding(s)) for s in param_specs(config)}
    with ocp.Context():
        return ocp.load(path / "params", unflatten(leaves))


def fresh_memory_rate(size: int = 512 << 20) -> float:
    """Bytes a second of writing to memory that this process has not used before."""
    import numpy as np

    began = time.monotonic()
    np.empty(size, np.uint8).fill(1)
    return size / (time.monotonic() - began)


def link_rates(size: int = 256 << 20) -> dict[str, float]:
    """Bytes a second from the host's memory to one device, and to all devices at once."""
    import jax
    import numpy as np

    host = [np.full(size, i, np.uint8) for i in range(jax.device_count())]

    def rate(devices: list[Any]) -> float:
        times = []
        for _ in range(5):
            began = time.monotonic()
            jax.block_until_ready([jax.device_put(a, d) for a, d in zip(host, devices, strict=False)])
            times.append(time.monotonic() - began)
        return size * len(devices) / statistics.median(times)

    devices = jax.devices()
    return {"link to one device": rate(devices[:1]), "links to all devices": rate(devices)}


def memory(field: str) -> int:
    """VmRSS or VmHWM (its peak) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak() -> int:
    """Sets the peak to what is resident now (proc(5), clear_refs), and returns that."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


if __name__ == "__main__":
    main()
