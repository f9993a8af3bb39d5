"""Routes of other packages: behind the key like all others, never in place of one of the server's, and alone with their
faults."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from served_model import Server, tiny_model
from starlette.requests import Request
from starlette.responses import Response

from llama_jax import plugins
from llama_jax.server.app import OPERATIONS
from llama_jax.server.extra import operations
from llama_jax.server.operations import Operation, asked_model, read
from llama_jax.server.page import FILES
from llama_jax.server.responses import json_response
from llama_jax.server.state import ServerState

KEY = {"authorization": "Bearer one"}


class LengthBody(msgspec.Struct, forbid_unknown_fields=True):
    text: str
    model: str | None = None


class LengthAnswer(msgspec.Struct):
    tokens: int


async def _length(server: ServerState, request: Request) -> Response:
    body = await read(server, request, LengthBody)
    async with asked_model(server, request, body.model) as served:
        return json_response(LengthAnswer(len(served.tokenizer.encode(body.text))))


async def _fault(server: ServerState, request: Request) -> Response:
    raise KeyError("a secret")


def operation(path: str, method: Any = "GET", **fields: Any) -> Operation:
    return Operation(method, path, "?", _fault, **fields)


SOUND = (Operation("POST", "/x/length", "Length", _length, LengthBody, LengthAnswer), operation("/x/{part}"))
AGAIN = operation("/x/length", "POST")
NOTHING = ()
OTHER = 5
SHADOWS = {f"CORE_{i}": operation(one.path.replace("{name:path}", "{x}")) for i, one in enumerate(OPERATIONS)}
globals().update(SHADOWS)
ROOT = operation("/")
STATIC = operation(next(path for path in FILES if path != "/"), "POST")
EVERYTHING = operation("/{path:path}", "POST")
INSIDE = operation("/v1/models/mine")
HEALTH = operation("/health/{kind}")
NO_SLASH = operation("x")
PUT = operation("/x/put", "PUT")
BRACES = operation("/x/{a}/{a}")
UNKNOWN_KIND = operation("/x/{a:strange}")


def __getattr__(name: str) -> Any:
    if name == "LEAVES":
        raise SystemExit(3)
    if name == "RAISES":
        raise RuntimeError("at import")
    raise AttributeError(name)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of objects here, as if packages had them as endpoints."""
    names: list[str] = []

    def entry_points(*, group: str) -> list[importlib.metadata.EntryPoint]:
        here = names if group == plugins.ENDPOINTS.name else []
        return [importlib.metadata.EntryPoint(f"{i:02}", f"{__name__}:{name}", group) for i, name in enumerate(here)]

    monkeypatch.setattr(plugins, "entry_points", entry_points)
    plugins.load.cache_clear()
    yield names
    plugins.load.cache_clear()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        *((name, "the server's own") for name in SHADOWS),
        *((name, "the server's own") for name in ("ROOT", "STATIC", "EVERYTHING", "INSIDE", "HEALTH")),
        ("NO_SLASH", "does not begin with a slash"),
        ("PUT", "neither GET nor POST"),
        ("BRACES", "not a path of a route"),
        ("UNKNOWN_KIND", "not a path of a route"),
        ("AGAIN", "another route /x/length"),
        ("NOTHING", "no route"),
        ("OTHER", "neither a llama_jax.server.operations.Operation nor a tuple"),
        ("MISSING", "AttributeError"),
        ("RAISES", "RuntimeError: at import"),
        ("LEAVES", "SystemExit: 3"),
    ],
)
def test_a_broken_plugin_is_left_out(installed: list[str], name: str, problem: str) -> None:
    installed += ["SOUND", name]
    with pytest.warns(RuntimeWarning, match="is broken"):
        assert operations() == SOUND
    _, broken = plugins.load(plugins.ENDPOINTS)
    assert problem in broken.problem


def test_routes_of_a_plugin(installed: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They need the key, are described, drain and count like the server's; a fault ends its own request alone."""
    installed.append("SOUND")
    with asyncio.Runner() as runner, Server(*tiny_model(tmp_path / "tiny"), runner, keys=("one",)) as server:
        assert server.call("POST", "/x/length", {"text": "Hi"}).status == 401
        assert server.call("GET", "/x/a").status == 401
        answer = server.call("POST", "/x/length", {"text": "Hi"}, headers=KEY)
        assert answer.json == {"tokens": len(server.tokenizer.encode("Hi"))}
        assert server.call("POST", "/x/length", {"text": 1}, headers=KEY).status == 400
        assert server.call("POST", "/x/length", {"text": "", "model": "x"}, headers=KEY).status == 404
        fault = server.call("GET", "/x/a", headers=KEY)
        assert (fault.status, fault.json["error"]["type"]) == (500, "server_error")
        assert "secret" not in fault.data.decode() + caplog.text
        document = server.call("GET", "/openapi.json", headers=KEY).json
        described = document["paths"]["/x/length"]["post"]
        schema = described["requestBody"]["content"]["application/json"]["schema"]
        jsonschema.validate({"text": "a", "model": "tiny"}, schema | {"components": document["components"]})
        assert document["paths"]["/x/{part}"]["get"]["parameters"][0]["name"] == "part"
        counted = 'llama_jax_http_requests_total{model_name="tiny",route="/x/length",status="200"} 1.0'
        assert counted in server.call("GET", "/metrics", headers=KEY).data.decode()
        server.state.life.draining = True
        assert server.call("POST", "/x/length", {"text": "Hi"}, headers=KEY).status == 503
