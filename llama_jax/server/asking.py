"""Translation of bodies into what the engine is asked: sampling parameters and token ids. Long prompts take long."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_jax.batch_file.openai_endpoints import NO_EFFECT, Chat, Completions
from llama_jax.batch_file.request import sampling_fields
from llama_jax.errors import RequestError
from llama_jax.generation import encode_prompt
from llama_jax.sampling import SamplingParams
from llama_jax.server.bodies import ChatBody, CompletionBody, given
from llama_jax.server.errors import Refused
from llama_jax.server.served import Served
from llama_jax.server.settings import Limits
from llama_jax.text.chat import check_messages, encode_chat


@dataclass(frozen=True)
class Asked:
    """Wishes of a client.

    Attributes:
      endpoint: how the choices look; prompts: token ids of each.
      streamed: whether it reads as the text comes; usage: whether a stream ends with the counts of tokens.
      ignored: fields that were given and have no effect; a header of the answer names them.
    """

    endpoint: Chat | Completions
    prompts: tuple[list[int], ...]
    params: SamplingParams
    streamed: bool = False
    usage: bool = False
    ignored: tuple[str, ...] = ()


def asked(served: Served, body: ChatBody | CompletionBody) -> Asked:
    """Return what a body asks for.

    Raises:
      RequestError, Refused: a value is out of range, or too long for the model; names the field.
      TemplateError, TokenizerError: the messages or the prompt cannot be encoded.
    """
    served.check_model(body.model)
    fields = given(body)
    streamed, options = fields.pop("stream", False), fields.pop("stream_options", None)
    if options is not None and not streamed:
        raise RequestError("stream_options without stream", param="stream_options", hint='give "stream": true')
    ignored = tuple(name for name in fields if name in NO_EFFECT and name != "model")
    _check_limits(fields, served.settings.limits)
    endpoint, ours = _endpoint(body, fields)
    chat = isinstance(endpoint, Chat)
    params = SamplingParams(**({"max_tokens": None} if chat else {}) | sampling_fields(ours))
    if not (isinstance(endpoint, Completions) and endpoint.echo):
        params.check_generates("an answer")
    if streamed and params.prompt_logprobs is not None:
        raise RequestError("a stream cannot echo logprobs", param="echo", hint="leave out stream, echo or logprobs")
    prompts = tuple(_prompts(served, endpoint, ours, params))
    if len(prompts) > served.settings.limits.prompts:
        raise _too_many("prompt", len(prompts), served.settings.limits.prompts, "prompts")
    params = _within(served, max(map(len, prompts)), params, limited="max_tokens" in ours)
    return Asked(endpoint, prompts, params, streamed, options is not None and options.include_usage, ignored)


def text_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as templates know them: content that came in parts is one text, and a developer is the system.

    Raises:
      RequestError: it is no conversation, or has parts that are no text.
    """
    check_messages(messages)
    plain = []
    for i, message in enumerate(messages):
        role = "system" if message["role"] == "developer" else message["role"]
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_text(part, i) for part in content)
        elif content is not None and not isinstance(content, str):
            kind = type(content).__name__
            raise RequestError(f"the content of message {i} is {kind}", param="messages", hint="give a text")
        if content is None and role != "assistant":
            raise RequestError(f"message {i} has no content", param="messages", hint="give a text")
        plain.append({**message, "role": role, "content": content})
    return plain


def _text(part: Any, message: int) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
    raise RequestError(
        f"message {message} has content that is no text", param="messages", hint="this model reads text only"
    )


def _check_limits(fields: Mapping[str, Any], limits: Limits) -> None:
    if fields.get("n", 1) > limits.n:
        raise _too_many("n", fields["n"], limits.n, "continuations")
    stop = fields.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if len(stops) > limits.stops:
        raise _too_many("stop", len(stops), limits.stops, "stop strings")
    if any(len(text) > limits.stop_chars for text in stops):
        raise RequestError(
            f"a stop string of more than {limits.stop_chars} characters", param="stop", hint="shorten it"
        )


def _too_many(param: str, count: int, most: int, what: str) -> RequestError:
    return RequestError(f"{count} {what}; there may be {most}", param=param, hint="send several requests")


def _endpoint(body: ChatBody | CompletionBody, fields: dict[str, Any]) -> tuple[Chat | Completions, dict[str, Any]]:
    """The endpoint and the fields that it leaves, by the names of `SamplingParams`."""
    if isinstance(body, CompletionBody):
        if fields.pop("best_of", None) not in (None, fields.get("n", 1)):
            raise RequestError("best_of differs from n", param="best_of", hint="leave it out")
        return Completions.of(fields)
    if fields.pop("tools", None):
        raise RequestError("this server calls no tools yet", param="tools", hint="leave them out")
    if fields.get("tool_choice") == "none":
        del fields["tool_choice"]
    return Chat.of(fields)


def _prompts(
    served: Served, endpoint: Chat | Completions, fields: Mapping[str, Any], params: SamplingParams
) -> list[list[int]]:
    if isinstance(endpoint, Chat):
        return [encode_chat(served.tokenizer, text_messages(fields["messages"]))]
    prompts = endpoint.prompts(fields, params)
    assert isinstance(prompts, Sequence)
    return [encode_prompt(served.tokenizer, prompt) for prompt in prompts]


def _within(served: Served, longest: int, params: SamplingParams, *, limited: bool) -> SamplingParams:
    """The parameters with a limit that there is room for behind the longest prompt."""
    room = served.capacity - longest
    wanted = params.max_tokens or 0 if limited or params.max_tokens == 0 else 1
    if wanted > room:
        raise Refused(
            400,
            f"{longest} tokens of the prompt and {wanted} new ones; together they may be {served.capacity}",
            code="context_length_exceeded",
            param="max_tokens" if limited and room > 0 else "prompt",
            hint="shorten the prompt, or ask for fewer tokens",
        )
    if limited or params.max_tokens == 0:
        return params
    return dataclasses.replace(params, max_tokens=min(room, params.max_tokens or room))
