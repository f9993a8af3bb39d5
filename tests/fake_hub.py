"""A Hugging Face hub on this machine: the part of its HTTP interface that huggingface_hub uses, with faults on demand.

Files of more than `LARGE` bytes are served as the hub serves files in large-file storage: `resolve` redirects to
another host ("localhost" instead of "127.0.0.1"), which knows ranges.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

LARGE = 8192
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class FakeHub:
    """A hub's files, its faults, and a record of its requests.

    Attributes:
      files: name to content, of the one repository.
      fail: kind of request ("info", "tree", "resolve", "cdn") to status and headers of the answer.
      cut_after: the CDN resets the connection after this many bytes of an answer, once for each entry.
      ends_early: the CDN ends such an answer properly instead.
      pace: seconds that the CDN waits between pieces of 16 KiB.
      hang: the CDN never answers.
      delivered: content that the CDN and `resolve` deliver instead of a file's own, by name.
      announced: sha256 or git hash that is announced instead of a file's own, by name.
      ignores_ranges: the CDN answers a request for a part with the whole.
      requests: method, kind and name of every request; with the range for those to the CDN.
      tokens: the Authorization header of every request, by kind.
    """

    files: dict[str, bytes]
    repo: str = "org/name"
    commit: str = COMMIT
    url: str = ""
    info: dict[str, Any] = field(default_factory=lambda: {"cardData": {"license": "apache-2.0"}})
    fail: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    cut_after: list[int] = field(default_factory=list)
    ends_early: bool = False
    pace: float = 0.0
    hang: bool = False
    delivered: dict[str, bytes] = field(default_factory=dict)
    announced: dict[str, str] = field(default_factory=dict)
    ignores_ranges: bool = False
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    tokens: list[tuple[str, str | None]] = field(default_factory=list)
    on_request: Callable[[str], None] = lambda kind: None

    def digest(self, name: str) -> str:
        data = self.files[name]
        own = hashlib.sha256(data).hexdigest() if self.is_large(name) else git_sha1(data)
        return self.announced.get(name, own)

    def is_large(self, name: str) -> bool:
        return len(self.files[name]) > LARGE

    def bytes_sent(self) -> list[str]:
        """The ranges that the CDN was asked for, "" for a whole file."""
        return [what.partition(" ")[2] for method, kind, what in self.requests if (method, kind) == ("GET", "cdn")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        if path.startswith("/cdn/"):
            kind, what = "cdn", f"{path.removeprefix('/cdn/')} {self.headers.get('Range', '')}"
        elif "/resolve/" in path:
            kind, what = "resolve", path.partition("/resolve/")[2].partition("/")[2]
        else:
            kind, what = ("tree" if "/tree/" in path else "info"), path
        hub.requests.append((self.command, kind, what))
        hub.tokens.append((kind, self.headers.get("Authorization")))
        hub.on_request(kind)
        if kind in hub.fail:
            status, headers = hub.fail[kind]
            self._send(status, b"{}", **headers)
        elif hub.repo not in path and kind != "cdn":
            self._send(404, b"{}", **{"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        else:
            getattr(self, f"_{kind}")(what.partition(" ")[0])

    def _info(self, path: str) -> None:
        revision = path.partition("/revision/")[2]
        if revision not in ("", "main", "v1.0", self.hub.commit):
            self._send(404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
            return
        facts = {"id": self.hub.repo, "sha": self.hub.commit, "siblings": [], "tags": [], "private": False}
        self._send(200, json.dumps(facts | self.hub.info).encode(), **{"Content-Type": "application/json"})

    def _tree(self, path: str) -> None:
        hub, folder = self.hub, path.partition("/tree/")[2].partition("/")[2]
        whole = "recursive=true" in self.path.lower()
        entries: list[dict[str, Any]] = []
        for name, data in hub.files.items():
            place = name.rpartition("/")[0]
            if place != folder and not whole:
                if not folder:
                    entries.append({"type": "directory", "path": place, "size": 0, "oid": "0" * 40})
                continue
            entry = {"type": "file", "path": name, "size": len(data), "oid": git_sha1(data)}
            if hub.is_large(name):
                entry["lfs"] = {"oid": hub.digest(name), "size": len(data), "pointerSize": 130}
            else:
                entry["oid"] = hub.digest(name)
            entries.append(entry)
        self._send(200, json.dumps(entries).encode(), **{"Content-Type": "application/json"})

    def _resolve(self, name: str) -> None:
        hub = self.hub
        if name not in hub.files:
            self._send(404, b"", **{"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": hub.commit, "ETag": f'"{hub.digest(name)}"'}
        if hub.is_large(name):
            headers |= {"X-Linked-Etag": f'"{hub.digest(name)}"', "X-Linked-Size": str(len(hub.files[name]))}
            port = urlsplit(hub.url).port
            self._send(302, b"", Location=f"http://localhost:{port}/cdn/{name}", **headers)
        else:
            self._send(200, hub.delivered.get(name, hub.files[name]), **headers)

    def _cdn(self, name: str) -> None:
        hub = self.hub
        while hub.hang:
            time.sleep(0.05)
        data, status, headers = hub.delivered.get(name, hub.files[name]), 200, {}
        wanted = self.headers.get("Range")
        if wanted and not hub.ignores_ranges:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data, status = data[start:], 206
        cut = hub.cut_after.pop(0) if hub.cut_after else None
        if cut is not None and hub.ends_early:
            self.close_connection = True
            self._send(status, data[:cut], close=True, **headers)
        else:
            self._send(status, data, cut=cut, **headers)

    def _send(self, status: int, body: bytes, *, cut: int | None = None, close: bool = False, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if close:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        step = 16384
        for start in range(0, len(body[:cut]), step):
            self.wfile.write(body[:cut][start : start + step])
            time.sleep(self.hub.pace if "cdn" in self.path else 0)
        if cut is not None:
            # Closing with nothing lingering sends a reset instead of an end.
            self.wfile.flush()
            time.sleep(0.05)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that go away are what some tests are about


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[FakeHub]:
    """Runs a hub with one repository, `org/name`."""
    hub = FakeHub(files)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with _Server(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield hub
        hub.hang = False
        server.shutdown()


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder, as a repository has them."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def use(hub_url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets huggingface_hub, which reads its environment when it is imported, talk to a hub and keep a cache."""
    for name, value in {
        "ENDPOINT": hub_url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub_url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_ETAG_TIMEOUT": 2,
        "HF_HUB_DOWNLOAD_TIMEOUT": 2,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")


def environment(hub_url: str, cache: Path) -> dict[str, str]:
    """The same for a child process."""
    return {
        "HF_ENDPOINT": hub_url,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_secret",
    }
