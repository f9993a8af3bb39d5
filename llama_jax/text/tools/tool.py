"""Tools that a request offers to a model, in OpenAI's shape."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_jax.errors import RequestError

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Tool:
    """A function that the client can call.

    Attributes:
      parameters: the JSON schema of its arguments object.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=lambda: NO_PARAMETERS)


def tools_of(given: Sequence[Mapping[str, Any]]) -> tuple[Tool, ...]:
    """Return the tools of a request: `{"type": "function", "function": {"name", "description", "parameters"}}` each.

    Raises:
      RequestError: one has another shape, an invalid name, or the name of another.
    """
    made: dict[str, Tool] = {}
    for i, tool in enumerate(given):
        match tool:
            case {"type": "function", "function": {"name": str(name), **rest}}:
                pass
            case _:
                raise _bad(f"tool {i} is not a function", 'give {"type": "function", "function": {"name": ...}}')
        if not _NAME.fullmatch(name):
            raise _bad(f"tool {i} has the name {name!r:.100}", "use letters, digits, _, . and -, at most 128")
        if name in made:
            raise _bad(f"two tools are called {name!r}", "give each a name of its own")
        parameters = rest.get("parameters")
        if parameters is None:
            parameters = NO_PARAMETERS
        if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
            raise _bad(f"the parameters of {name!r} are not a schema of an object", 'give {"type": "object", ...}')
        made[name] = Tool(name, parameters)
    return tuple(made.values())


def _bad(message: str, hint: str) -> RequestError:
    return RequestError(message, param="tools", hint=hint)
