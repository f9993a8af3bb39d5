"""`llama-jax convert`: another program's model to a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path

import click

from llama_jax.cli.options import DTYPES, examples, json_option, quiet_option, yes_option
from llama_jax.cli.progress import Reporter
from llama_jax.cli.terminal import print_json, size_text


@click.command(
    name="convert",
    epilog=examples(
        "llama-jax convert ./Llama-3.2-1B-Instruct ./llama-1b",
        "llama-jax convert model.Q4_1.gguf ./model --dtype bfloat16",
        "llama-jax convert meta-llama/Llama-3.2-1B-Instruct ./llama-1b --overwrite",
    ),
)
@click.argument("src")
@click.argument("dst")
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Store what is not quantised in it. [default: the source's own]"
)
@click.option(
    "--dequantize", is_flag=True, help="Decode weights that are quantised in SRC, instead of keeping them quantised."
)
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint at DST, once the new one is complete.")
@click.option(
    "--any-values",
    "--allow-nonfinite",
    "allow_nonfinite",
    is_flag=True,
    help="Accept any values in weights: NaN, infinity, subnormal numbers, mostly zero matrices.",
)
@yes_option
@quiet_option
@json_option
def command(
    src: str,
    dst: str,
    dtype: str | None,
    dequantize: bool,
    overwrite: bool,
    allow_nonfinite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Convert SRC to a checkpoint at DST.

    SRC is a Hugging Face folder (safetensors or .bin, one file or several), a folder of Meta (params.json and
    consolidated.*.pth), a GGUF file or a folder with one, org/name on the Hugging Face hub, or the default model.
    Tensors are converted one by one, so memory is needed for the largest one, not for the model. An interrupted
    conversion resumes when the same command runs again.
    """
    from llama_jax.checkpoint import open_checkpoint
    from llama_jax.convert import convert
    from llama_jax.library import DEFAULT_MODEL, check_source

    began = time.monotonic()
    with Reporter(quiet=quiet, label="Converting") as reporter:
        source, name, revision = _source(src, reporter)
        check_source(source, reporter.notify)
        path = convert(
            source,
            dst,
            dtype=dtype,
            dequantize=dequantize,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            warn_larger=name != DEFAULT_MODEL,
            name=name,
            revision=revision,
            progress=reporter.progress,
            notify=reporter.notify,
        )
    seconds = time.monotonic() - began
    checkpoint = open_checkpoint(path)
    if as_json:
        print_json(
            {
                "path": str(path),
                "source": checkpoint.source.name,
                "dtype": checkpoint.dtype,
                "tensors": len(checkpoint.tensors),
                "bytes": checkpoint.nbytes,
                "seconds": round(seconds, 3),
            }
        )
        return
    click.echo(path)
    if not quiet:
        size = size_text(checkpoint.nbytes)
        click.echo(f"{len(checkpoint.tensors)} tensors, {size}, {checkpoint.dtype}, {seconds:.1f} s", err=True)


def _source(src: str, reporter: Reporter) -> tuple[Path, str | None, str | None]:
    """The folder or file that SRC means, and name and revision for the checkpoint's metadata where SRC knows better."""
    from llama_jax.library import DEFAULT_MODEL, fetch_source

    path = Path(src)
    if path.exists():
        return path, None, None
    path, revision = fetch_source(src, progress=reporter.progress, notify=reporter.notify)
    return path, src if src == DEFAULT_MODEL else src.partition("@")[0], revision
