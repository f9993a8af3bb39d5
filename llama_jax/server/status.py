"""Operations that tell of the server itself."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from llama_jax import __version__
from llama_jax.errors import EngineFailed
from llama_jax.server.answers import ModelAnswer, ModelsAnswer, StatusAnswer, VersionAnswer
from llama_jax.server.operations import Operation
from llama_jax.server.responses import json_response
from llama_jax.server.served import Served


def readiness(served: Served) -> StatusAnswer:
    """Return what the server is; with a reason where it takes no requests."""
    if served.life.draining:
        return StatusAnswer("draining", "the server is about to end")
    try:
        served.engine.snapshot()
    except EngineFailed as error:
        return StatusAnswer("restarting" if served.engine.restarting else "failed", str(error))
    if (age := served.engine.step_age_s) > served.settings.limits.step_s:
        return StatusAnswer("stalled", f"the device has worked at one step for {age:.0f} s")
    return StatusAnswer("ready")


async def _live(served: Served, request: Request) -> Response:
    return json_response(StatusAnswer("live"))


async def _ready(served: Served, request: Request) -> Response:
    answer = readiness(served)
    return json_response(answer, 200 if answer.status == "ready" else 503)


async def _version(served: Served, request: Request) -> Response:
    return json_response(VersionAnswer(__version__))


async def _metrics(served: Served, request: Request) -> Response:
    return Response(served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _models(served: Served, request: Request) -> Response:
    return json_response(ModelsAnswer("list", [_named(served, name) for name in served.names]))


async def _model(served: Served, request: Request) -> Response:
    name = request.path_params["name"]
    served.check_model(name)
    return json_response(_named(served, name))


def _named(served: Served, name: str) -> ModelAnswer:
    return ModelAnswer(name, "model", served.created, "llama-jax", served.names[0], served.capacity)


OPERATIONS = (
    Operation("GET", "/v1/models", "Names of the model", _models, answer=ModelsAnswer),
    Operation("GET", "/v1/models/{name:path}", "The model by a name", _model, answer=ModelAnswer),
    Operation("GET", "/health/live", "Is the process there", _live, answer=StatusAnswer),
    Operation("GET", "/health/ready", "Does it take requests", _ready, answer=StatusAnswer),
    Operation("GET", "/version", "The version of llama_jax", _version, answer=VersionAnswer),
    Operation("GET", "/metrics", "Metrics in Prometheus's text format", _metrics),
)
