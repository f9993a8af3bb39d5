"""The required form of a text, as requests specify it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from llama_jax.errors import RequestError

_Kind = Literal["json_schema", "regex", "lark"]


@dataclass(frozen=True)
class Grammar:
    """A JSON schema, a regular expression or a Lark grammar, in the dialects of llguidance.

    https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md, and json_schema.md in the same folder

    Attributes:
      text: the schema as JSON, the expression, or the grammar.
    """

    kind: _Kind
    text: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(_Kind):
            raise _bad(f"a grammar of kind {self.kind!r}", f"the kinds are {', '.join(get_args(_Kind))}")
        if not isinstance(self.text, str):
            raise _bad(f"a grammar's text is {type(self.text).__name__}", "give a string")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Self:
        """JSON that matches a schema, with properties in the schema's order and without whitespace between parts.

        Args:
          schema: an object, or the text of one.

        Raises:
          RequestError: it is not JSON.
        """
        if isinstance(schema, Mapping):
            try:
                schema = json.dumps(schema, allow_nan=False, ensure_ascii=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise _bad(
                    f"the schema of response_format is not JSON: {error}", "give a dict of JSON values"
                ) from None
        return cls("json_schema", schema)

    @classmethod
    def json_object(cls) -> Self:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, expression: str) -> Self:
        """A text that the whole expression matches."""
        return cls("regex", expression)

    @classmethod
    def lark(cls, grammar: str) -> Self:
        """A text of a context-free grammar, whose rule `start` is the whole text."""
        return cls("lark", grammar)

    @property
    def request(self) -> dict[str, Any]:
        """The `response_format` of this grammar (see `of`)."""
        if self.kind == "json_schema":
            return {"type": "json_schema", "json_schema": {"name": "answer", "schema": json.loads(self.text)}}
        return {"type": "grammar", "syntax": self.kind, "definition": self.text}

    @classmethod
    def of(cls, response_format: Any) -> Self | None:
        """The grammar of a `response_format` in OpenAI's shapes; None for any text.

        `{"type": "text"}`, `{"type": "json_object"}`, `{"type": "json_schema", "json_schema": {"schema": {...}}}`, and
        as for OpenAI's custom tools `{"type": "grammar", "syntax": "regex" or "lark", "definition": "..."}`.

        Raises:
          RequestError: it is none of these.
        """
        if response_format is None or isinstance(response_format, cls):
            return response_format
        if not isinstance(response_format, Mapping):
            raise _bad(f"response_format is {type(response_format).__name__}", "give an object or a Grammar")
        match response_format:
            case {"type": "text"}:
                return None
            case {"type": "json_object"}:
                return cls.json_object()
            case {"type": "json_schema", "json_schema": {"schema": Mapping() as schema}}:
                return cls.json_schema(schema)
            case {"type": "grammar", "syntax": "regex" | "lark" as syntax, "definition": str(definition)}:
                return cls(syntax, definition)
        raise _bad(
            f"response_format has type {response_format.get('type')!r} and keys {sorted(map(str, response_format))}",
            'give {"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {...}}} '
            'or {"type": "grammar", "syntax": "regex" or "lark", "definition": "..."}',
        )


def _bad(message: str, hint: str) -> RequestError:
    return RequestError(message, param="response_format", hint=hint)
