"""The page's files: who gets them, with which headers, and whether they are what the sources build."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from served_model import Server, tiny_model

from llama_jax.server import page

ROOT = Path(__file__).parents[1]
UNREACHABLE = 69
"""Exit code of scripts/ui_build.py without npm's registry."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with asyncio.Runner() as runner:
        yield Server(*tiny_model(tmp_path_factory.mktemp("page") / "tiny"), runner, keys=("a-key",))


def test_the_page_needs_no_key_and_admits_nothing_foreign(server: Server) -> None:
    for url, path in page.FILES.items():
        answer = server.call("GET", url)
        assert (answer.status, answer.data) == (200, path.read_bytes())
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
    types = {url: server.call("GET", url).headers["content-type"] for url in ("/", "/ui/app.js", "/ui/app.css")}
    assert [kind.partition(";")[0] for kind in types.values()] == ["text/html", "text/javascript", "text/css"]
    assert server.call("GET", "/", headers={"host": "evil.example"}).status == 403
    for url in ("/ui/", "/ui/none.js", "/ui/../page.py", "/index.html", "/v1/models"):
        assert server.call("GET", url).status == 401


def test_files_are_packed_and_sent_once(server: Server) -> None:
    plain = server.call("GET", "/ui/app.js")
    packed = server.call("GET", "/ui/app.js", headers={"accept-encoding": "br, gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.data) == plain.data
    assert plain.headers["cache-control"] == packed.headers["cache-control"] == "no-cache"
    assert plain.headers["etag"] != packed.headers["etag"]
    assert plain.headers["vary"] == "accept-encoding"
    again = server.call("GET", "/ui/app.js", headers={"if-none-match": f'W/"x", {plain.headers["etag"]}'})
    assert (again.status, again.data, again.headers["etag"]) == (304, b"", plain.headers["etag"])
    assert server.call("GET", "/ui/app.js", headers={"if-none-match": packed.headers["etag"]}).status == 200
    assert server.call("GET", "/health/live").headers["cache-control"] == "no-store"


def test_the_page_is_small_and_whole() -> None:
    """All that the first page needs is there and has no address elsewhere."""
    html = page.FILES["/"].read_text()
    assert set(re.findall(r'(?:src|href)="\.(/[^"]+)"', html)) == {"/ui/app.js", "/ui/app.css"}
    assert not re.search(r"<script(?![^>]* src=)|<style| style=| on\w+=", html)
    for url, path in page.FILES.items():
        assert len(gzip.compress(path.read_bytes())) < 100_000, url
    licences = page.FILES["/ui/licenses.txt"].read_text()
    needed = json.loads((ROOT / "llama_jax/server/ui/package.json").read_text())["dependencies"]
    assert all(f"{name} {version} (" in licences for name, version in needed.items())


def test_a_wheel_holds_the_page_and_not_its_sources(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        tmp_path,
        "build_py",
        "--build-lib",
        tmp_path,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = tmp_path / "llama_jax" / "server"
    assert {path.relative_to(built) for path in (built / "static").rglob("*.*")} == {
        path.relative_to(page.FOLDER.parent) for path in page.FILES.values()
    }
    assert not (built / "ui").exists()


@pytest.mark.slow
def test_the_page_is_what_its_sources_build() -> None:
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("needs uv")
    command = [uv, "run", "--isolated", "--only-group", "ui", "python", "scripts/ui_build.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == UNREACHABLE:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
