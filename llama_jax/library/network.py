"""Permission to use the network: never under LLAMA_JAX_OFFLINE; for the default model once somebody has said yes."""

from __future__ import annotations

import os
import sys

from llama_jax.errors import ModelNotFound, NetworkError

OFFLINE = "LLAMA_JAX_OFFLINE"
"""If set to 1, nothing is downloaded, from the hub or from a package index."""
YES = "LLAMA_JAX_YES"
"""If set to 1, as by the command line's `--yes`, the default model is downloaded without asking."""


def is_offline() -> bool:
    """Whether LLAMA_JAX_OFFLINE is set."""
    return _is_set(OFFLINE)


def check_online(what: str, *, otherwise: str) -> None:
    """Raises NetworkError if LLAMA_JAX_OFFLINE is set.

    Args:
      what: what would be fetched.
      otherwise: how to come by it without the network, for the hint.
    """
    if is_offline():
        raise NetworkError(
            f"{what} would have to be fetched, and {OFFLINE} is set", hint=f"unset {OFFLINE}, or {otherwise}"
        )


def confirm(what: str, question: str, *, otherwise: str) -> None:
    """Asks in the terminal before downloading something that the user did not name.

    Args:
      what: what would be fetched.
      question: size, licence and source.
      otherwise: how to come by it in another way, for the hint.

    Raises:
      ModelNotFound: the answer is no, or there is no terminal to ask in and neither `--yes` nor LLAMA_JAX_YES says it.
    """
    if _is_set(YES):
        return
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr and sys.stderr.isatty()):
        raise ModelNotFound(
            f"{what} is not on this machine, and there is no terminal to ask whether to fetch it ({question})",
            hint=f"say so with --yes or {YES}=1, or {otherwise}",
        )
    print(f"{what} is not on this machine. Fetch it ({question})? [Y/n] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer:  # the end of the input is no answer
        print(file=sys.stderr)
    if answer.strip().lower() not in ("y", "yes") and answer != "\n":
        raise ModelNotFound(f"{what} is not on this machine, and was not to be fetched", hint=otherwise)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")
