"""The typed errors of llama_jax: one tree, every error with a hint and a stable exit code.

Exit codes are the command line's contract: 2 usage, 3 model not found, gated or unsupported, or no engine, 4 corrupt or
unverified, 5 no usable device, 6 does not fit, 7 network, 70 internal fault, 73 cannot write, 75 overloaded, 130
interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable

_MAX_TEXT = 4_000
"""Characters of a message or hint; much more would be the file and not what is wrong with it."""


class LlamaJaxError(Exception):
    """Base of every error that llama_jax raises on purpose.

    Names and values in a message come from files that may be hostile: what UTF-8 cannot encode is escaped, and the
    middle of an overlong text left out.

    Args:
      message: what is wrong, in one sentence, with the numbers that matter.
      hint: what the user can do about it.
    """

    exit_code = 70

    def __init__(self, message: str, *, hint: str = ""):
        self.message = _readable(message)
        self.hint = _readable(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})" if self.hint else self.message


def did_you_mean(name: str, known: Iterable[str], sign: str = "") -> str:
    """The beginning of a hint for an unknown name: the known names close to it; "" if none is.

    Args:
      sign: put before each of them.
    """
    import difflib

    close = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.5)
    return f"did you mean {', '.join(sign + match for match in close)}?" if close else ""


def _readable(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    half = _MAX_TEXT // 2
    return text if len(text) <= _MAX_TEXT else f"{text[:half]} … {text[-half:]}"


class RequestError(LlamaJaxError):
    """A value that the caller passed is out of range; `param` names it."""

    exit_code = 2

    def __init__(self, message: str, *, param: str, hint: str = ""):
        super().__init__(message, hint=hint)
        self.param = param


class ModelNotFound(LlamaJaxError):
    """No model under this name, folder or file."""

    exit_code = 3


class GatedModel(ModelNotFound):
    """The model exists, but its owner requires an accepted licence or a token."""


class UnsupportedModel(LlamaJaxError):
    """The model needs something this package does not compute; the message names it."""

    exit_code = 3


class CheckpointError(LlamaJaxError):
    """A checkpoint is damaged, incomplete, inconsistent or of a newer format; names file and tensor."""

    exit_code = 4


class TokenizerError(LlamaJaxError):
    """Tokenizer files are missing or damaged, or a token id is out of range."""

    exit_code = 4


class TemplateError(LlamaJaxError):
    """A chat template is missing, malformed, or refused the messages."""

    exit_code = 4


class VerificationError(LlamaJaxError):
    """Computed numbers differ from the expected ones."""

    exit_code = 4


class NoDevice(LlamaJaxError):
    """The requested device cannot be used."""

    exit_code = 5


class CompilerUnavailable(NoDevice):
    """The compiler for a target is not installed, or cannot be loaded on this machine."""


class DataError(LlamaJaxError):
    """Data to learn from cannot be read or used; the message names file and line."""

    exit_code = 4


class DoesNotFit(LlamaJaxError):
    """Memory or disk space is too small; the message says what is needed and what is free."""

    exit_code = 6


class NetworkError(LlamaJaxError):
    """The network is needed and cannot be reached."""

    exit_code = 7


class KernelError(LlamaJaxError):
    """A kernel backend requested by name cannot run here; the message says why."""


class StorageError(LlamaJaxError):
    """A file or folder cannot be written (read-only, no permission)."""

    exit_code = 73


class Overloaded(LlamaJaxError):
    """The queue is full; the same request may succeed later."""

    exit_code = 75


class EngineFailed(LlamaJaxError):
    """The engine that a request ran on has failed or was closed; the request is lost.

    Attributes:
      retry_s: seconds until the engine may take requests again; 0 if unknown.
    """

    def __init__(self, message: str, *, hint: str = "", retry_s: float = 0.0):
        super().__init__(message, hint=hint)
        self.retry_s = retry_s


class LateCompilation(EngineFailed):
    """A strict engine compiled something, or would have had to, after it was ready."""


class EngineNotFound(LlamaJaxError):
    """No engine on this machine publishes itself."""

    exit_code = 3
