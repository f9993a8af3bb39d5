"""The command line `llama-jax` (also `ljx`, and `python -m llama_jax.cli`).

One module per command, imported when the command runs: `--help` alone imports neither jax nor numpy. Results go to
standard output, everything else to standard error.
"""

from __future__ import annotations

# Define nothing else here: importing a command's module puts its name, such as `list`, into this namespace.
from llama_jax.cli.command_line import COMMANDS, cli, main

__all__ = ["COMMANDS", "cli", "main"]
