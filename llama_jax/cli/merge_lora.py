"""`llama-jax merge-lora`: a model with an adapter merged into its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llama_jax.cli.options import DTYPES, examples, json_option, quiet_option, yes_option
from llama_jax.cli.progress import Reporter
from llama_jax.cli.terminal import print_json, size_text

if TYPE_CHECKING:
    from llama_jax.checkpoint.source import ModelSource


@click.command(
    name="merge-lora",
    epilog=examples(
        "llama-jax merge-lora meta-llama/Llama-3.2-1B-Instruct ./my-lora ./llama-1b-mine",
        "llama-jax merge-lora ./llama-1b-int4 ./my-lora ./llama-1b-mine --dequantize --dtype bfloat16",
    ),
)
@click.argument("base")
@click.argument("adapter")
@click.argument("dst")
@click.option("--dtype", type=click.Choice(DTYPES), help="What to store. [default: as BASE has it]")
@click.option("--dequantize", is_flag=True, help="Decode the weights of a BASE that is quantised.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint at DST, once the new one is complete.")
@yes_option
@quiet_option
@json_option
def command(
    base: str,
    adapter: str,
    dst: str,
    dtype: str | None,
    dequantize: bool,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write BASE with ADAPTER merged into its weights to a checkpoint at DST.

    BASE is anything that `show` takes, a checkpoint too. ADAPTER is a folder that peft wrote. Sums are computed in
    float32 and stored in the dtype of BASE, so a bfloat16 model loses the last bits of what the adapter adds; --dtype
    float32 keeps them. Weights are merged one by one. An interrupted run resumes when the same command runs again.
    """
    from llama_jax.adapters import load_adapter
    from llama_jax.adapters.merged_source import MergedSource
    from llama_jax.checkpoint import open_checkpoint
    from llama_jax.convert import convert
    from llama_jax.library import DEFAULT_MODEL, find

    with Reporter(quiet=quiet, label="Merging") as reporter:
        found = find(base, progress=reporter.progress, notify=reporter.notify)

        def merged(source: ModelSource) -> ModelSource:
            return MergedSource(source, load_adapter(adapter, source.config))

        path = convert(
            found.path,
            dst,
            dtype=dtype,
            dequantize=dequantize,
            overwrite=overwrite,
            warn_larger=base != DEFAULT_MODEL,
            name=found.name,
            revision=found.revision,
            progress=reporter.progress,
            notify=reporter.notify,
            wrap=merged,
        )
    checkpoint = open_checkpoint(path)
    if as_json:
        print_json({"path": str(path), "tensors": len(checkpoint.tensors), "bytes": checkpoint.nbytes})
        return
    click.echo(path)
    if not quiet:
        click.echo(f"{len(checkpoint.tensors)} tensors, {size_text(checkpoint.nbytes)}", err=True)
