"""Error reports of the command line: two lines for people, one JSON object for programs, and an exit code."""

from __future__ import annotations

import os
import re
import resource
import traceback
from collections.abc import Mapping

import click

from llama_jax.cli.terminal import installing, print_error, print_json
from llama_jax.errors import DoesNotFit, LlamaJaxError, NoDevice

INTERRUPTED = 130
INTERNAL = 70
DEBUG_VARIABLE = "LLAMA_JAX_DEBUG"
_PYTHON_NAME = re.compile(r"SamplingParams\.(\w+)|load\((\w+)=\)")


def report(error: BaseException, *, as_json: bool, flags: Mapping[str, str] | None = None) -> int:
    """Prints an error and returns the exit code that goes with it.

    People get `error:` and `hint:` lines on standard error; with `as_json` standard output gets
    `{"error": {"type", "message", "hint", "param"}}` instead. LLAMA_JAX_DEBUG=1 adds the traceback on standard error.

    Args:
      flags: options by the names of their values: what the library calls by a Python name is called by its option.
    """
    kind, message, hint, param, code = _described(error)
    message, hint = (_with_flags(text, flags or {}) for text in (message, installing(hint)))
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        traceback.print_exception(error)
    if as_json:
        print_json({"error": {"type": kind, "message": message, "hint": hint, "param": param}})
    else:
        print_error(message, hint)
    return code


def _with_flags(text: str, flags: Mapping[str, str]) -> str:
    return _PYTHON_NAME.sub(lambda match: flags.get(match[1] or match[2], match[0]), text)


def _described(error: BaseException) -> tuple[str, str, str, str | None, int]:
    """Type, message, hint, parameter and exit code."""
    error = _typed(error)
    if isinstance(error, LlamaJaxError):
        param = getattr(error, "param", None)
        return type(error).__name__, error.message, error.hint, param, error.exit_code
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "llama-jax"
        param = error.param.name if isinstance(error, click.BadParameter) and error.param else None
        return "UsageError", error.format_message(), f"see `{command} --help`", param, error.exit_code
    if isinstance(error, click.ClickException):
        return type(error).__name__, error.format_message(), "", None, error.exit_code
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return "Interrupted", "interrupted", "", None, INTERRUPTED
    first = (str(error).splitlines() or [""])[0][:500]
    hint = f"this is a fault of the program; please report it, with what {DEBUG_VARIABLE}=1 adds"
    return type(error).__name__, f"{type(error).__name__}: {first}", hint, None, INTERNAL


def _typed(error: BaseException) -> BaseException:
    """Runtime errors that a user can act on, as errors of this package; others unchanged."""
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in text):
        reason = f": {text.splitlines()[0][:300]}" if text else ""
        return DoesNotFit(f"out of memory{reason}", hint="use a smaller model, a shorter context or a 16-bit --dtype")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if isinstance(error, ImportError) and "failed to map segment" in text and limit != resource.RLIM_INFINITY:
        return DoesNotFit(
            f"out of memory: this process may take {limit / 1e6:.0f} MB of address space, too little for its libraries",
            hint="raise the limit (ulimit -v unlimited)",
        )
    if isinstance(error, RuntimeError) and "nable to initialize backend" in text:
        return NoDevice(
            text.splitlines()[0][:500], hint="see `llama-jax doctor`; JAX_PLATFORMS=cpu runs on the processor"
        )
    if isinstance(error, AssertionError) and _raised_in(error) == "xla_bridge.py":
        # jax's message if it knows every backend of JAX_PLATFORMS, but none has a device.
        wanted = os.environ.get("JAX_PLATFORMS", "")
        return NoDevice(f"jax finds no device for JAX_PLATFORMS={wanted}", hint="unset it, or see `llama-jax doctor`")
    return error


def _raised_in(error: BaseException) -> str:
    """Name of the file that raised an error."""
    frames = traceback.extract_tb(error.__traceback__)
    return os.path.basename(frames[-1].filename) if frames else ""
