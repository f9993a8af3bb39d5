"""Publishing of engines, so that other processes of the same user can watch them.

A published engine answers on a Unix socket in a folder that only its user may enter: each connection gets one JSON
object. It costs nothing while nobody looks, and a socket whose process has ended accepts no connection, so that nothing
outdated is ever read. Does not import jax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import socket
import stat
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax import __version__
from llama_jax.disk import storage_errors
from llama_jax.engine.snapshot import Snapshot
from llama_jax.errors import StorageError
from llama_jax.folders import runtime_dir

if TYPE_CHECKING:
    from llama_jax.engine.replicas import Replicas

VARIABLE = "LLAMA_JAX_PUBLISH"
"""Environment variable: set to 1, it publishes the engines of a process."""
ANSWER_S = 3.0
"""Timeout of an engine's answer: one whose process is stopped never answers."""

_numbers = itertools.count()


@dataclass(frozen=True)
class Published:
    """An engine's report of itself; device, rows and context are those of one replica."""

    pid: int
    model: str
    device: str
    dtype: str
    replicas: int
    rows: int
    context: int
    snapshot: Snapshot

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return dataclasses.asdict(self) | {"version": __version__, "snapshot": self.snapshot.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Published:
        """The inverse of `to_json`.

        Raises:
          KeyError: it is from another version.
        """
        names = [field.name for field in dataclasses.fields(cls) if field.name != "snapshot"]
        return cls(**{name: data[name] for name in names}, snapshot=Snapshot.from_json(data["snapshot"]))


def report(engine: Replicas) -> Published:
    """Return an engine's current report."""
    from llama_jax.runtime import device_name

    model, settings = engine.cores[0].model, engine.settings
    return Published(
        pid=os.getpid(),
        model=model.name,
        device=device_name(model.device, model.mesh),
        dtype=model.dtype.name,
        replicas=len(engine.cores),
        rows=settings.rows,
        context=settings.context,
        snapshot=engine.snapshot(),
    )


def publish(engine: Replicas) -> None:
    """Publishes an engine for its lifetime, if `VARIABLE` is set.

    Raises:
      StorageError: the folder is not private to this user, or a socket cannot be made there.
    """
    if os.environ.get(VARIABLE, "0") in ("", "0"):
        return
    found = weakref.ref(engine)

    def answer() -> bytes | None:
        engine = found()
        return None if engine is None else json.dumps(report(engine).to_json()).encode()

    weakref.finalize(engine, _Socket(_folder(make=True) / f"{os.getpid()}-{next(_numbers)}.sock", answer).close)


def published() -> list[Published]:
    """This user's engines on this machine that answer, except those of other versions; removes sockets of ended
    processes.

    Raises:
      StorageError: the folder is not private to this user.
    """
    engines = []
    for path in sorted(_folder(make=False).glob("*.sock")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            engines.append(Published.from_json(json.loads(_asked(path))))
    return engines


def _asked(path: Path) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(ANSWER_S)
        try:
            asking.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            raise
        return b"".join(iter(lambda: asking.recv(1 << 16), b""))


class _Socket:
    """A socket in the file system, and a thread that answers."""

    def __init__(self, path: Path, answer: Callable[[], bytes | None]):
        self._path, self._answer = path, answer
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listen()
        except BaseException:
            self._listening.close()
            raise
        threading.Thread(target=self._serve, name="llama_jax publishing", daemon=True).start()

    def _listen(self) -> None:
        new = self._path.with_suffix(".new")  # a socket that refuses connections under its final name counts as stale
        with storage_errors(self._path):
            new.unlink(missing_ok=True)
            try:
                self._listening.bind(os.fspath(new))
            except OSError as error:
                if error.errno is None:  # Python's own check of the length
                    hint = "set XDG_RUNTIME_DIR to a folder with a shorter name"
                    raise StorageError(f"the name of the socket {self._path} is too long", hint=hint) from None
                raise
            self._listening.listen()
            new.rename(self._path)  # an earlier process with this id may have left one there

    def _serve(self) -> None:
        while True:
            try:
                asking, _ = self._listening.accept()
            except OSError:  # closed
                return
            with asking, contextlib.suppress(OSError):
                asking.settimeout(ANSWER_S)
                if answer := self._answer():
                    asking.sendall(answer)

    def close(self) -> None:
        """Ends the thread and removes the socket."""
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._listening.close()


def _folder(*, make: bool) -> Path:
    """The folder of the sockets. Nobody else may put one there, or see them."""
    folder = runtime_dir() / "engines"
    if make:
        with storage_errors(folder):
            for place in (folder.parent, folder):
                place.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.suppress(FileNotFoundError):
        for place in (folder, folder.parent):
            found = place.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
                raise StorageError(
                    f"{place} is not a folder that only you may write to",
                    hint="remove it, or set XDG_RUNTIME_DIR to a folder of your own",
                )
    return folder
