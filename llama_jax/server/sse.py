"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

from typing import Any

import msgspec

KEEP_ALIVE = "keep-alive"
DONE = b"data: [DONE]\n\n"


def event(data: Any, name: str = "") -> bytes:
    """Return one event with JSON data, and a name if given."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + msgspec.json.encode(data) + b"\n\n"


def comment(text: str) -> bytes:
    """Return a one-line comment, which clients ignore."""
    return f": {' '.join(text.split())}\n\n".encode()
