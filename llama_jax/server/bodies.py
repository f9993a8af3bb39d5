"""Bodies of requests: their fields and types. The meaning and range of values is checked elsewhere."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from llama_jax.errors import RequestError
from llama_jax.server.fields import (
    Conversation,
    Effort,
    LogprobCount,
    MinP,
    NotNegative,
    Penalty,
    Positive,
    RepetitionPenalty,
    Seed,
    Share,
    Temperature,
    Tools,
    TopK,
)


class _Sampling(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields of both endpoints: OpenAI's, and those of `SamplingParams` that OpenAI lacks."""

    model: str | None = None
    n: Positive = None
    temperature: Temperature = None
    top_p: Share = None
    top_k: TopK = None
    min_p: MinP = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    repetition_penalty: RepetitionPenalty = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logits_processors: list[str] | None = None
    response_format: dict[str, Any] | None = None
    seed: Seed = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: NotNegative = None
    max_tokens: NotNegative = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Sent by clients, without effect here:
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Parts of a stream besides the text. `continuous_usage_stats`, of vLLM, has an effect only with the usage."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class ChatBody(_Sampling, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Conversation
    max_completion_tokens: Positive = None
    logprobs: bool | None = None
    top_logprobs: LogprobCount = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort = None
    modalities: list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(_Sampling, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: LogprobCount = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


class TokenizeBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Conversation | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    tools: Tools | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TemplateBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /apply-template."""

    messages: Conversation
    model: str | None = None
    add_generation_prompt: bool = True
    tools: Tools | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /detokenize."""

    tokens: list[int]
    model: str | None = None


def decoded[T](kind: type[T], data: bytes, depth: int) -> T:
    """Decode a body. If a key comes twice, the last value counts.

    Args:
      depth: the most levels of nested values.

    Raises:
      RequestError: it is not JSON, or has an unknown field or one of another type; names the field.
    """
    try:
        body = msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at ")
        field = re.search(r"unknown field `(.*)`|required field `(.*)`", message)
        param = (field[1] or field[2]) if field else path.strip("`").removeprefix("$").lstrip(".") or None
        name = f"{param}: " if param and not field else ""
        hint = "this endpoint has no such field here" if field and field[1] else "see docs/server.md"
        raise RequestError(f"{name}{message}", param=param or "body", hint=hint) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"the body is not JSON: {reason}", param="body", hint="send one JSON object") from None
    if _too_deep(body, depth):
        raise RequestError(f"the body is nested more than {depth} deep", param="body", hint="flatten it")
    return body


def given(body: msgspec.Struct) -> dict[str, Any]:
    """Return the given fields."""
    return {name: value for name in body.__struct_fields__ if (value := getattr(body, name)) is not None}


def _too_deep(body: Any, depth: int) -> bool:
    level = [getattr(body, name) for name in body.__struct_fields__]
    for _ in range(depth):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True
