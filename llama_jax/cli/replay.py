"""`llama-jax replay`: run what a receipt records again, and compare the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama_jax.cli.options import LoadOptions, claim_memory, examples, json_option, quiet_option, requested_mesh
from llama_jax.cli.progress import Reporter
from llama_jax.cli.terminal import print_json
from llama_jax.errors import CheckpointError, VerificationError

if TYPE_CHECKING:
    from llama_jax.receipts import Receipt, Replay

LISTED = 5
"""Differing continuations that are listed."""


@click.command(
    name="replay",
    epilog=examples(
        "llama-jax generate 'Once upon a time' --temperature 0.8 --seed 7 --receipt story.json",
        "llama-jax replay story.json",
        "llama-jax replay answers.receipt.json --input prompts.jsonl --json",
    ),
)
@click.argument("receipt", type=click.Path(path_type=Path))
@click.option("-m", "--model", help="The same model under another name or in another folder. [default: the receipt's]")
@click.option(
    "--input", "source", type=click.Path(path_type=Path), metavar="IN", help="The batch file, if it was moved."
)
@quiet_option
@json_option
def command(receipt: Path, model: str | None, source: Path | None, quiet: bool, as_json: bool) -> None:
    """Repeat the run that RECEIPT records (`generate --receipt`, `batch --receipt`), and compare the tokens.

    The model is loaded as it was, and its parameters must have the same digest. If tokens differ, the exit code is 4,
    and what has changed since is listed: versions, device, flags, kernels. In bfloat16 another device or version may
    well sample different tokens; in float32 on the same device they are the same.
    """
    from llama_jax.receipts import read_receipt, replay
    from llama_jax.receipts.batch import replay_batch

    saved = read_receipt(receipt)
    if saved.batch:
        claim_memory()
    name, options = _options(saved, receipt)
    devices = requested_mesh(options.mesh, options.tp)
    with Reporter(quiet=quiet) as reporter:
        loaded, tokenizer = options.load(model or name, devices, reporter, named=saved.batch)
    found = replay_batch(saved, loaded, tokenizer, source) if saved.batch else replay(saved, loaded, tokenizer)
    if as_json:
        print_json(_object(found))
    else:
        _print(found, "lines" if saved.batch else "continuations")
    if not found.same:
        raise VerificationError(
            f"{len(found.tokens)} of {found.compared} differ from the receipt",
            hint="what has changed since is listed above" if found.changed else "nothing else that is recorded differs",
        )


def _options(saved: Receipt, path: Path) -> tuple[str, LoadOptions]:
    """The name of the receipt's model, and the options that it was loaded with."""
    defaults: dict[str, Any] = {"weights": None, "convert": True, "tp": None}
    try:
        return str(saved.model["name"]), LoadOptions(**defaults | {**saved.load})
    except (KeyError, TypeError) as e:
        raise CheckpointError(f"{path}: model or load is damaged: {e}", hint="make the receipt again") from e


def _object(found: Replay) -> dict[str, Any]:
    return {
        "same": found.same,
        "compared": found.compared,
        "differing": [
            {"request": d.request, "copy": d.copy, "at": d.at, "was": list(d.was), "now": list(d.now)}
            for d in found.tokens
        ],
        "changed": {name: {"was": was, "now": now} for name, (was, now) in found.changed.items()},
    }


def _print(found: Replay, what: str) -> None:
    click.echo(f"{found.compared - len(found.tokens)} of {found.compared} {what} have the same tokens")
    for d in found.tokens[:LISTED]:
        click.echo(f"  {d.request}.{d.copy} differs from token {d.at} on: was {list(d.was)}, now {list(d.now)}")
    if len(found.tokens) > LISTED:
        click.echo(f"  and {len(found.tokens) - LISTED} more")
    for name, (was, now) in found.changed.items():
        click.echo(f"changed: {name} was {was or 'missing'}, now {now or 'missing'}")
