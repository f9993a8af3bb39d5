"""The server's description in OpenAPI 3.1 (https://spec.openapis.org/oas/v3.1.0), made of its operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.routing import compile_path

from llama_jax import __version__
from llama_jax.server.answers import ErrorAnswer, OpenApiAnswer
from llama_jax.server.guard import OPEN
from llama_jax.server.operations import Operation

_KEY = {"type": "http", "scheme": "bearer", "description": "The header x-api-key does as well."}


_EVENT = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}


def document(operations: Sequence[Operation], names: Sequence[str], *, keys: bool) -> OpenApiAnswer:
    """Return the description of operations.

    Args:
      names: of the models; keys: whether the server requires a key.
    """
    kinds: set[type] = {kind for each in operations for kind in (each.body, each.answer) if kind is not None}
    ordered = sorted({*kinds, ErrorAnswer}, key=lambda kind: kind.__name__)
    schemas, components = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    schema = dict(zip(ordered, schemas, strict=True))
    for part in components.values():
        if "model" in part.get("properties", ()) and part.get("additionalProperties") is False:
            part["properties"]["model"] = {"enum": [*names, *([] if "model" in part.get("required", ()) else [None])]}
    paths: dict[str, Any] = {}
    for operation in operations:
        _, name, variables = compile_path(operation.path)
        made = _described(operation, schema, keys)
        if variables:
            made["parameters"] = [_variable(variable, names) for variable in variables]
        paths.setdefault(name, {})[operation.method.lower()] = made
    parts = {"schemas": components, **({"securitySchemes": {"key": _KEY}} if keys else {})}
    return OpenApiAnswer("3.1.0", {"title": "llama_jax", "version": __version__}, paths, parts)


def _variable(name: str, models: Sequence[str]) -> dict[str, Any]:
    """A path parameter; `name` is that of a model."""
    schema: dict[str, Any] = {"enum": [*models]} if name == "name" else {"type": "string"}
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _described(operation: Operation, schema: dict[Any, Any], keys: bool) -> dict[str, Any]:
    if operation.answer is None:
        content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": schema[operation.answer]}}
    if operation.streams:
        content["text/event-stream"] = {"schema": _EVENT}
    error = {"application/json": {"schema": schema[ErrorAnswer]}}
    if operation.path in OPEN:
        error = content  # the reason is in it
    made: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": compile_path(operation.path)[1].strip("/").replace("/", "."),
        "responses": {
            "200": {"description": "The answer", "content": content},
            "4XX": {
                "description": "The request is wrong",
                "content": {"application/json": {"schema": schema[ErrorAnswer]}},
            },
            "5XX": {"description": "The server cannot answer", "content": error},
        },
    }
    if keys and operation.path not in OPEN:
        made["security"] = [{"key": []}]
    if operation.body is not None:
        body = {"application/json": {"schema": schema[operation.body]}}
        made["requestBody"] = {"required": True, "content": body}
    return made
