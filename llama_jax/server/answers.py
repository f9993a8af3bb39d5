"""Answers as described in /openapi.json. Those of generation are assembled elsewhere, and tests check them against
these types."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class ErrorDetail(msgspec.Struct):
    """A fault of a request; `param` names the field."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(msgspec.Struct):
    """The answer to a request that failed; `type` is there for Anthropic's clients only."""

    error: ErrorDetail
    type: Literal["error"] | msgspec.UnsetType = msgspec.UNSET


class ModelStatus(msgspec.Struct):
    """Where a model is; `reason` says how far it is loaded, or why it takes no requests."""

    value: Literal["unloaded", "loading", "loaded", "restarting", "failed", "stalled"]
    reason: str | msgspec.UnsetType = msgspec.UNSET


class ModelAnswer(msgspec.Struct):
    """A model by one of its names, or an adapter of it, whose `parent` is the model; `max_model_len` is null as long as
    it is not known."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int | None
    status: ModelStatus
    parent: str | msgspec.UnsetType = msgspec.UNSET


class ModelsAnswer(msgspec.Struct):
    """All names of all models."""

    object: Literal["list"]
    data: list[ModelAnswer]


class TokensAnswer(msgspec.Struct):
    """Token ids, and how many the model takes."""

    tokens: list[int]
    count: int
    max_model_len: int


class TextAnswer(msgspec.Struct):
    """A text that a model could be prompted with."""

    prompt: str


class TokenizerAnswer(msgspec.Struct):
    """The tokenizer's control tokens by their names, and the chat templates."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
    chat_templates: dict[str, str]


class CountAnswer(msgspec.Struct):
    """Count of the tokens that messages would be."""

    input_tokens: int


class StatusAnswer(msgspec.Struct):
    """State of the server, and why it takes no requests."""

    status: Literal["live", "ready", "draining", "restarting", "failed", "stalled"]
    reason: str | msgspec.UnsetType = msgspec.UNSET


class EnginesAnswer(msgspec.Struct):
    """The engines of loaded models in numbers, as `llama-jax top --json` has them; one that has failed is left out."""

    engines: list[dict[str, Any]]


class VersionAnswer(msgspec.Struct):
    """The version of llama_jax."""

    version: str


class OpenApiAnswer(msgspec.Struct):
    """A description in OpenAPI 3.1."""

    openapi: str
    info: dict[str, Any]
    paths: dict[str, Any]
    components: dict[str, Any]


# --- Generation


class PromptDetails(msgspec.Struct, forbid_unknown_fields=True):
    """Tokens of a prompt that were found in the prefix cache."""

    cached_tokens: int


class CompletionDetails(msgspec.Struct, forbid_unknown_fields=True):
    """Tokens of answers that are reasoning."""

    reasoning_tokens: int


class Usage(msgspec.Struct, forbid_unknown_fields=True):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class Timings(msgspec.Struct, forbid_unknown_fields=True):
    """Times of a single prompt and its tokens, in milliseconds and tokens a second, with llama.cpp's names."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float


class FunctionAnswer(msgspec.Struct, forbid_unknown_fields=True):
    """The tool that is called; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


class CallAnswer(msgspec.Struct, forbid_unknown_fields=True):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: FunctionAnswer


class MessageAnswer(msgspec.Struct, forbid_unknown_fields=True):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[CallAnswer] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, forbid_unknown_fields=True):
    """One answer to a chat."""

    index: int
    message: MessageAnswer
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None


class ChatAnswer(msgspec.Struct, forbid_unknown_fields=True):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings | msgspec.UnsetType = msgspec.UNSET


class CompletionChoice(msgspec.Struct, forbid_unknown_fields=True):
    """One continuation."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None


class CompletionAnswer(msgspec.Struct, forbid_unknown_fields=True):
    """Answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    timings: Timings | msgspec.UnsetType = msgspec.UNSET


class AnthropicUsage(msgspec.Struct, forbid_unknown_fields=True):
    """Counts of tokens; cached ones are no input."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessagesAnswer(msgspec.Struct, forbid_unknown_fields=True):
    """Answer of /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: AnthropicUsage


class ResponsesAnswer(msgspec.Struct):
    """Answer of /v1/responses; what the request said is in it, too."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any]
