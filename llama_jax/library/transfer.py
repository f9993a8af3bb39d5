"""Downloads large files so that nothing is lost: in parallel, resumed after an interruption, and checked by their hash.

huggingface_hub discards a file that it could not finish. Here it stays as `<sha256>.incomplete` in the hub's cache,
and the next attempt requests the missing bytes (RFC 9110, section 14). A file gets its name in the cache
(`blobs/<sha256>`, https://huggingface.co/docs/huggingface_hub/guides/manage-cache) once its hash is right.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llama_jax.checkpoint.format import Progress
from llama_jax.errors import CheckpointError
from llama_jax.library.hub_errors import is_transient

WORKERS = 4
"""Number of files that are downloaded at a time."""
ATTEMPTS = 5
"""Attempts in a row without a single byte after which a download is given up."""
PAUSE_S = 1.0
"""Seconds before the second attempt; doubled before each further one."""

_CHUNK_BYTES = 1 << 16
"""Bytes that an interruption can cost."""
_REPORT_EVERY_S = 0.2


@dataclass(frozen=True)
class RemoteFile:
    """A file of a model on the hub.

    Attributes:
      name: its path in the repository.
      size: in bytes.
      sha256: of its content, where the hub states it (files in large-file storage), else None.
      git_sha1: git's hash of its content, for all others.
      xet: whether it is in Xet storage, which has its own protocol.
    """

    name: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None
    xet: bool = False


def partial_path(blobs: Path, file: RemoteFile) -> Path:
    """The path of a file's unfinished download."""
    return blobs / f"{file.sha256}.incomplete"


def fetch(
    files: Sequence[RemoteFile], blobs: Path, url: Callable[[str], str], progress: Progress | None = None
) -> None:
    """Downloads files whose sha256 is known into the hub's cache; those that are there already cost nothing.

    Args:
      files: what to download.
      blobs: the cache's folder of contents.
      url: a file's address, from its name.
      progress: called now and then with the bytes done, the bytes in all, and the name of a file; from this thread.

    Raises:
      CheckpointError: what was delivered has another hash than the hub announced.
      OSError: the cache cannot be written.
      Exception: errors of huggingface_hub and its HTTP library (`llama_jax.library.hub_errors`).
    """
    missing = [file for file in files if not (blobs / str(file.sha256)).exists()]
    if not missing:
        return
    blobs.mkdir(parents=True, exist_ok=True)
    total, done, stop = sum(file.size for file in missing), _Counter(), threading.Event()
    pool = ThreadPoolExecutor(WORKERS)
    try:
        futures = {pool.submit(_fetch_one, file, blobs, url(file.name), done, stop): file for file in missing}
        _watch(futures, done, total, progress)
    finally:
        # On an error or an interrupt the others end at their next chunk; what they have is kept.
        stop.set()
        pool.shutdown(cancel_futures=True)
    if progress:
        progress(total, total, missing[-1].name)


def _watch(futures: dict[Future[None], RemoteFile], done: _Counter, total: int, progress: Progress | None) -> None:
    pending = set(futures)
    while pending:
        ended, pending = wait(pending, timeout=_REPORT_EVERY_S, return_when=FIRST_EXCEPTION)
        for future in ended:
            future.result()
        if progress and pending:
            progress(min(done.value, total - 1), total, futures[next(iter(pending))].name)


class _Counter:
    """A sum that several threads add to."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def add(self, n: int) -> None:
        with self._lock:
            self.value += n


class _Stopped(Exception):
    """Another download failed, or the user interrupted."""


def _fetch_one(file: RemoteFile, blobs: Path, url: str, done: _Counter, stop: threading.Event) -> None:
    part = partial_path(blobs, file)
    with part.open("ab") as out:
        if out.tell() > file.size:
            out.truncate(0)
        done.add(out.seek(0, 2))
        failures = 0
        while out.tell() < file.size:
            before = out.tell()
            try:
                _append(out, url, file, done, stop)
                error: Exception = ConnectionError("the connection ended early")
            except Exception as e:
                if not is_transient(e):
                    raise
                error = e
            if out.tell() < file.size:
                failures = 0 if out.tell() > before else failures + 1
                if failures >= ATTEMPTS or stop.wait(PAUSE_S * 2 ** max(failures - 1, 0)):
                    raise error
    found = sha256_of(part)
    if found != file.sha256:
        part.unlink()
        raise _wrong_content(file, found)
    part.replace(blobs / str(file.sha256))


def _append(out: BinaryIO, url: str, file: RemoteFile, done: _Counter, stop: threading.Event) -> None:
    """Requests the missing bytes of a file and appends them."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    start = out.tell()
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    # A redirect to another host goes there without the token: the HTTP library leaves it out.
    with get_session().stream(
        "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
    ) as response:
        hf_raise_for_status(response)
        sent = response.headers.get("Content-Range") or ""
        if start and (response.status_code != 206 or not sent.startswith(f"bytes {start}-")):
            # The server sends the whole file again.
            out.seek(0)
            out.truncate()
            done.add(-start)
        for chunk in response.iter_bytes(_CHUNK_BYTES):
            if stop.is_set():
                raise _Stopped
            chunk = chunk[: file.size - out.tell()]
            out.write(chunk)
            done.add(len(chunk))
            if out.tell() == file.size:
                return  # what may follow is not asked for; the hash decides about the rest


def verify(file: RemoteFile, path: Path) -> None:
    """Compares a downloaded file with what the hub announced; removes it if it differs.

    Raises:
      CheckpointError: size or hash differ.
    """
    if file.sha256:
        found, expected = sha256_of(path), file.sha256
    else:
        found, expected = git_sha1_of(path), file.git_sha1 or ""
    if path.stat().st_size == file.size and found == expected:
        return
    content = path.resolve()
    path.unlink()
    own = content.parent.parent in [parent.resolve() for parent in path.parents]
    if content != path and content.parent.name == "blobs" and own:
        content.unlink(missing_ok=True)
    raise _wrong_content(file, found)


def _wrong_content(file: RemoteFile, found: str) -> CheckpointError:
    kind, expected = ("sha256", file.sha256) if file.sha256 else ("git hash", file.git_sha1)
    return CheckpointError(
        f"{file.name} was delivered with {kind} {found}, the hub announces {expected}",
        hint="run it again, that file is downloaded anew; if it stays, a proxy or the mirror in HF_ENDPOINT changes it",
    )


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_sha1_of(path: Path) -> str:
    """The name that git gives to a file's content: sha1 of "blob", its size, a NUL, and the content."""
    hashed = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashed).hexdigest()
