"""OpenAI's Responses API (https://platform.openai.com/docs/api-reference/responses), stateless: nothing is kept
between requests, so each has the whole conversation."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from llama_jax.errors import RequestError
from llama_jax.server.answers import ResponsesAnswer
from llama_jax.server.apis.parts import Change, Changes, End, Part, end_of, parts_of, text_of
from llama_jax.server.asking import Asked
from llama_jax.server.bodies import ChatBody, StreamOptions
from llama_jax.server.errors import Failure
from llama_jax.server.fields import Positive, Share, Temperature
from llama_jax.server.sse import event


class ResponsesBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/responses."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    include: list[str] | None = None
    max_output_tokens: Positive = None
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    reasoning: dict[str, Any] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    temperature: Temperature = None
    text: dict[str, Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    top_p: Share = None
    truncation: str | None = None
    # Sent by clients, and without effect here:
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class Responses:
    """/v1/responses."""

    summary = "Answer a conversation, as OpenAI's responses do"
    body = ResponsesBody
    answer: type[msgspec.Struct] = ResponsesAnswer

    def asking(self, body: ResponsesBody) -> ChatBody:
        """See `Dialect`."""
        if body.previous_response_id is not None:
            raise _bad("previous_response_id", "no response is kept", "send the whole conversation as input")
        if body.truncation not in (None, "disabled"):
            raise _bad("truncation", "input is never cut", 'leave it out, or give "disabled"')
        if unknown := set(body.include or ()) - {"reasoning.encrypted_content"}:
            raise _bad("include", f"there is no {min(unknown)!r:.100} here", "leave it out")
        if body.stream_options is not None and not body.stream:
            raise _bad("stream_options", "stream_options without stream", 'give "stream": true')
        chat = ChatBody(messages=_messages(body))
        same = ("model", "temperature", "top_p", "stream", "parallel_tool_calls", "metadata", "store", "user")
        for name in (*same, "service_tier", "safety_identifier", "prompt_cache_key"):
            setattr(chat, name, getattr(body, name))
        chat.max_completion_tokens = body.max_output_tokens
        chat.stream_options = StreamOptions(include_usage=True) if body.stream else None
        chat.tools = None if body.tools is None else [_tool(tool, i) for i, tool in enumerate(body.tools)]
        match body.tool_choice:
            case {"type": "function", "name": str(name)}:
                chat.tool_choice = _function(name)
            case {"type": "allowed_tools", "mode": mode, "tools": [*tools]}:
                allowed = [_function(tool.get("name")) for tool in tools if isinstance(tool, dict)]
                chat.tool_choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": allowed}}
            case choice:
                chat.tool_choice = choice
        chat.response_format = _format(body.text or {})
        chat.reasoning_effort = (body.reasoning or {}).get("effort")
        return chat

    def whole(self, body: ResponsesBody, answer: dict[str, Any]) -> dict[str, Any]:
        """See `Dialect`."""
        output = _Output(answer["id"])
        end = end_of(answer)
        items = [output.item(part, i, _status(end)) for i, part in enumerate(parts_of(answer["choices"][0]["message"]))]
        return _response(body, answer, items, end)

    def events(self, body: ResponsesBody, asked: Asked) -> _Events:
        """See `Dialect`."""
        return _Events(body)

    def failed(self, failure: Failure, sent: int) -> bytes:
        """See `Dialect`."""
        error = failure.body["error"]
        told = {name: error[name] for name in ("code", "message", "param")}
        return event({"type": "error", "sequence_number": sent, **told}, "error")


class _Events:
    def __init__(self, body: ResponsesBody):
        self._body, self._changes, self._sent = body, Changes(), 0
        self._first: dict[str, Any] = {}
        self._items = list[dict[str, Any]]()

    def more(self, chunk: dict[str, Any]) -> Sequence[bytes]:
        changes = self._changes.more(chunk)
        if self._first:
            return self._told(changes)
        self._first, self._output = chunk, _Output(chunk["id"])
        begun = _response(self._body, chunk, [], None)
        names = ("response.created", "response.in_progress")
        return [*(self._event(name, response=begun) for name in names), *self._told(changes)]

    def end(self) -> Sequence[bytes]:
        last = self._told(self._changes.last())
        done = _response(self._body, self._first, self._items, self._changes.end)
        return [*last, self._event(f"response.{done['status']}", response=done)]

    def _told(self, changes: Iterable[Change]) -> list[bytes]:
        made = []
        for change in changes:
            made += [self._event(name, **data) for name, data in self._output.told(change, len(self._items))]
            if change.kind == "end":
                self._items.append(self._output.item(change.part, len(self._items), "completed"))
        return made

    def _event(self, name: str, /, **data: Any) -> bytes:
        self._sent += 1
        return event({"type": name, "sequence_number": self._sent - 1, **data}, name)


class _Output:
    """Items of one answer, whose ids derive from the answer's."""

    def __init__(self, name: str):
        self._name = name.partition("-")[2]

    def item(self, part: Part, number: int, status: str) -> dict[str, Any]:
        """An output item, with the contents of its part."""
        prefix = {"text": "msg", "reasoning": "rs", "call": "fc"}[part.kind]
        head = {"id": f"{prefix}_{self._name}{number:04d}", "status": status}
        if part.kind == "call":
            call = {"call_id": part.call_id, "name": part.name, "arguments": part.text}
            return {"type": "function_call", **head, **call}
        content = [_content(part)] if part.text else []
        if part.kind == "reasoning":
            return {"type": "reasoning", **head, "summary": [], "content": content}
        return {"type": "message", **head, "role": "assistant", "content": content}

    def told(self, change: Change, number: int) -> list[tuple[str, dict[str, Any]]]:
        """Events, by name and data, for a change."""
        part = change.part
        open_item = self.item(Part(part.kind, "", part.call_id, part.name), number, "in_progress")
        where: dict[str, Any] = {"item_id": open_item["id"], "output_index": number}
        if part.kind == "call":
            match change.kind:
                case "begin":
                    return [("response.output_item.added", {"output_index": number, "item": open_item})]
                case "more":
                    return [("response.function_call_arguments.delta", where | {"delta": change.text})]
            done = ("response.function_call_arguments.done", where | {"name": part.name, "arguments": part.text})
        else:
            where |= {"content_index": 0}
            name = "response.output_text" if part.kind == "text" else "response.reasoning_text"
            logprobs: dict[str, Any] = {"logprobs": []} if part.kind == "text" else {}
            match change.kind:
                case "begin":
                    return [
                        ("response.output_item.added", {"output_index": number, "item": open_item}),
                        ("response.content_part.added", where | {"part": _content(Part(part.kind))}),
                    ]
                case "more":
                    return [(f"{name}.delta", where | {"delta": change.text} | logprobs)]
            done = (f"{name}.done", where | {"text": part.text} | logprobs)
        ended = [("response.content_part.done", where | {"part": _content(part)})] if part.kind != "call" else []
        item = self.item(part, number, "completed")
        return [done, *ended, ("response.output_item.done", {"output_index": number, "item": item})]


