"""Operations that report on the server itself."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from llama_jax import __version__
from llama_jax.errors import EngineFailed
from llama_jax.server.answers import (
    EnginesAnswer,
    ModelAnswer,
    ModelsAnswer,
    ModelStatus,
    StatusAnswer,
    VersionAnswer,
)
from llama_jax.server.operations import Operation
from llama_jax.server.responses import json_response
from llama_jax.server.served import Served
from llama_jax.server.slots import Slot
from llama_jax.server.state import ServerState

_STARTED = int(time.time())


def readiness(server: ServerState) -> StatusAnswer:
    """Return the server's status; with a reason if it accepts no requests.

    It accepts them as long as any model does: if several are served, a failed one affects only its own requests.
    """
    if server.life.draining:
        return StatusAnswer("draining", "the server is about to end")
    problems = [_problem(served) for served in server.models.loaded]
    first = problems[0] if problems else None
    return StatusAnswer("ready") if first is None or None in problems else StatusAnswer(*first)


def _problem(served: Served) -> tuple[Literal["restarting", "failed", "stalled"], str] | None:
    """The reason why an engine accepts no requests, if it does not."""
    try:
        served.engine.snapshot()
    except EngineFailed as error:
        return ("restarting" if served.engine.restarting else "failed"), str(error)
    if (age := served.engine.step_age_s) > served.settings.limits.step_s:
        return "stalled", f"the device has worked at one step for {age:.0f} s"
    return None


async def _live(server: ServerState, request: Request) -> Response:
    return json_response(StatusAnswer("live"))


async def _ready(server: ServerState, request: Request) -> Response:
    answer = readiness(server)
    return json_response(answer, 200 if answer.status == "ready" else 503)


async def _version(server: ServerState, request: Request) -> Response:
    return json_response(VersionAnswer(__version__))


async def _metrics(server: ServerState, request: Request) -> Response:
    return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _engines(server: ServerState, request: Request) -> Response:
    found = []
    for served in server.models.loaded:
        with contextlib.suppress(EngineFailed):
            found.append(dataclasses.replace(served.engine.published(), model=served.names[0]).to_json())
    return json_response(EnginesAnswer(found))


async def _models(server: ServerState, request: Request) -> Response:
    return json_response(
        ModelsAnswer(
            "list", [_named(slot, name) for slot in server.models.slots for name in (*slot.names, *slot.adapters)]
        )
    )


async def _model(server: ServerState, request: Request) -> Response:
    name = request.path_params["name"]
    return json_response(_named(server.models.find(name), name))


def _named(slot: Slot, name: str) -> ModelAnswer:
    created = _STARTED if slot.served is None else slot.served.created
    parent = slot.names[0] if name in slot.adapters else msgspec.UNSET
    return ModelAnswer(name, "model", created, "llama-jax", slot.names[0], slot.context, _status(slot), parent)


def _status(slot: Slot) -> ModelStatus:
    if slot.served is not None:
        return ModelStatus(*(_problem(slot.served) or ("loaded",)))
    reason = slot.progress if slot.loading else slot.failure
    return ModelStatus(slot.status, reason) if reason else ModelStatus(slot.status)


OPERATIONS = (
    Operation("GET", "/v1/models", "Names and states of the models", _models, answer=ModelsAnswer),
    Operation("GET", "/v1/models/{name:path}", "A model by a name", _model, answer=ModelAnswer),
    Operation("GET", "/health/live", "Is the process there", _live, answer=StatusAnswer),
    Operation("GET", "/health/ready", "Does it take requests", _ready, answer=StatusAnswer),
    Operation("GET", "/health", "The same, under vLLM's name", _ready, answer=StatusAnswer),
    Operation("GET", "/version", "The version of llama_jax", _version, answer=VersionAnswer),
    Operation("GET", "/engines", "The engines in numbers", _engines, answer=EnginesAnswer),
    Operation("GET", "/metrics", "Metrics in Prometheus's text format", _metrics),
)
