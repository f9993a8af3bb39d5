"""Translates errors of huggingface_hub, or of the HTTP library below it, for users."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from llama_jax.errors import GatedModel, LlamaJaxError, ModelNotFound, NetworkError

_HTTP_PACKAGES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


@contextlib.contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Converts errors of huggingface_hub that leave a block into those of this package."""
    try:
        yield
    except Exception as e:
        if (known := translated(e, repo, revision)) is not None:
            raise known from e
        raise


def translated(e: BaseException, repo: str, revision: str | None) -> LlamaJaxError | None:
    """The error of this package that corresponds to one of huggingface_hub; None if it is not an error of the hub."""
    from huggingface_hub import errors

    where = f"{repo}@{revision}" if revision else repo
    if isinstance(e, errors.LocalEntryNotFoundError) and e.__cause__ is not None:
        # "Not here, and the hub did not answer": what it did instead of answering stands behind it.
        return translated(e.__cause__, repo, revision) or _unreachable(where, e)
    status = _status(e)
    if isinstance(e, errors.RepositoryNotFoundError) and not isinstance(e, errors.GatedRepoError):
        # The hub answers 401 for models that do not exist as well, and says so by the type of its error.
        return ModelNotFound(
            f"the Hugging Face hub knows no model {where}, or it is private",
            hint=f"check the spelling; for a private model {_token_hint()}",
        )
    if status == 401 and "Invalid credentials" in _header(e, "X-Error-Message"):
        return GatedModel(f"the Hugging Face hub refuses the token (HTTP 401, asked for {where})", hint=_token_hint())
    if isinstance(e, errors.GatedRepoError) or status in (401, 403):
        return GatedModel(
            f"{where} is gated: its owner wants its licence accepted or a login (HTTP {status or 403})",
            hint=f"accept it at https://huggingface.co/{repo}, then {_token_hint()}",
        )
    if isinstance(e, errors.RevisionNotFoundError):
        return ModelNotFound(
            f"{repo} has no revision {revision!r}", hint=f"see https://huggingface.co/{repo}/tree/main"
        )
    if isinstance(e, errors.HFValidationError) or status == 404:
        return ModelNotFound(
            f"the Hugging Face hub knows no model {where}, or a file of it is gone",
            hint=f"check the spelling, and https://huggingface.co/{repo}/tree/main",
        )
    if status == 429:
        wait = _header(e, "Retry-After")
        again = f"in {wait} seconds" if wait.isascii() and wait.isdigit() else "later"
        return NetworkError(
            f"the Hugging Face hub has had too many requests from here (HTTP 429, asked for {where})",
            hint=f"try again {again}; what was downloaded is kept. A login allows more: {_token_hint()}",
        )
    if isinstance(e, errors.OfflineModeIsEnabled):
        return NetworkError(
            f"{where} is not completely on this machine, and HF_HUB_OFFLINE is set", hint="unset HF_HUB_OFFLINE"
        )
    if (
        isinstance(e, (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, ConnectionError, TimeoutError))
        or type(e).__module__.split(".")[0] in _HTTP_PACKAGES
    ):
        return _unreachable(where, e)
    if isinstance(e, errors.FileMetadataError) or (type(e) is OSError and e.errno is None):
        # huggingface_hub found that an answer is incomplete: a header is missing, or a file has another size.
        return NetworkError(
            f"{where} cannot be downloaded: {_first_line(e)}",
            hint="run it again; if it stays, a proxy or the mirror in HF_ENDPOINT changes answers",
        )
    return None


def is_transient(e: BaseException) -> bool:
    """Returns whether a retry of a request may succeed: the connection broke, or the server was at fault."""
    from huggingface_hub import errors

    if type(e).__name__ == "ProxyError" or isinstance(e, errors.OfflineModeIsEnabled):
        return False
    status = _status(e)
    if status is not None:
        return status >= 500 or status == 408
    return isinstance(e, (ConnectionError, TimeoutError)) or type(e).__module__.split(".")[0] in _HTTP_PACKAGES


def _unreachable(where: str, e: BaseException) -> NetworkError:
    status = _status(e)
    kind = type(e).__name__
    if status and status >= 500:
        hint = "the hub has a fault; try again later. What was downloaded is kept"
    elif kind == "ProxyError":
        hint = "check the proxy that HTTPS_PROXY, HTTP_PROXY or ALL_PROXY name (NO_PROXY leaves hosts out)"
    elif "Timeout" in kind:
        hint = "run it again, it continues; HF_HUB_DOWNLOAD_TIMEOUT=60 waits longer for a slow network"
    else:
        hint = "check the network, then run it again: it resumes; a local path needs no network"
    reason = f"HTTP {status}" if status else f"{kind}: {_first_line(e)}".rstrip(": ")
    return NetworkError(f"{where} cannot be downloaded ({reason})", hint=hint)


def _token_hint() -> str:
    """Says where a token comes from, and which one is in use."""
    import huggingface_hub

    token = huggingface_hub.get_token()
    if token is None:
        return "run `hf auth login` or set HF_TOKEN (there is no token now)"
    source = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "`hf auth login`"
    return f"use a token that has access, by `hf auth login` or HF_TOKEN (the one now comes from {source})"


def _status(e: BaseException) -> int | None:
    response: Any = getattr(e, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def _header(e: BaseException, name: str) -> str:
    headers: Any = getattr(getattr(e, "response", None), "headers", {})
    return str(headers.get(name) or "")


def _first_line(e: BaseException) -> str:
    return next((line.strip()[:200] for line in str(e).splitlines() if line.strip()), "")
