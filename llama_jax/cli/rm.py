"""`llama-jax rm`: removes models from the cache."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from llama_jax.cli.options import examples, json_option
from llama_jax.cli.terminal import print_json, printable, size_text
from llama_jax.errors import RequestError

if TYPE_CHECKING:
    from llama_jax.library.removal import Removable


@click.command(
    name="rm",
    epilog=examples(
        "llama-jax rm my-model",
        "llama-jax rm org/name --downloads --yes",
        "llama-jax rm --tmp --yes --json",
    ),
)
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--downloads", is_flag=True, help="Also remove what was downloaded from the Hugging Face hub.")
@click.option("--tmp", is_flag=True, help="Remove leftovers of interrupted conversions and downloads from the cache.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
def command(names: tuple[str, ...], downloads: bool, tmp: bool, yes: bool, as_json: bool) -> None:
    """Remove converted models, by their names in `llama-jax list` or by org/name, from the cache.

    Nothing outside the cache is ever removed, nor anything that another process is writing. --downloads also removes
    these models from the hub's cache, which other programs may use.
    """
    from llama_jax.library.removal import find_leftovers, find_models, remove

    if not names and not tmp:
        raise RequestError("no model is named", param="names", hint="give names from `llama-jax list`, or --tmp")
    # By path, so that a model named twice is removed once.
    found = {thing.path: thing for name in names for thing in find_models(name, downloads=downloads)}
    found |= {thing.path: thing for thing in (find_leftovers() if tmp else ())}
    things = list(found.values())
    if things and not yes:
        _ask(things, as_json=as_json)
    freed = remove(things)
    if as_json:
        removed = [{"kind": t.kind, "name": t.name, "path": str(t.path), "bytes": t.nbytes} for t in things]
        print_json({"removed": removed, "freed_bytes": freed})
    else:
        click.echo(f"Removed {len(things)}, {size_text(freed)} freed")


def _ask(things: Sequence[Removable], *, as_json: bool) -> None:
    """Asks the user to confirm; raises click.Abort otherwise."""
    if as_json or not sys.stdin.isatty():
        raise RequestError(
            f"{len(things)} things would be removed, and nobody can be asked", param="yes", hint="pass --yes"
        )
    for thing in things:
        click.echo(printable(f"{thing.kind:<10}{size_text(thing.nbytes):<10}{thing.path}"), err=True)
    click.confirm(f"Remove these ({size_text(sum(t.nbytes for t in things))})?", abort=True, err=True)
