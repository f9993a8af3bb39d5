"""`llama-jax export`: a checkpoint to other programs' formats."""

from __future__ import annotations

import dataclasses
import re
import time

import click

from llama_jax.cli.options import DTYPES, examples, json_option, quiet_option, yes_option
from llama_jax.cli.progress import Reporter
from llama_jax.cli.terminal import print_json, size_text
from llama_jax.errors import RequestError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


@click.command(
    name="export",
    epilog=examples(
        "llama-jax export ./llama-1b ./llama-1b-hf --to hf",
        "llama-jax export ./llama-1b ./llama-1b-hf --to hf --dtype bfloat16 --shard-size 2GB",
        "llama-jax export ./llama-1b-int4 ./llama-1b-w4a16 --to compressed-tensors",
        "llama-jax export ./llama-1b ./llama-1b.gguf --to gguf",
        "llama-jax export ./llama-1b ./llama-1b.q8_0.gguf --to gguf --type q8_0",
    ),
)
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.argument("dst")
@click.option(
    "--to",
    "target",
    type=click.Choice(("hf", "compressed-tensors", "gguf")),
    required=True,
    help="The format to write.",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="hf: store all tensors in it. [default: the checkpoint's own]")
@click.option("--shard-size", metavar="SIZE", help="hf: begin another file beyond this size. [default: 5GB]")
@click.option(
    "--type",
    "kind",
    metavar="TYPE",
    help="gguf: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0. [default: that of most of its weights]",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier export at DST, once the new one is complete.")
@yes_option
@quiet_option
@json_option
def command(
    checkpoint: str,
    dst: str,
    target: str,
    dtype: str | None,
    shard_size: str | None,
    kind: str | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write CHECKPOINT (or any other MODEL, which is converted first) to DST in another format.

    `--to hf` makes a folder that transformers loads: safetensors with the same names and, without --dtype, the same
    bytes per tensor as the model that was converted; config.json, tokenizer and licence beside them. `--to
    compressed-tensors` makes one with the quantised weights, code for code (`pack-quantized`); the other formats decode
    them. `--to gguf` makes a file for llama.cpp, DST.gguf, with the tokenizer in it.

    Every tensor's digest is checked while it is read. DST appears only once it is complete.
    """
    for option, value, needs in (
        ("--dtype", dtype, "hf"),
        ("--shard-size", shard_size, "hf"),
        ("--type", kind, "gguf"),
    ):
        if value is not None and target != needs:
            raise click.UsageError(f"{option} goes with --to {needs}")
    shard_bytes = None if shard_size is None else _size(shard_size)

    from llama_jax.convert.export import SHARD_BYTES, export_compressed, export_gguf, export_hf
    from llama_jax.library import resolve

    with Reporter(quiet=quiet, label="Exporting") as reporter:
        path = resolve(checkpoint, progress=reporter.progress, notify=reporter.notify)
        began = time.monotonic()
        if target == "hf":
            made = export_hf(
                path,
                dst,
                dtype=dtype,
                shard_bytes=shard_bytes or SHARD_BYTES,
                overwrite=overwrite,
                progress=reporter.progress,
            )
        elif target == "compressed-tensors":
            made = export_compressed(path, dst, overwrite=overwrite, progress=reporter.progress)
        else:
            made = export_gguf(path, dst, kind=kind, overwrite=overwrite, progress=reporter.progress)
        seconds = time.monotonic() - began
    if as_json:
        fields = dataclasses.asdict(made) | {"path": str(made.path), "format": target, "seconds": round(seconds, 3)}
        print_json(fields)
        return
    click.echo(made.path)
    if not quiet:
        for note in made.notes:
            click.echo(f"note: {note}", err=True)
        click.echo(f"{made.tensors} tensors, {size_text(made.bytes)}, {made.dtype}, {seconds:.1f} s", err=True)


def _size(text: str) -> int:
    """Bytes of a size such as "5GB", "500MB" or "1000000", in powers of ten as everywhere else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise RequestError(f"{text!r} is not a size", param="shard_size", hint="for example 5GB or 500MB")
    return size
