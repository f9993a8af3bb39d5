"""`llama-jax list`: the models that are ready to use."""

from __future__ import annotations

import click

from llama_jax.cli.options import examples, json_option
from llama_jax.cli.terminal import print_json, printable, size_text


@click.command(name="list", epilog=examples("llama-jax list", "llama-jax list --json"))
@json_option
def command(as_json: bool) -> None:
    """List the default model and everything in the cache of converted models (LLAMA_JAX_CACHE moves it)."""
    from llama_jax.models import cache_dir, list_models

    models = list_models()
    if as_json:
        print_json(
            {
                "cache": str(cache_dir()),
                "models": [
                    {
                        "name": m.name,
                        "path": None if m.path is None else str(m.path),
                        "source": m.source,
                        "dtype": m.dtype,
                        "bytes": m.nbytes,
                        "licence": m.licence,
                        "error": m.error or None,
                    }
                    for m in models
                ],
            }
        )
        return
    rows = [("NAME", "SIZE", "DTYPE", "LICENCE", "SOURCE")]
    for m in models:
        size = size_text(m.nbytes) if m.nbytes else "-"
        source = f"unusable: {m.error}" if m.error else m.source if m.path else f"{m.source} (not converted yet)"
        rows.append((m.name, size, m.dtype or "-", m.licence or "-", source))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)]
        click.echo(printable("  ".join([*cells, row[4]])))
