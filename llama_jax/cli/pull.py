"""`llama-jax pull`: a model from the Hugging Face hub to this machine."""

from __future__ import annotations

import time

import click

from llama_jax.cli.options import examples, json_option, quiet_option
from llama_jax.cli.progress import Reporter
from llama_jax.cli.terminal import print_json, printable, size_text
from llama_jax.library import DEFAULT_MODEL


@click.command(
    name="pull",
    epilog=examples(
        "llama-jax pull org/name",
        "llama-jax pull org/name@main --json",
        "llama-jax pull org/name --revision v1.0 --no-convert",
        "llama-jax pull",
    ),
)
@click.argument("name", default=DEFAULT_MODEL)
@click.option("--revision", metavar="R", help="Branch, tag or commit. [default: main]")
@click.option("--no-convert", is_flag=True, help="Only download and check; the first use converts.")
@quiet_option
@json_option
def command(name: str, revision: str | None, no_convert: bool, quiet: bool, as_json: bool) -> None:
    """Download NAME (org/name on the Hugging Face hub, or the default model), check it, and convert it into the cache.

    Only one copy of the weights is downloaded (safetensors where there are some), with tokenizer, chat template,
    licence and model card. An interrupted pull resumes. Gated models need a token: `hf auth login`, or HF_TOKEN.
    """
    from llama_jax.library import pull

    began = time.monotonic()
    with Reporter(quiet=quiet, label="Downloading") as reporter:
        pulled = pull(
            name,
            revision=revision,
            convert=not no_convert,
            progress=None if quiet else reporter.progress,
            notify=reporter.notify,
        )
    if as_json:
        print_json(
            {
                "name": pulled.name,
                "revision": pulled.revision,
                "licence": pulled.licence,
                "source": str(pulled.source),
                "checkpoint": None if pulled.checkpoint is None else str(pulled.checkpoint),
                "bytes": pulled.nbytes,
                "fresh": pulled.fresh,
                "seconds": round(time.monotonic() - began, 3),
            }
        )
        return
    click.echo(printable(str(pulled.checkpoint or pulled.source)))
    if not quiet:
        facts = f"{pulled.name}: {size_text(pulled.nbytes)}, licence {pulled.licence or 'not stated'}"
        click.echo(printable(f"{facts}, revision {pulled.revision}"), err=True)
