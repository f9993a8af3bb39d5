"""`llama-jax list`: the models that are on this machine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from llama_jax.cli.options import examples, json_option
from llama_jax.cli.terminal import print_json, printable, size_text, table

if TYPE_CHECKING:
    from llama_jax.library import Download, ModelInfo

_HEAD = ("NAME", "SIZE", "DTYPE", "LICENCE", "REVISION", "DATE", "SOURCE")
_REVISION = 12
"""Digits of a commit or digest that the table shows."""


@click.command(name="list", epilog=examples("llama-jax list", "llama-jax list --json"))
@json_option
def command(as_json: bool) -> None:
    """List the default model, everything in the cache of converted models (LLAMA_JAX_CACHE moves it), and what was
    only downloaded from the Hugging Face hub (HF_HOME moves it).

    SIZE is what a model takes up on the disk, DATE when it was converted (or downloaded).
    """
    from llama_jax.library import cache_dir, hub_cache, list_downloads, list_models

    models, downloads = list_models(), list_downloads()
    if as_json:
        print_json(
            {
                "cache": str(cache_dir()),
                "models": [_model(m) for m in models],
                "hub_cache": str(hub_cache.root()),
                "downloads": [_download(d) for d in downloads],
                "disk_bytes": sum(m.disk_bytes for m in models),
                "download_bytes": sum(d.nbytes for d in downloads),
            }
        )
        return
    rows = [_HEAD, *map(_model_row, models), *map(_download_row, downloads)]
    for line in table(rows):
        click.echo(printable(line))
    converted = [m for m in models if m.path]
    size = size_text(sum(m.disk_bytes for m in converted))
    click.echo(printable(f"\n{len(converted)} converted, {size} in {cache_dir()}"))
    if downloads:
        size = size_text(sum(d.nbytes for d in downloads))
        click.echo(printable(f"{len(downloads)} only downloaded, {size} in {hub_cache.root()}"))


def _model(m: ModelInfo) -> dict[str, object]:
    return {
        "name": m.name,
        "path": None if m.path is None else str(m.path),
        "source": m.source,
        "dtype": m.dtype,
        "bytes": m.nbytes,
        "disk_bytes": m.disk_bytes,
        "licence": m.licence,
        "revision": m.revision,
        "converted": None if m.converted is None else _iso(m.converted),
        "error": m.error or None,
    }


def _download(d: Download) -> dict[str, object]:
    return {
        "name": d.name,
        "path": str(d.path),
        "revision": d.commit,
        "complete": d.complete,
        "bytes": d.nbytes,
        "licence": d.licence,
        "downloaded": _iso(d.modified),
    }


def _model_row(m: ModelInfo) -> tuple[str, ...]:
    source = f"unusable: {m.error}" if m.error else m.source if m.path else f"{m.source} (not converted yet)"
    return (
        m.name,
        size_text(m.disk_bytes) if m.path else "-",
        m.dtype or "-",
        m.licence or "-",
        _short(m.revision),
        "-" if m.converted is None else _iso(m.converted)[:10],
        source,
    )


def _download_row(d: Download) -> tuple[str, ...]:
    source = "downloaded, not converted yet" if d.complete else f"download not complete; `llama-jax pull {d.name}`"
    size = size_text(d.nbytes)
    return d.name, size, "-", d.licence or "-", _short(d.commit), _iso(d.modified)[:10], f"huggingface ({source})"


def _short(revision: str | None) -> str:
    return (revision or "-").rpartition(":")[2][:_REVISION]


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
