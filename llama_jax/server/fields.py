"""Types of body fields, with their value ranges for /openapi.json. Values are checked elsewhere, with precise errors;
tests ensure that both agree."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from llama_jax.sampling import MAX_LOGPROBS
from llama_jax.text.chat import ROLES

JSON = dict[str, Any]


def _within(least: float | None = None, most: float | None = None, *, above: float | None = None) -> Meta:
    """Bounds of a number; `above` is exclusive."""
    bounds = {"minimum": least, "maximum": most, "exclusiveMinimum": above}
    return Meta(extra_json_schema={name: bound for name, bound in bounds.items() if bound is not None})


NotNegative = Annotated[int | None, _within(0)]
Positive = Annotated[int | None, _within(1)]
RequiredPositive = Annotated[int, _within(1)]
Temperature = Annotated[float | None, _within(0, 2)]
Share = Annotated[float | None, _within(most=1, above=0)]
MinP = Annotated[float | None, _within(0, 1)]
TopK = Annotated[int | None, _within(-1)]
Penalty = Annotated[float | None, _within(-2, 2)]
RepetitionPenalty = Annotated[float | None, _within(above=0)]
Seed = Annotated[int | None, _within(0, 2**64 - 1)]
LogprobCount = Annotated[int | None, _within(0, MAX_LOGPROBS)]
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
Effort = Annotated[str | None, Meta(extra_json_schema={"enum": [*EFFORTS, None]})]

_PARTS = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    },
}
_CALL = {
    "type": "object",
    "required": ["id", "function"],
    "properties": {
        "id": {"type": "string"},
        "function": {
            "type": "object",
            "required": ["name", "arguments"],
            "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}},
        },
    },
}
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": sorted(ROLES)},
        "content": {"anyOf": [{"type": "string"}, _PARTS, {"type": "null"}]},
        "tool_calls": {"anyOf": [{"type": "array", "items": _CALL}, {"type": "null"}]},
    },
}
_FUNCTION = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,128}$"}},
}
_TOOL = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {"type": {"const": "function"}, "function": _FUNCTION},
}
_TURN = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["user", "assistant"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
    },
}

Conversation = Annotated[list[JSON], Meta(extra_json_schema={"items": _MESSAGE, "minItems": 1})]
Turns = Annotated[list[JSON], Meta(extra_json_schema={"items": _TURN, "minItems": 1})]
Tools = Annotated[list[JSON], Meta(extra_json_schema={"items": _TOOL})]
