"""The endpoints of OpenAI's API that a batch line may name: translation of their fields and choices.

Source: https://platform.openai.com/docs/api-reference (chat/create, completions/create). Fields that ask for
unsupported features are refused by name; fields of SamplingParams that OpenAI lacks (top_k, min_p, ...) are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from llama_jax.batch_file.records import Record
from llama_jax.batch_file.request import FIELDS, Conversation, conversation, is_ids
from llama_jax.errors import RequestError
from llama_jax.generation.openai_shapes import CompletionLogprobs, chat_logprobs
from llama_jax.generation.outputs import CompletionOutput, RequestOutput
from llama_jax.sampling import SamplingParams
from llama_jax.text.tokenizer import Tokenizer

_SAMPLING = {*FIELDS} - {"prompt_logprobs"}
NO_EFFECT = {"model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
"""Fields without influence on the text."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "modalities": (["text"],),
    "tool_choice": ("auto",),
    "parallel_tool_calls": (True, False),
    "best_of": (1,),
    "suffix": ("",),
}
"""Fields of which only these values are supported."""


class Endpoint(Protocol):
    """A request of one kind, and the format of its answer.

    Attributes:
      prefix: of the answer's id; object: kind of the answer.
    """

    prefix: ClassVar[str]
    object: ClassVar[str]

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """The endpoint for a body without nulls, and the body with names of SamplingParams. Raises RequestError."""
        ...

    def prompts(self, body: Mapping[str, Any], params: SamplingParams) -> Sequence[str | Sequence[int]] | Conversation:
        """The prompts, or the conversation to answer. Raises RequestError."""
        ...

    def choice(
        self, output: RequestOutput, completion: CompletionOutput, params: SamplingParams, tokenizer: Tokenizer
    ) -> Record:
        """One entry of "choices", without its index."""
        ...


@dataclass(frozen=True)
class Chat:
    """/v1/chat/completions."""

    prefix: ClassVar[str] = "chatcmpl"
    object: ClassVar[str] = "chat.completion"

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """See `Endpoint`."""
        _check_names(body, {"messages", "tools", "max_completion_tokens", "top_logprobs"})
        ours = dict(body)
        limit = ours.pop("max_completion_tokens", None)
        if limit is not None and ours.setdefault("max_tokens", limit) != limit:
            raise RequestError(
                "max_tokens and max_completion_tokens differ", param="max_completion_tokens", hint="give one of them"
            )
        wanted, top = ours.pop("logprobs", False), ours.pop("top_logprobs", None)
        if not isinstance(wanted, bool):
            raise RequestError("logprobs must be true or false", param="logprobs", hint="top_logprobs is the number")
        if top is not None and not wanted:
            raise RequestError("top_logprobs needs logprobs", param="top_logprobs", hint='give "logprobs": true')
        return cls(), ours | ({"logprobs": top or 0} if wanted else {})

    def prompts(self, body: Mapping[str, Any], params: SamplingParams) -> Sequence[str | Sequence[int]] | Conversation:
        """See `Endpoint`."""
        return conversation(body.get("messages"), params, tools=body.get("tools"))

    def choice(
        self, output: RequestOutput, completion: CompletionOutput, params: SamplingParams, tokenizer: Tokenizer
    ) -> Record:
        """See `Endpoint`. Text that looks like a tool call stays text."""
        logprobs = None
        if completion.logprobs is not None and params.logprobs is not None:
            logprobs = chat_logprobs(tokenizer, completion.logprobs, params.logprobs)
        return {
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
        }


@dataclass(frozen=True)
class Completions:
    """/v1/completions.

    Attributes:
      echo: whether the text and its log-probabilities begin with the prompt.
    """

    echo: bool = False
    prefix: ClassVar[str] = "cmpl"
    object: ClassVar[str] = "text_completion"

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """See `Endpoint`."""
        _check_names(body, {"prompt", "echo"})
        echo = body.get("echo", False)
        if not isinstance(echo, bool):
            raise RequestError("echo must be true or false", param="echo", hint="true repeats the prompt")
        scored = {"prompt_logprobs": body["logprobs"]} if echo and "logprobs" in body else {}
        return cls(echo), {**body, **scored}

    def prompts(self, body: Mapping[str, Any], params: SamplingParams) -> Sequence[str | Sequence[int]] | Conversation:
        """See `Endpoint`: one text or list of ids, or a list of such."""
        given = body.get("prompt")
        several: list[Any] = given if isinstance(given, list) and given and not is_ids(given) else [given]
        if not all(isinstance(prompt, str) or (is_ids(prompt) and prompt) for prompt in several):
            raise RequestError(
                "the prompt must be a text, a list of token ids, or a list of such",
                param="prompt",
                hint='e.g. "prompt": "Once upon a time"',
            )
        return several

    def choice(
        self, output: RequestOutput, completion: CompletionOutput, params: SamplingParams, tokenizer: Tokenizer
    ) -> Record:
        """See `Endpoint`."""
        before = output.prompt_token_ids if self.echo else ()
        logprobs = None
        if completion.logprobs is not None:
            entries = [*((output.prompt_logprobs or ()) if self.echo else ()), *completion.logprobs]
            of = CompletionLogprobs(tokenizer, params.logprobs or 0, () if self.echo else output.prompt_token_ids)
            logprobs = of([*before, *completion.token_ids], entries)
        return {
            "text": (tokenizer.decode(before) if self.echo else "") + completion.text,
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
        }


ENDPOINTS: dict[str, type[Chat | Completions]] = {"/v1/chat/completions": Chat, "/v1/completions": Completions}
"""Endpoints by the address that a line names."""


def _check_names(body: Mapping[str, Any], own: set[str]) -> None:
    """Refuses unknown fields and unsupported values."""
    for name, value in body.items():
        if name in _ONLY and value not in _ONLY[name]:
            allowed = " or ".join(map(repr, _ONLY[name]))
            raise RequestError(f"{name} can only be {allowed} here", param=name, hint="leave it out")
        if name not in own and name not in _SAMPLING and name not in NO_EFFECT and name not in _ONLY:
            raise RequestError(f"unknown field {name!r}", param=name, hint="this endpoint has no such field here")
