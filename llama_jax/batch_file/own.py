"""Lines in this package's own format: a prompt and sampling fields in, text and token ids out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_jax.batch_file.records import Record
from llama_jax.batch_file.request import FIELDS, Draft, Request, conversation, is_ids, sampling
from llama_jax.errors import LlamaJaxError, RequestError
from llama_jax.generation.outputs import CompletionOutput, RequestOutput, TokenLogprob
from llama_jax.model.loaded import Model
from llama_jax.sampling import SamplingParams
from llama_jax.text.tokenizer import Tokenizer

SOURCES = ("prompt", "messages", "token_ids")
_EXTRAS = ("tools", "documents")
_KNOWN = {*SOURCES, *_EXTRAS, *FIELDS, "id", "model"}


@dataclass(frozen=True)
class OwnLine:
    """A line with one of "prompt" (text), "messages" (a conversation) or "token_ids"; optionally "id", "model"
    (the name of an adapter), fields of SamplingParams, and "tools" or "documents" for the chat template.

    Attributes:
      head: first fields of its output line: "index", and "id" if it has one.
    """

    index: int
    head: Record = field(default_factory=dict)

    @classmethod
    def of(cls, index: int, content: Mapping[str, Any] | None = None) -> OwnLine:
        """The line with this number; without content if it could not be read."""
        return cls(index, {"index": index} | ({"id": content["id"]} if content and "id" in content else {}))

    @property
    def key(self) -> tuple[str, Any] | None:
        """Its id."""
        return ("id", self.head["id"]) if self.head.get("id") is not None else None

    def read(self, content: Mapping[str, Any], base: SamplingParams) -> Draft:
        """See `request.Line`."""
        unknown = next((name for name in content if name not in _KNOWN), None)
        if unknown is not None:
            raise RequestError(
                f"unknown field {unknown!r}",
                param=unknown,
                hint=f"one of {', '.join(SOURCES)}, id, or a sampling field",
            )
        given = [name for name in SOURCES if name in content]
        if len(given) != 1:
            raise RequestError(
                f"the line has {' and '.join(given) or 'no prompt'}",
                param=given[1] if given else "prompt",
                hint=f"give exactly one of {', '.join(SOURCES)}",
            )
        (source,) = given
        value = content[source]
        extras = {name: content[name] for name in _EXTRAS if name in content}
        if extras and source != "messages":
            raise RequestError(
                f"{next(iter(extras))} are for messages only", param=next(iter(extras)), hint="leave them out"
            )
        if source == "prompt" and not isinstance(value, str):
            raise RequestError(f"prompt is {type(value).__name__}, not text", param=source, hint="give a string")
        if source == "token_ids" and not is_ids(value):
            raise RequestError("token_ids must be a list of integers", param=source, hint="e.g. [1, 450, 7483]")
        params = sampling(content, base, self.index)
        prompts = conversation(value, params, **extras) if source == "messages" else (value,)
        model = content.get("model")
        if model is not None and not isinstance(model, str):
            raise RequestError(f"model is {type(model).__name__}, not text", param="model", hint="name an adapter")
        return Draft(self, prompts, params, limited="max_tokens" in content, model=model)

    def refused(self, error: LlamaJaxError) -> Record:
        """See `request.Line`."""
        named = {"param": error.param} if isinstance(error, RequestError) else {}
        return self.head | {
            "error": {"type": type(error).__name__, "message": error.message, **named, "hint": error.hint}
        }

    def answered(
        self, request: Request, outputs: Sequence[RequestOutput], model: Model, tokenizer: Tokenizer
    ) -> Record:
        """See `request.Line`; continuations are in "outputs" if there are several."""
        (output,) = outputs
        completions = [_completion(c) for c in output.outputs]
        record = self.head | {"prompt_tokens": request.longest}
        if output.prompt_logprobs is not None:
            record["prompt_logprobs"] = [None if t is None else _logprob(t) for t in output.prompt_logprobs]
        return record | (completions[0] if request.params.n == 1 else {"outputs": completions})


def _completion(completion: CompletionOutput) -> Record:
    made: Record = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        **({"finish_error": completion.error} if completion.error else {}),
    }
    if completion.logprobs is not None:
        made["logprobs"] = [_logprob(t) for t in completion.logprobs]
    return made


def _logprob(of: TokenLogprob) -> Record:
    top = {str(i): _number(value) for i, value in of.top.items()}
    return {"token_id": of.token_id, "logprob": _number(of.logprob), "top": top}


def _number(x: float) -> float | None:
    """None for NaN and infinities, which JSON lacks."""
    return x if math.isfinite(x) else None
