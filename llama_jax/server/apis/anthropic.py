"""Anthropic's Messages API (https://docs.anthropic.com/en/api/messages)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from llama_jax.errors import RequestError
from llama_jax.server.answers import MessagesAnswer
from llama_jax.server.apis.parts import Change, Changes, End, Part, end_of, parts_of, text_of
from llama_jax.server.asking import Asked
from llama_jax.server.bodies import ChatBody, StreamOptions
from llama_jax.server.errors import Failure, anthropic_body
from llama_jax.server.fields import RequiredPositive, Share, Temperature, TopK, Turns
from llama_jax.server.sse import event


class CountBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/messages/count_tokens."""

    model: str
    messages: Turns
    system: str | list[dict[str, Any]] | None = None
    thinking: dict[str, Any] | None = None
    tool_choice: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    output_config: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None  # prefixes are cached in any case


class MessagesBody(CountBody, kw_only=True):
    """Body of POST /v1/messages."""

    max_tokens: RequiredPositive
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Temperature = None
    top_k: TopK = None
    top_p: Share = None


def chat_of(body: CountBody) -> ChatBody:
    """Return the chat for a body.

    Raises:
      RequestError: OpenAI's API, or this server, has no equivalent.
    """
    chat = ChatBody(model=body.model, messages=_messages(body))
    if body.tools:
        chat.tools = [_tool(tool, i) for i, tool in enumerate(body.tools)]
    if body.tool_choice is not None:
        chat.tool_choice = _tool_choice(body.tool_choice)
        chat.parallel_tool_calls = body.tool_choice.get("disable_parallel_tool_use") is not True
    if body.thinking is not None:
        chat.chat_template_kwargs = {"enable_thinking": body.thinking.get("type") != "disabled"}
    match (body.output_config or {}).get("format"):
        case None:
            pass
        case {"type": "json_schema", "schema": dict(schema)}:
            chat.response_format = {"type": "json_schema", "json_schema": {"schema": schema}}
        case _:
            raise RequestError(
                "the format is not a JSON schema", param="output_config", hint='give "type": "json_schema"'
            )
    if isinstance(body, MessagesBody):
        chat.max_tokens, chat.temperature, chat.stop = body.max_tokens, body.temperature, body.stop_sequences
        chat.top_k, chat.top_p, chat.metadata = body.top_k, body.top_p, body.metadata
        chat.service_tier, chat.stream = body.service_tier, body.stream
        chat.stream_options = StreamOptions(include_usage=True) if body.stream else None
    return chat


class Messages:
    """/v1/messages."""

    summary = "Answer a conversation, as Anthropic's API does"
    body = MessagesBody
    answer: type[msgspec.Struct] = MessagesAnswer

    def asking(self, body: MessagesBody) -> ChatBody:
        """See `Dialect`."""
        return chat_of(body)

    def whole(self, body: MessagesBody, answer: dict[str, Any]) -> dict[str, Any]:
        """See `Dialect`."""
        end = end_of(answer)
        content = [_block(part) for part in parts_of(answer["choices"][0]["message"])]
        return _message(answer, content) | _ending(end) | {"usage": _usage(end)}

    def events(self, body: MessagesBody, asked: Asked) -> _Events:
        """See `Dialect`. The number of cached prompt tokens is known only at the end."""
        return _Events(len(asked.prompts[0]))

    def failed(self, failure: Failure, sent: int) -> bytes:
        """See `Dialect`."""
        return event(anthropic_body(failure), "error")


class _Events:
    def __init__(self, prompt_tokens: int):
        self._prompt_tokens, self._index, self._changes, self._begun = prompt_tokens, -1, Changes(), False

    def more(self, chunk: dict[str, Any]) -> Sequence[bytes]:
        made = self._told(self._changes.more(chunk))
        if self._begun:
            return made
        self._begun = True
        message = _message(chunk, []) | {"stop_reason": None, "stop_sequence": None}
        counts = {"input_tokens": self._prompt_tokens, "output_tokens": 0}
        return [_event("message_start", message=message | {"usage": counts}), *made]

    def end(self) -> Sequence[bytes]:
        end = self._changes.end
        last = _event("message_delta", delta=_ending(end), usage=_usage(end))
        return [*self._told(self._changes.last()), last, _event("message_stop")]

    def _told(self, changes: Iterable[Change]) -> list[bytes]:
        made = []
        for change in changes:
            self._index += change.kind == "begin"
            made.append(_changed(change, self._index))
        return made


