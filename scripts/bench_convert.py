#!/usr/bin/env python
"""Speed and memory of a conversion beside copying the same files: is the disk the limit, and is memory bounded?

Makes a synthetic Hugging Face checkpoint (random bfloat16 weights in safetensors shards of 5 GB) of a published shape,
then times in turn

    copy      every file as `cp` does it, then `sync`
    convert   `llama_jax.convert` in a process of its own, whose peak resident memory is taken

and removes all that it made. Before each the files' pages are dropped from the system's memory (posix_fadvise), so that
both read from the disk. Times include the start of the process; memory is what the kernel counts for the process
itself (VmHWM), without the file cache.

    python scripts/bench_convert.py --shape llama-3.1-8b --json bench.json
    python scripts/bench_convert.py --shape llama-3.1-8b --layers 2 --folder /data/tmp
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config import LlamaConfig, config_to_hf, preset
from llama_jax.convert.safetensors_writer import SafetensorsWriter, TensorPlan
from llama_jax.disk import sync
from llama_jax.params import param_specs

SHARD_BYTES = 5_000_000_000
BLOCK_BYTES = 16 << 20
CONVERT = """
import sys
from llama_jax.convert import convert
convert(sys.argv[1], sys.argv[2])
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak) * 1024)
"""


def make(folder: Path, config: LlamaConfig) -> int:
    """Writes the checkpoint; returns the bytes of its weights.

    Shards are filled in order of the tensors' names, as `save_pretrained` does. The weights are a block of random
    numbers again and again: nothing here compresses or deduplicates, so what they are does not matter.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    # The high byte holds the sign and seven bits of the exponent: one of them is
    # cleared, so that no number is infinite or NaN.
    block = np.random.default_rng(0).integers(0, 256, BLOCK_BYTES, dtype=np.uint8)
    block[1::2] &= 0xBF
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD_BYTES
    for spec in sorted(param_specs(config), key=lambda spec: spec.hf):
        if shards[-1] and 2 * spec.size > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][spec.hf] = spec.shape
        room -= 2 * spec.size
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        index |= dict.fromkeys(shard, file)
        plan = {name: TensorPlan("bfloat16", shape) for name, shape in shard.items()}
        writer = SafetensorsWriter(folder / file, plan, {"format": "pt"})
        for name, tensor in plan.items():
            for start in range(0, tensor.nbytes, BLOCK_BYTES):
                writer.write(name, block[: tensor.nbytes - start], skip=start)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    os.sync()
    return sum(2 * spec.size for spec in param_specs(config))


def files(path: Path) -> list[Path]:
    """A file, or all files below a folder."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def drop(path: Path) -> None:
    """Drops the pages of a file, or of all files below a folder, from the system's memory."""
    for file in files(path):
        sync(file, keep=False)  # pages that are not on the disk yet cannot be dropped


def timed_copy(src: Path, dst: Path) -> float:
    began = time.monotonic()
    subprocess.run(["cp", "-r", str(src), str(dst)], check=True)
    os.sync()
    return time.monotonic() - began


def timed_convert(src: Path, dst: Path) -> tuple[float, int]:
    """Seconds, and the peak resident memory in bytes."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, str(src), str(dst)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    os.sync()
    return time.monotonic() - began, int(done.stdout)


def measure(config: LlamaConfig, folder: Path, rounds: int) -> dict[str, Any]:
    nbytes = make(folder / "source", config)
    copies, converts, peaks = [], [], []
    for _ in range(rounds):
        drop(folder)
        copies.append(timed_copy(folder / "source", folder / "copy"))
        shutil.rmtree(folder / "copy")
        drop(folder)
        seconds, peak = timed_convert(folder / "source", folder / "converted")
        converts.append(seconds)
        peaks.append(peak)
        shutil.rmtree(folder / "converted")
    copy, convert = statistics.median(copies), statistics.median(converts)
    return {
        "bytes": nbytes,
        "file_cache": "dropped before each (posix_fadvise)",
        "copy_seconds": [round(t, 2) for t in copies],
        "convert_seconds": [round(t, 2) for t in converts],
        "copy_bytes_per_second": round(nbytes / copy),
        "convert_bytes_per_second": round(nbytes / convert),
        "ratio": round(copy / convert, 3),
        "peak_rss_bytes": max(peaks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", help="a published model's name [llama-3.1-8b]")
    parser.add_argument("--layers", type=int, help="only so many of its layers")
    parser.add_argument("--folder", type=Path, help="where to make it; needs twice the model's size [a temporary one]")
    parser.add_argument("--rounds", type=int, default=1, help="copies and conversions in turn; medians count [1]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    args = parser.parse_args()
    config = preset(args.shape)
    if args.layers:
        config = config.replace(layers=config.layers[: args.layers])
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-convert-") as folder:
        result = {"shape": args.shape, "layers": config.num_layers} | measure(config, Path(folder), args.rounds)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"{result['shape']}, {result['layers']} layers, {result['bytes'] / 1e9:.1f} GB: "
        f"cp + sync {result['copy_bytes_per_second'] / 1e6:.0f} MB/s, "
        f"convert {result['convert_bytes_per_second'] / 1e6:.0f} MB/s ({result['ratio']:.0%}), "
        f"peak memory {result['peak_rss_bytes'] / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
