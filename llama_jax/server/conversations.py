"""Checked messages of a request, in the form that chat templates expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from llama_jax.errors import RequestError
from llama_jax.text.chat import check_messages


def text_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages in the form that templates expect.

    Joins content parts into one text, turns developer messages into system ones, arguments of calls into objects, and
    adds the tools' names to their results.

    Raises:
      RequestError: it is not a conversation, has parts other than text, or results of calls that were never made.
    """
    check_messages(messages)
    plain, names = [], dict[str, str]()
    for i, message in enumerate(messages):
        role = "system" if message["role"] == "developer" else message["role"]
        made = {**message, "role": role, "content": _content(message.get("content"), i)}
        calls = _calls(made.pop("tool_calls", None), i)
        if calls:
            made["tool_calls"] = calls
            names |= {call["id"]: call["function"]["name"] for call in calls}
        elif made["content"] is None and role != "assistant":
            raise _bad(f"message {i} has no content", "give a text")
        if role == "tool":
            made.setdefault("name", names.get(_called(message, names, i)))
        plain.append(made)
    return plain


def _content(content: Any, message: int) -> str | None:
    if isinstance(content, list):
        return "".join(_text(part, message) for part in content)
    if content is not None and not isinstance(content, str):
        raise _bad(f"the content of message {message} is {type(content).__name__}", "give a text")
    return content


def _text(part: Any, message: int) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
    raise _bad(f"message {message} has content that is not text", "this model reads text only")


def _calls(calls: Any, message: int) -> list[dict[str, Any]]:
    """Tool calls of an assistant's message."""
    made: list[dict[str, Any]] = []
    if calls is None:
        return made
    for call in calls if isinstance(calls, list) else [None]:
        match call:
            case {"id": str(name_of_call), "function": {"name": str(name), "arguments": str(arguments)}}:
                pass
            case _:
                raise _bad(
                    f"message {message} has a tool call of another shape",
                    'give {"id": ..., "type": "function", "function": {"name": ..., "arguments": "{...}"}}',
                )
        try:
            values = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            raise _bad(f"the arguments of a tool call in message {message} are not a JSON object", "give one") from None
        function = {"name": name, "arguments": values}
        made.append({"id": name_of_call, "type": "function", "function": function})
    return made


def _called(message: Mapping[str, Any], names: Mapping[str, str], number: int) -> str:
    """The id of the call whose result a message is."""
    called = message.get("tool_call_id")
    if not isinstance(called, str) or called not in names:
        what = (
            "no tool_call_id" if called is None else f"the tool_call_id {called!r:.100}, which no message before it has"
        )
        raise _bad(f"message {number} has {what}", "the results of calls follow the assistant's message with the calls")
    return called


def _bad(message: str, hint: str) -> RequestError:
    return RequestError(message, param="messages", hint=hint)