def _changed(change: Change, index: int) -> bytes:
    part = change.part
    match change.kind, part.kind:
        case "begin", "call":
            block: dict[str, Any] = {"type": "tool_use", "id": part.call_id, "name": part.name, "input": {}}
            return _event("content_block_start", index=index, content_block=block)
        case "begin", _:
            return _event("content_block_start", index=index, content_block=_block(Part(part.kind)))
        case "more", "call":
            delta = {"type": "input_json_delta", "partial_json": change.text}
        case "more", "reasoning":
            delta = {"type": "thinking_delta", "thinking": change.text}
        case "more", _:
            delta = {"type": "text_delta", "text": change.text}
        case _:
            return _event("content_block_stop", index=index)
    return _event("content_block_delta", index=index, delta=delta)


def _event(name: str, **data: Any) -> bytes:
    return event({"type": name, **data}, name)


def _message(head: Mapping[str, Any], content: list[dict[str, Any]]) -> dict[str, Any]:
    name = head["id"].partition("-")[2]
    return {"id": f"msg_{name}", "type": "message", "role": "assistant", "model": head["model"], "content": content}


def _block(part: Part) -> dict[str, Any]:
    if part.kind == "text":
        return {"type": "text", "text": part.text}
    if part.kind == "reasoning":
        return {"type": "thinking", "thinking": part.text, "signature": ""}
    try:  # values are kept as text
        values: Any = msgspec.json.decode(part.text, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:  # it was cut off, as stop_reason tells
        values = {}
    return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": values}


def _ending(end: End) -> dict[str, Any]:
    reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
    if end.finish_reason == "stop" and isinstance(end.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": end.stop_reason}
    return {"stop_reason": reasons.get(end.finish_reason, "end_turn"), "stop_sequence": None}


def _usage(end: End) -> dict[str, int]:
    """Token counts; cached tokens do not count as input here."""
    cached = end.usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": end.usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": end.usage["completion_tokens"],
    }


# --- Requests


def _messages(body: CountBody) -> list[dict[str, Any]]:
    made = [{"role": "system", "content": _text(body.system, "system")}] if body.system else []
    for i, message in enumerate(body.messages):
        content = message.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
            raise _bad(f"message {i} has no content", "give a text or a list of blocks")
        match message.get("role"):
            case "user":
                made += _of_user(blocks, i)
            case "assistant" if i < len(body.messages) - 1:
                made.append(_of_assistant(blocks, i))
            case "assistant":
                raise _bad(
                    "the last message is the assistant's", "an answer cannot be begun for it; end with the user's"
                )
            case role:
                raise _bad(f"message {i} has the role {role!r:.100}", 'give "user" or "assistant"')
    return made


def _of_user(blocks: Sequence[Mapping[str, Any]], number: int) -> Iterator[dict[str, Any]]:
    """Messages for the user's blocks: each tool result becomes a separate one."""
    text: list[Mapping[str, Any]] = []
    for block in blocks:
        if block.get("type") == "tool_result":
            result = _text(block.get("content") or "", f"a tool result in message {number}")
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": result}
        else:
            text.append(block)
    if text or not blocks:
        yield {"role": "user", "content": _text(text, f"message {number}")}


def _of_assistant(blocks: Sequence[Mapping[str, Any]], number: int) -> dict[str, Any]:
    text, calls, thinking = [], [], ""
    for block in blocks:
        match block:
            case {"type": "tool_use", "id": str(name_of_call), "name": str(name), "input": dict(values)}:
                function = {"name": name, "arguments": json.dumps(values)}
                calls.append({"id": name_of_call, "type": "function", "function": function})
            case {"type": "thinking", "thinking": str(thought)}:
                thinking += thought
            case {"type": "redacted_thinking"}:
                pass  # from another model
            case _:
                text.append(block)
    made: dict[str, Any] = {"role": "assistant", "content": _text(text, f"message {number}")}
    if thinking:
        made["reasoning_content"] = thinking
    return made | ({"tool_calls": calls} if calls else {})


def _text(content: Any, where: str) -> str:
    return text_of(content, ("text",), where, "messages")


def _tool(tool: Mapping[str, Any], number: int) -> dict[str, Any]:
    match tool:
        case {"name": str(name), "input_schema": dict(schema)} if tool.get("type") in (None, "custom"):
            function = {"name": name, "description": tool.get("description"), "parameters": schema}
            strict = {"strict": True} if tool.get("strict") is True else {}
            return {"type": "function", "function": {k: v for k, v in function.items() if v is not None} | strict}
    raise RequestError(
        f"tool {number} is none that the client calls", param="tools", hint='give {"name": ..., "input_schema": ...}'
    )


def _tool_choice(choice: Mapping[str, Any]) -> str | dict[str, Any]:
    match choice:
        case {"type": "auto" | "none" as same}:
            return same
        case {"type": "any"}:
            return "required"
        case {"type": "tool", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
    raise RequestError(
        "tool_choice has no known type", param="tool_choice", hint='its "type" is "auto", "any", "tool" or "none"'
    )


def _bad(message: str, hint: str) -> RequestError:
    return RequestError(message, param="messages", hint=hint)
