"""Options of commands that can ask a server instead of loading a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import click
from click.core import ParameterSource

from llama_jax.cli.options import LoadOptions, gathered
from llama_jax.cli.serve import KEY
from llama_jax.remote import Remote


@dataclass(frozen=True)
class ServerOptions:
    """The server to ask, if any; `name`: of the model there, None for its first one."""

    url: str | None
    api_key: str | None
    name: str | None

    def remote(self, of_here: Iterable[str], of_there: Iterable[str] = ()) -> Remote | None:
        """The server; None without `--url`.

        Args:
          of_here: options of the command, besides those of `LoadOptions`, that apply only to a model in this process;
            of_there: those that apply only to a server, besides these.

        Raises:
          UsageError: an option was given that has no effect.
          RequestError: the URL is invalid.
        """
        if self.url is None:
            _refuse({"api_key", "name", *of_there}, "is of a server: give --url")
            return None
        loading = (field.name for field in fields(LoadOptions))
        _refuse({*of_here, *loading}, "is of a model in this process; leave it out with --url")
        return Remote(self.url, self.api_key)


def _refuse(names: set[str], why: str) -> None:
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name in names:
            raise click.UsageError(f"{parameter.opts[-1]} {why}")


server_options = gathered(
    ServerOptions,
    "server",
    click.option("--url", metavar="URL", help="Ask a server with OpenAI's API, and load no model."),
    click.option(
        "--api-key", envvar=KEY, metavar="KEY", help=f"The server's key. [also: {KEY}, which other users cannot see]"
    ),
    click.option(
        "--served-model-name", "name", metavar="NAME", help="The server's name of the model. [default: its first one]"
    ),
)
"""`--url`, `--api-key` and `--served-model-name`: a command's argument `server`, of `ServerOptions`."""
