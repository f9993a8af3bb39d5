"""Models from the Hugging Face hub: from its cache on this machine if complete there, else from the network."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_jax.checkpoint.format import Progress
from llama_jax.disk import check_space, existing_parent, file_lock, storage_errors
from llama_jax.errors import ModelNotFound, NetworkError, RequestError, StorageError
from llama_jax.library import hub_cache
from llama_jax.library.converted import Notify, models_dir
from llama_jax.library.hub_errors import hub_errors
from llama_jax.library.offer import Offer, offer
from llama_jax.library.sizes import size_text
from llama_jax.library.transfer import RemoteFile, fetch, partial_path, verify

NAME = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}(@[A-Za-z0-9][\w.\-/]{0,127})?", re.ASCII)
"""`org/name`, or `org/name@revision`."""


def split_name(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """`org/name[@revision]` as repository and revision.

    Raises:
      RequestError: it is no such name, or gives another revision than `revision`.
    """
    repo, _, own = name.partition("@")
    whole = f"{repo}@{revision}" if revision else name
    if not NAME.fullmatch(name) or not NAME.fullmatch(whole) or ".." in whole:
        raise RequestError(
            f"{whole!r:.300} is not a name on the Hugging Face hub",
            param="model",
            hint="give org/name or org/name@revision",
        )
    if revision and own and own != revision:
        raise RequestError(f"{name} and revision {revision} differ", param="revision", hint="give one of them")
    return repo, revision or own or None


def snapshot(repo: str, revision: str | None, notify: Notify, progress: Progress | None = None) -> Path:
    """A folder with the files of a model; its name is the commit. The network is used if they are not complete here.

    Args:
      repo: `org/name`.
      revision: branch, tag or commit; the main branch when None.
      notify: told before anything is downloaded.
      progress: called during a download.

    Raises:
      GatedModel: the owner requires that a licence is accepted, or a login.
      ModelNotFound: the hub knows no such model or revision.
      NetworkError: it is not on this machine, and the hub cannot be reached or answers with an error.
      CheckpointError: a file is not what the hub announces.
      UnsupportedModel: the repository holds no weights that can be read.
      StorageError, DoesNotFit: the hub's cache cannot be written.
    """
    if (here := hub_cache.complete_snapshot(repo, revision)) is not None:
        return here
    return download(offer(repo, revision), notify, progress)


def pull(
    repo: str, revision: str | None, notify: Notify, progress: Progress | None = None, *, convert: bool = True
) -> tuple[Path, Offer | None]:
    """Like `snapshot`, but asks the hub for the revision's current commit, and checks every file that is here already.

    Returns:
      The folder, and what the hub offered; None if the hub cannot be reached and a copy on this machine is used, which
      `notify` is told.
    """
    try:
        found = offer(repo, revision)
    except NetworkError as e:
        if (here := hub_cache.complete_snapshot(repo, revision)) is None:
            raise
        notify(f"Using the copy of {repo} on this machine, commit {here.name[:12]}: {e.message}")
        return here, None
    return download(found, notify, progress, convert=convert), found


def download(offered: Offer, notify: Notify, progress: Progress | None = None, *, convert: bool = True) -> Path:
    """Downloads what is missing of an offer, and checks all of it.

    One process at a time downloads a model; another one waits, and then finds the files there.

    Args:
      convert: whether a checkpoint is to be made of it afterwards, for which there has to be space as well.

    Returns:
      The folder of the snapshot. Raises as `snapshot` does.
    """
    folder, lock = hub_cache.repo_folder(offered.repo), hub_cache.lock_path(offered.repo)
    # Errors of the hub's library are OSErrors as well, so they are recognised first, in the innermost of these.
    with _storage_hint(), storage_errors(folder), hub_errors(offered.repo, offered.revision), file_lock(lock):
        place = folder / "snapshots" / offered.commit
        missing = [file for file in offered.files if not (place / file.name).exists()]
        if missing:
            _announce(offered, missing, notify)
            _check_space(offered, missing, folder / "blobs", convert=convert)
        try:
            return _download(offered, missing, folder / "blobs", progress)
        except KeyboardInterrupt:
            notify("Stopped; what was downloaded is kept, and the next run continues there.")
            raise


def _download(offered: Offer, missing: Sequence[RemoteFile], blobs: Path, progress: Progress | None) -> Path:
    from huggingface_hub import constants, hf_hub_url

    def url(name: str) -> str:
        return hf_hub_url(offered.repo, name, revision=offered.commit)

    xet = not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None
    large = [file for file in missing if file.sha256 and not (file.xet and xet)]
    # First, so that a snapshot which has its weights is complete.
    _snapshot(offered, [file for file in missing if not file.sha256], bars=False)
    fetch(large, blobs, url, progress)
    # What remains is to name what was fetched, and what only the hub's own library can fetch.
    path = _snapshot(offered, offered.files, bars=progress is not None and len(large) < len(missing))
    if path.name != offered.commit:
        raise NetworkError(f"{offered.repo} changed while it was downloaded", hint="run it again")
    for file in offered.files:
        if file not in large:
            verify(file, path / file.name)
    return path


def _snapshot(offered: Offer, files: Sequence[RemoteFile], *, bars: bool) -> Path:
    """Lets huggingface_hub download files of a snapshot, or name those whose content is in its cache already."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{**kwargs, "disable": True})

    if not files:
        return Path()
    return Path(
        snapshot_download(
            offered.repo,
            # By its name, so that the name is known offline as well.
            revision=offered.revision,
            allow_patterns=[glob.escape(file.name) for file in files],
            tqdm_class=tqdm if bars and sys.stderr.isatty() else Silent,
        )
    )


def _announce(offered: Offer, missing: Sequence[RemoteFile], notify: Notify) -> None:
    size = size_text(sum(file.size for file in missing))
    rest = "" if len(missing) == len(offered.files) else f" of {size_text(offered.nbytes)}"
    notify(
        f"Downloading {offered.repo}: {size}{rest} in {len(missing)} files, licence {offered.licence or 'not stated'} "
        f"(https://huggingface.co/{offered.repo}), commit {offered.commit[:12]}"
    )


def _check_space(offered: Offer, missing: Sequence[RemoteFile], blobs: Path, *, convert: bool) -> None:
    """Raises DoesNotFit unless there is space for the files and, if wanted, for their conversion."""
    needed = 0
    for file in missing:
        if not (blobs / str(file.sha256)).exists():
            part = partial_path(blobs, file)
            needed += file.size - (part.stat().st_size if file.sha256 and part.exists() else 0)
    converted = offered.nbytes if convert else 0
    if existing_parent(blobs).stat().st_dev == existing_parent(models_dir()).stat().st_dev:
        check_space(blobs, needed + converted)
        return
    check_space(blobs, needed)
    check_space(models_dir(), converted)


@contextlib.contextmanager
def _storage_hint() -> Iterator[None]:
    """The hub's cache has its own variables."""
    try:
        yield
    except StorageError as e:
        raise StorageError(e.message, hint="HF_HOME or HF_HUB_CACHE move the hub's cache; see `hf env`") from e


def not_here(repo: str, revision: str | None) -> ModelNotFound:
    """The error for a model that may exist on the hub, but is not on this machine."""
    name = f"{repo}@{revision}" if revision else repo
    return ModelNotFound(f"{name} is not on this machine", hint=f"run `llama-jax pull {name}`")
