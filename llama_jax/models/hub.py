"""Models of the Hugging Face hub: from its cache on this machine if they are complete there, else from the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_jax.checkpoint.storage import storage_errors
from llama_jax.errors import GatedModel, LlamaJaxError, ModelNotFound, NetworkError

WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*", "USE_POLICY*", "README.md")
UNWANTED = ("*/*", "consolidated*")
"""Files in subfolders, and a second copy of the weights in Mistral's own format."""

_HTTP_PACKAGES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


def snapshot(repo: str, revision: str | None, notify: Callable[[str], None]) -> Path:
    """A folder with the files of a model; its name is the commit.

    Args:
      repo: `org/name`.
      revision: branch, tag or commit; the main branch when None.
      notify: told before anything is downloaded.

    Raises:
      GatedModel: the owner asks for a licence to be accepted, or for a login.
      ModelNotFound: the hub knows no such model or revision.
      NetworkError: it is not on this machine, and the hub cannot be reached or answers with an error.
      StorageError, DoesNotFit: the hub's cache cannot be written.
    """
    # Imported here, so that `list` and local models do not pay for it.
    import huggingface_hub

    def get(local: bool) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                local_files_only=local,
                allow_patterns=list(WANTED),
                ignore_patterns=list(UNWANTED),
            )
        )

    if (here := _complete(get)) is not None:
        return here
    notify(f"Downloading {repo} from the Hugging Face hub (its licence: https://huggingface.co/{repo})")
    try:
        with storage_errors(Path(huggingface_hub.constants.HF_HUB_CACHE)):
            try:
                return get(False)
            except Exception as e:
                if (known := translated(e, repo, revision)) is not None:
                    raise known from e
                raise
    except KeyboardInterrupt:
        notify("Stopped; what was downloaded is kept, and the next run continues there.")
        raise


def _complete(get: Callable[[bool], Path]) -> Path | None:
    """The snapshot on this machine if config and all weights are in it."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    from llama_jax.convert.hf import is_huggingface, required_files

    try:
        path = get(True)
    except (LocalEntryNotFoundError, ValueError, OSError):
        return None
    if is_huggingface(path) and all(file.is_file() for file in required_files(path)):
        return path
    return None


def translated(e: Exception, repo: str, revision: str | None) -> LlamaJaxError | None:
    """The error of this package that says what an error of huggingface_hub means; None if it is no error of the hub."""
    from huggingface_hub import errors

    where = f"{repo}@{revision}" if revision else repo
    status = _status(e)
    if isinstance(e, errors.GatedRepoError) or (status in (401, 403) and _may_exist(e)):
        return GatedModel(
            f"{where} is gated: its owner wants its licence accepted or a login (HTTP {status or 403})",
            hint=f"accept it at https://huggingface.co/{repo}, then run `hf auth login` or set HF_TOKEN",
        )
    if isinstance(e, errors.RevisionNotFoundError):
        return ModelNotFound(
            f"{repo} has no revision {revision!r}", hint=f"see https://huggingface.co/{repo}/tree/main"
        )
    if isinstance(e, (errors.RepositoryNotFoundError, errors.HFValidationError)) or status == 404:
        return ModelNotFound(
            f"the Hugging Face hub knows no model {where}, or it is private",
            hint="check the spelling; for a private model run `hf auth login` or set HF_TOKEN",
        )
    if isinstance(e, errors.OfflineModeIsEnabled):
        return NetworkError(f"{where} is not on this machine, and HF_HUB_OFFLINE is set", hint="unset HF_HUB_OFFLINE")
    if (
        isinstance(e, (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, ConnectionError, TimeoutError))
        or type(e).__module__.split(".")[0] in _HTTP_PACKAGES
    ):
        reason = f"HTTP {status}" if status else f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"
        return NetworkError(
            f"{where} is not on this machine and cannot be downloaded ({reason})",
            hint="check the network; a local path or the default model need none",
        )
    return None


def _status(e: Exception) -> int | None:
    response: Any = getattr(e, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def _may_exist(e: Exception) -> bool:
    """The hub answers 401 for models that do not exist as well; it then says so by the type of its error."""
    from huggingface_hub.errors import RepositoryNotFoundError

    return not isinstance(e, RepositoryNotFoundError)
