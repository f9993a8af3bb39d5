"""Requests of lines of any format, before and after tokenization."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llama_jax.batch_file.records import Record
from llama_jax.config import LlamaConfig
from llama_jax.errors import LlamaJaxError, RequestError
from llama_jax.generation import encode_prompt, token_limit
from llama_jax.generation.outputs import RequestOutput
from llama_jax.model.loaded import Model
from llama_jax.sampling import SamplingParams
from llama_jax.text.chat import check_messages, encode_chat
from llama_jax.text.tokenizer import Tokenizer

FIELDS = tuple(f.name for f in dataclasses.fields(SamplingParams))
"""Sampling fields that a line may set."""


class Line(Protocol):
    """One line in its format, with its parser and the format of its answer.

    Attributes:
      index: number of the line in the file, from 0.
    """

    @property
    def index(self) -> int: ...

    @property
    def key(self) -> tuple[str, Any] | None:
        """The name and value of the field that identifies it to its sender; None if it has none."""
        ...

    def read(self, content: Mapping[str, Any], base: SamplingParams) -> Draft:
        """Reads and checks the line as far as possible without a model. Raises RequestError."""
        ...

    def refused(self, error: LlamaJaxError) -> Record:
        """The output line that reports the error."""
        ...

    def answered(
        self, request: Request, outputs: Sequence[RequestOutput], model: Model, tokenizer: Tokenizer
    ) -> Record:
        """The output line of a request, from one output for each of its prompts."""
        ...


@dataclass(frozen=True)
class Conversation:
    """Messages to answer, and other inputs of a chat template."""

    messages: Any
    tools: Any = None
    documents: Any = None


@dataclass(frozen=True)
class Draft:
    """A well-formed line, not yet checked against a model.

    Attributes:
      prompts: texts or token ids, each to be continued; or a conversation to be answered.
      limited: whether the line itself limits the number of new tokens.
      model: the model that the line names, if it does.
    """

    line: Line
    prompts: Sequence[str | Sequence[int]] | Conversation
    params: SamplingParams
    limited: bool
    model: str | None = None

    def request(self, tokenizer: Tokenizer, config: LlamaConfig) -> Request:
        """Encodes the prompts, and checks everything that generation would refuse.

        If the line has no limit of its own, the common limit is lowered to what the context leaves.

        Raises:
          LlamaJaxError: the line cannot be generated.
        """
        if isinstance(self.prompts, Conversation):
            chat = self.prompts
            ids = [encode_chat(tokenizer, chat.messages, tools=chat.tools, documents=chat.documents)]
        else:
            ids = [encode_prompt(tokenizer, prompt) for prompt in self.prompts]
        for prompt in ids:
            _check_ids(prompt, config)
        params, longest = self.params, max(map(len, ids))
        if self.limited or params.max_tokens == 0:
            token_limit(config, longest, params.max_tokens)
        else:
            room = token_limit(config, longest, None)
            params = dataclasses.replace(params, max_tokens=min(room, params.max_tokens or room))
        params.check_vocab(config.vocab_size)
        return Request(self.line, tuple(ids), params, self.model)


@dataclass(frozen=True)
class Request:
    """A line that can be generated; `prompts` are token ids, `model` is what the line names, if it does."""

    line: Line
    prompts: tuple[list[int], ...]
    params: SamplingParams
    model: str | None = None

    def adapter(self, model: Model) -> str:
        """The model's adapter that the line names; "" if it names none."""
        return self.model if self.model is not None and self.model in model.adapters else ""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts))


def conversation(messages: Any, params: SamplingParams, **extras: Any) -> Conversation:
    """A checked conversation.

    Raises:
      RequestError: it is not a conversation, has an unknown role, or no answer is wanted (max_tokens=0).
    """
    check_messages(messages)
    params.check_generates("an answer")
    return Conversation(messages, **extras)


def sampling(content: Mapping[str, Any], base: SamplingParams, index: int) -> SamplingParams:
    """The sampling fields in `content`; others default to `base`, and the seed to `base.seed + index`.

    Raises:
      RequestError: a value is out of range; names the field.
    """
    fields = sampling_fields(content)
    if fields.get("seed") is None:
        fields["seed"] = ((base.seed or 0) + index) % 2**64
    return dataclasses.replace(base, **fields)


def sampling_fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling fields in `content`, a JSON object, as `SamplingParams` takes them.

    Raises:
      RequestError: a value is of the wrong type; names the field.
    """
    fields = {name: content[name] for name in FIELDS if name in content}
    bias = fields.get("logit_bias")
    if bias is not None:
        try:
            fields["logit_bias"] = {int(token): value for token, value in bias.items()}
        except (AttributeError, ValueError):
            raise RequestError(
                "logit_bias must be an object of token ids and numbers", param="logit_bias", hint='e.g. {"42": -100}'
            ) from None
    for name, kinds in (("stop", (str, list)), ("stop_token_ids", (list,))):
        if name in fields and not isinstance(fields[name], kinds):
            raise RequestError(f"{name} is {type(fields[name]).__name__}", param=name, hint="give a list")
    return fields


def is_ids(value: Any) -> bool:
    """Whether a JSON value is a list of integers."""
    return isinstance(value, list) and set(map(type, value)) <= {int}


def _check_ids(prompt: list[int], config: LlamaConfig) -> None:
    bad = next((token for token in prompt if not 0 <= token < config.vocab_size), None)
    if bad is not None:
        raise RequestError(
            f"token id {bad} is not in the model's vocabulary of {config.vocab_size}",
            param="token_ids",
            hint=f"ids are integers from 0 to {config.vocab_size - 1}",
        )
