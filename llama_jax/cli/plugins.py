"""`llama-jax plugins`: what other packages add."""

from __future__ import annotations

import warnings

import click

from llama_jax.cli.options import examples, json_option
from llama_jax.cli.terminal import print_json, printable, table

_HEAD = ("GROUP", "NAME", "STATE", "ORIGIN", "PROBLEM")


@click.command(name="plugins", epilog=examples("llama-jax plugins", "llama-jax plugins --json"))
@json_option
def command(as_json: bool) -> None:
    """List what installed packages add through entry points: targets, kernels, model families, logits
    processors, tool parsers and server routes.

    A plugin whose STATE is broken is left out everywhere else; PROBLEM says why.
    """
    from llama_jax.plugins import GROUPS, load

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the list says the same
        found = [plugin for group in GROUPS for plugin in load(group)]
    if as_json:
        keys = ("group", "name", "state", "origin", "problem")
        rows = [{key: getattr(plugin, key) for key in keys} for plugin in found]
        print_json({"groups": [group.name for group in GROUPS], "plugins": rows})
        return
    if not found:
        click.echo(f"No plugins: no installed package has entry points of {', '.join(g.name for g in GROUPS)}")
        return
    for line in table([_HEAD, *((p.group, p.name, p.state, p.origin, p.problem or "-") for p in found)]):
        click.echo(printable(line))
