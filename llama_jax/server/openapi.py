"""The server's description in OpenAPI 3.1 (https://spec.openapis.org/oas/v3.1.0), made of its operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from llama_jax import __version__
from llama_jax.server.answers import ErrorAnswer, OpenApiAnswer
from llama_jax.server.guard import OPEN
from llama_jax.server.operations import Operation

_KEY = {"type": "http", "scheme": "bearer", "description": "The header x-api-key does as well."}


_EVENT = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}


def document(operations: Sequence[Operation], names: Sequence[str], *, keys: bool) -> OpenApiAnswer:
    """Return the description of operations.

    Args:
      names: of the model; keys: whether the server asks for a key.
    """
    kinds: set[type] = {kind for each in operations for kind in (each.body, each.answer) if kind is not None}
    ordered = sorted({*kinds, ErrorAnswer}, key=lambda kind: kind.__name__)
    schemas, components = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    schema = dict(zip(ordered, schemas, strict=True))
    for part in components.values():
        if "model" in part["properties"] and part.get("additionalProperties") is False:
            part["properties"]["model"] = {"enum": [*names, *([] if "model" in part.get("required", ()) else [None])]}
    paths: dict[str, Any] = {}
    for operation in operations:
        name = operation.path.replace(":path}", "}")
        paths.setdefault(name, {})[operation.method.lower()] = _described(operation, schema, names, keys)
    parts = {"schemas": components, **({"securitySchemes": {"key": _KEY}} if keys else {})}
    return OpenApiAnswer("3.1.0", {"title": "llama_jax", "version": __version__}, paths, parts)


def _described(operation: Operation, schema: dict[Any, Any], names: Sequence[str], keys: bool) -> dict[str, Any]:
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
        "operationId": operation.path.replace(":path}", "}").strip("/").replace("/", "."),
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
    if "{name" in operation.path:
        made["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"enum": [*names]}}]
    if operation.body is not None:
        body = {"application/json": {"schema": schema[operation.body]}}
        made["requestBody"] = {"required": True, "content": body}
    return made
