"""`--adapter`: adapters for a model, as commands take them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

adapter_option = click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[NAME=]FOLDER",
    help="An adapter (LoRA and its kin) in a folder that peft wrote, to run the model with. NAME=FOLDER, which may "
    "be repeated, is for requests that name it.",
)


def split_name(text: str) -> tuple[str, str]:
    """Name and value of NAME=VALUE; the name is empty if there is none, as for a path that contains "="."""
    name, sign, value = text.partition("=")
    if not sign or Path(text).exists():
        return "", text
    if not name or not value:
        raise click.UsageError(f"{text!r} is not NAME=VALUE")
    return name, value


def given_adapter(adapters: Sequence[str], *, named: bool = False) -> str | dict[str, str] | None:
    """The values of `--adapter` as `load` takes them: one folder, or several by name.

    Args:
      named: whether requests can choose one by name.

    Raises:
      UsageError: they cannot, or there are several without names.
    """
    pairs = [split_name(text) for text in adapters]
    names = [name for name, _ in pairs]
    if not pairs or names == [""]:
        return pairs[0][1] if pairs else None
    if not named:
        raise click.UsageError("--adapter takes one FOLDER here; several NAME=FOLDER are for serve and batch")
    if "" in names or len(set(names)) < len(names):
        raise click.UsageError("of several adapters each needs a name of its own: --adapter NAME=FOLDER")
    return dict(pairs)


def recorded(adapters: Sequence[str]) -> list[str]:
    """The values of `--adapter` with the whole paths of their folders, for a receipt."""
    pairs = [split_name(text) for text in adapters]
    return [f"{name}={Path(folder).resolve()}" if name else str(Path(folder).resolve()) for name, folder in pairs]