def _content(part: Part) -> dict[str, Any]:
    if part.kind == "reasoning":
        return {"type": "reasoning_text", "text": part.text}
    return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": []}


def _status(end: End | None) -> str:
    if end is None:
        return "in_progress"
    return "incomplete" if end.finish_reason == "length" else "completed"


def _response(
    body: ResponsesBody, head: Mapping[str, Any], items: list[dict[str, Any]], end: End | None
) -> dict[str, Any]:
    """A response, with its end unless it is in progress."""
    incomplete = {"reason": "max_output_tokens"} if _status(end) == "incomplete" else None
    return {
        "id": f"resp_{head['id'].partition('-')[2]}",
        "object": "response",
        "created_at": head["created"],
        "completed_at": None if end is None else int(time.time()),
        "status": _status(end),
        "error": None,
        "incomplete_details": incomplete,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": head["model"],
        "output": items,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None, **(body.reasoning or {})},
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": body.text or {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None if end is None else _usage(end),
    }


def _usage(end: End) -> dict[str, Any]:
    usage = end.usage
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": usage["total_tokens"],
    }


# --- Requests


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        return [*made, {"role": "user", "content": body.input}]
    for i, item in enumerate(body.input):
        match item:
            case {"type": "function_call", "call_id": str(called), "name": str(name), "arguments": str(arguments)}:
                function = {"name": name, "arguments": arguments}
                _assistant(made).setdefault("tool_calls", []).append(
                    {"id": called, "type": "function", "function": function}
                )
            case {"type": "function_call_output", "call_id": str(called), "output": output}:
                made.append({"role": "tool", "tool_call_id": called, "content": _text(output, i)})
            case {"type": "reasoning"}:
                if thought := text_of(item.get("content") or "", ("reasoning_text", "text"), f"item {i}", "input"):
                    made.append({"role": "assistant", "content": "", "reasoning_content": thought})
            case {"role": "assistant", "content": content} if item.get("type", "message") == "message":
                last = _assistant(made)
                last["content"] = (last["content"] or "") + _text(content, i)
            case {"role": str(role), "content": content} if item.get("type", "message") == "message":
                made.append({"role": role, "content": _text(content, i)})
            case _:
                raise _bad("input", f"item {i} is none that is known here", "give messages, calls and their outputs")
    return made


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's last message, into which reasoning, text and calls of one answer are merged."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _text(content: Any, item: int) -> str:
    return text_of(content, ("input_text", "output_text", "text"), f"item {item}", "input")


def _tool(tool: Mapping[str, Any], number: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise _bad("tools", f"tool {number} is not a function", "tools are those that the client calls")
    function = {
        name: tool[name] for name in ("name", "description", "parameters", "strict") if tool.get(name) is not None
    }
    return {"type": "function", "function": function}


def _function(name: Any) -> dict[str, Any]:
    """A tool in the format of chats."""
    return {"type": "function", "function": {"name": name}}


def _format(text: Mapping[str, Any]) -> dict[str, Any] | None:
    match text.get("format"):
        case {"type": "json_schema", "schema": dict(schema)}:
            return {"type": "json_schema", "json_schema": {"schema": schema}}
        case None:
            return None
        case {"type": "text" | "json_object" as kind}:
            return {"type": kind}
    raise _bad(
        "text", "the format of text is none that is known", 'give "type": "text", "json_object" or "json_schema"'
    )


def _bad(param: str, message: str, hint: str) -> RequestError:
    return RequestError(message, param=param, hint=hint)
