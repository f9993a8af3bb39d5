"""The web page: files that `scripts/ui_build.py` builds from `ui/`, served unchanged to anybody.

They contain nothing of this server; the page's requests need the key that the user enters.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "static"
FILES = {
    "/" if path.name == "index.html" else f"/{path.relative_to(FOLDER).as_posix()}": path
    for path in sorted(FOLDER.rglob("*"))
    if path.is_file()
}
"""File path by URL."""

TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".txt": "text/plain"}

POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    # Text becomes HTML only through the sanitiser, which alone may create trusted types.
    "require-trusted-types-for": "'script'",
    "trusted-types": "dompurify",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    # Cached, but revalidated each time, so that files of two versions never mix.
    "cache-control": "no-cache",
    "vary": "accept-encoding",
}


def routes() -> list[Route]:
    """Return a route for each file."""
    return [Route(url, _endpoint(path)) for url, path in FILES.items()]


@cache
def _endpoint(path: Path) -> Callable[[Request], Awaitable[Response]]:
    plain = path.read_bytes()
    packed = gzip.compress(plain, mtime=0)
    digest = hashlib.sha256(plain).hexdigest()[:32]
    kind = f"{TYPES[path.suffix]}; charset=utf-8"

    async def page(request: Request) -> Response:
        packs = "gzip" in request.headers.get("accept-encoding", "")
        etag = f'"{digest}-gzip"' if packs else f'"{digest}"'
        headers = {**HEADERS, "etag": etag}
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if packs:
            headers["content-encoding"] = "gzip"
        return Response(packed if packs else plain, headers={**headers, "content-type": kind})

    return page
