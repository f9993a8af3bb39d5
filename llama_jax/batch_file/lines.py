"""One line of a batch file: from JSON to a checked request, and from its output to JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from llama_jax.config import LlamaConfig
from llama_jax.errors import LlamaJaxError, RequestError
from llama_jax.generation import encode_prompt, token_limit
from llama_jax.generation.outputs import CompletionOutput, RequestOutput, TokenLogprob
from llama_jax.sampling import SamplingParams
from llama_jax.text.chat import encode_chat
from llama_jax.text.tokenizer import Tokenizer

SOURCES = ("prompt", "messages", "token_ids")
_FIELDS = tuple(f.name for f in dataclasses.fields(SamplingParams))
_EXTRAS = ("tools", "documents")
_KNOWN = {*SOURCES, *_EXTRAS, *_FIELDS, "id"}


@dataclass(frozen=True)
class Request:
    """A line that can be generated.

    Attributes:
      index: number of the line in the file, from 0.
      record: the beginning of its output line: "index", and "id" if it has one.
      prompt: token ids.
    """

    index: int
    record: dict[str, Any]
    prompt: list[int]
    params: SamplingParams


def parse_line(
    raw: bytes, index: int, tokenizer: Tokenizer, config: LlamaConfig, base: SamplingParams
) -> Request | dict[str, Any]:
    """Reads one line and checks everything about it that generation would refuse.

    Args:
      raw: a JSON object with one of "prompt" (text), "messages" (a conversation) or "token_ids"; optionally "id", any
        fields of SamplingParams, and "tools" or "documents" for the chat template.
      base: fields that the line does not set. A line without a seed of its own gets `base.seed + index`; `max_tokens`
        of `base` is lowered to what the context leaves, the line's own is not.

    Returns:
      The request, or an output line {"index", "id", "error"} that says what is wrong.
    """
    record: dict[str, Any] = {"index": index}
    try:
        content = _object(raw)
        if "id" in content:
            record["id"] = content["id"]
        prompt = _prompt(content, tokenizer)
        _check_ids(prompt, config)
        params = _params(content, base, index)
        if "max_tokens" in content:
            token_limit(config, len(prompt), params.max_tokens)
        else:
            room = token_limit(config, len(prompt), None)
            params = dataclasses.replace(params, max_tokens=min(room, params.max_tokens or room))
        params.check_vocab(config.vocab_size)
    except LlamaJaxError as error:
        return record | {"error": error_object(error)}
    return Request(index, record, prompt, params)


def error_object(error: LlamaJaxError) -> dict[str, Any]:
    """An error as JSON."""
    named = {"param": error.param} if isinstance(error, RequestError) else {}
    return {"type": type(error).__name__, "message": error.message, **named, "hint": error.hint}


def output_record(request: Request, output: RequestOutput) -> dict[str, Any]:
    """The output line of a request; continuations stand in "outputs" if there are several."""
    completions = [_completion(c) for c in output.outputs]
    record = request.record | {"prompt_tokens": len(request.prompt)}
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = [None if t is None else _logprob(t) for t in output.prompt_logprobs]
    if request.params.n == 1:
        return record | completions[0]
    return record | {"outputs": completions}


def _object(raw: bytes) -> dict[str, Any]:
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"the line is not JSON: {error}", param="line", hint="one JSON object on each line"
        ) from None
    if not isinstance(content, dict):
        raise RequestError("the line is no JSON object", param="line", hint='e.g. {"prompt": "Once upon"}')
    unknown = next((name for name in content if name not in _KNOWN), None)
    if unknown is not None:
        raise RequestError(
            f"unknown field {unknown!r}", param=unknown, hint=f"one of {', '.join(SOURCES)}, id, or a sampling field"
        )
    return content


def _prompt(content: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    given = [name for name in SOURCES if name in content]
    if len(given) != 1:
        raise RequestError(
            f"the line has {' and '.join(given) or 'no prompt'}",
            param=given[1] if given else "prompt",
            hint=f"give exactly one of {', '.join(SOURCES)}",
        )
    (source,) = given
    value = content[source]
    for name in _EXTRAS:
        if name in content and source != "messages":
            raise RequestError(f"{name} are for messages only", param=name, hint="leave them out")
    if source == "messages":
        return encode_chat(tokenizer, value, tools=content.get("tools"), documents=content.get("documents"))
    if source == "prompt":
        if not isinstance(value, str):
            raise RequestError(f"prompt is {type(value).__name__}, not text", param=source, hint="give a string")
        return encode_prompt(tokenizer, value)
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise RequestError("token_ids must be a list of integers", param=source, hint="e.g. [1, 450, 7483]")
    return encode_prompt(tokenizer, value)


def _check_ids(prompt: list[int], config: LlamaConfig) -> None:
    bad = next((token for token in prompt if not 0 <= token < config.vocab_size), None)
    if bad is not None:
        raise RequestError(
            f"token id {bad} is not in the model's vocabulary of {config.vocab_size}",
            param="token_ids",
            hint=f"ids are integers from 0 to {config.vocab_size - 1}",
        )


def _params(content: dict[str, Any], base: SamplingParams, index: int) -> SamplingParams:
    fields = {name: content[name] for name in _FIELDS if name in content}
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
    if fields.get("seed") is None:
        fields["seed"] = ((base.seed or 0) + index) % 2**64
    return dataclasses.replace(base, **fields)


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    made: dict[str, Any] = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }
    if completion.logprobs is not None:
        made["logprobs"] = [_logprob(t) for t in completion.logprobs]
    return made


def _logprob(of: TokenLogprob) -> dict[str, Any]:
    return {"token_id": of.token_id, "logprob": of.logprob, "top": {str(i): v for i, v in of.top.items()}}
