#!/usr/bin/env python
"""`llama-jax batch`, by the name that it had first."""

from __future__ import annotations

import sys

from llama_jax.cli.batch import command
from llama_jax.cli.command_line import run_command


def main() -> None:
    """Runs the command; errors become a message and the exit codes of `llama-jax --help`."""
    run_command(command.main, sys.argv[1:])


if __name__ == "__main__":
    main()
