"""The other side of a chat: a model in this process, or one behind a server with OpenAI's API."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llama_jax.errors import DoesNotFit, LlamaJaxError, RequestError
from llama_jax.generation.llm import LLM
from llama_jax.generation.openai_shapes import chat_logprobs
from llama_jax.remote import Remote
from llama_jax.runtime import device_name
from llama_jax.sampling import Grammar, SamplingParams
from llama_jax.text.chat import encode_chat

Messages = Sequence[Mapping[str, Any]]

PATIENCE_S = 0.1
"""Interval at which a wait for a server checks whether to continue."""


@dataclass(frozen=True)
class Prompt:
    """Messages as a partner takes them, and their number of tokens in the model's template; None if unknown."""

    content: Any
    tokens: int | None


@dataclass(frozen=True)
class Piece:
    """New text of an answer, and its figures so far.

    Attributes:
      text: the new text.
      prompt_tokens, generation_tokens: so far; cached_tokens: prompt tokens found in the prefix cache.
      prompt_tps, generation_tps: tokens per second; ttft_s: seconds to the first one.
      finish_reason: set on the last piece only.
      tokens: new ones, if requested, in the format of OpenAI's API: "token", "logprob", "top_logprobs".
      reasoning: new text of the model's reasoning, if a server separates it.
    """

    text: str
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    ttft_s: float
    cached_tokens: int = 0
    finish_reason: str | None = None
    tokens: tuple[Mapping[str, Any], ...] = ()
    reasoning: str = ""


class Partner(Protocol):
    """The other side of a chat.

    Attributes:
      name: of the model; about: where it is.
      context: the most tokens that it can take; None if unknown.
    """

    name: str
    about: str
    context: int | None

    def prompt(self, messages: Messages, *, add_generation_prompt: bool = True) -> Prompt:
        """Prepares messages to answer or count."""
        ...

    def choose(self, name: str) -> None:
        """Switches to another model.

        Raises:
          LlamaJaxError: there is none with that name, or no choice.
        """
        ...

    def answer(self, prompt: Prompt, params: SamplingParams, progress: Callable[[int, int], None]) -> Iterator[Piece]:
        """Yields pieces of an answer as they come.

        Args:
          progress: called occasionally with the numbers of tokens read and in total; its exceptions end the answer.
        """
        ...


class Here:
    """A `Partner` in this process."""

    def __init__(self, llm: LLM):
        """Makes an engine, which caches the conversation's keys and values."""
        model = llm.model
        self.llm, self.name = llm, model.name
        self.context: int | None = model.config.context_length
        self.about = f"{device_name(model.device, model.mesh)} in {model.dtype.name}"

    def prompt(self, messages: Messages, *, add_generation_prompt: bool = True) -> Prompt:
        """See `Partner`."""
        assert self.llm.tokenizer is not None
        ids = encode_chat(self.llm.tokenizer, messages, add_generation_prompt=add_generation_prompt)
        return Prompt(ids, len(ids))

    def answer(self, prompt: Prompt, params: SamplingParams, progress: Callable[[int, int], None]) -> Iterator[Piece]:
        """See `Partner`."""
        assert self.llm.tokenizer is not None
        try:
            for out in self.llm.stream(prompt.content, params, progress=progress):
                yield Piece(
                    out.text,
                    out.prompt_tokens,
                    out.prompt_tps,
                    out.generation_tokens,
                    out.generation_tps,
                    out.ttft_s,
                    out.cached_tokens,
                    out.finish_reason,
                    tuple(chat_logprobs(self.llm.tokenizer, out.new_logprobs, params.logprobs or 0)["content"]),
                )
        except DoesNotFit as error:
            raise DoesNotFit(
                f"the device's memory is too small for {prompt.tokens} tokens of conversation and an answer",
                hint="/trim drops the oldest turns, /set max_tokens N makes answers shorter",
            ) from error

    def choose(self, name: str) -> None:
        """See `Partner`."""
        raise RequestError(
            f"this chat has loaded {self.name} alone",
            param="/model",
            hint=f"/save talk.json, then llama-jax chat -m {name} --resume talk.json",
        )


class There:
    """A `Partner` behind a server; `close` ends the connection."""

    def __init__(self, remote: Remote, name: str | None):
        """Asks the server for its models.

        Raises:
          NetworkError: it cannot be reached.
          ModelNotFound: it has no model of that name.
        """
        self._runner, self._remote = asyncio.Runner(), remote
        self.about = remote.url
        try:
            self._runner.run(remote.__aenter__())
            self.choose(name)
        except BaseException:
            self.close()
            raise

    def choose(self, name: str | None) -> None:
        """See `Partner`; None takes the server's first model."""
        model = self._runner.run(self._remote.model(name))
        self.name = str(model["id"])
        self.context: int | None = model.get("max_model_len")

    def close(self) -> None:
        """Ends the connection."""
        self._runner.run(self._remote.__aexit__())
        self._runner.close()

    def prompt(self, messages: Messages, *, add_generation_prompt: bool = True) -> Prompt:
        """See `Partner`. Servers without vLLM's /tokenize cannot tell the number."""
        body = {"model": self.name, "messages": messages, "add_generation_prompt": add_generation_prompt}
        count = None
        with contextlib.suppress(LlamaJaxError):
            count = self._runner.run(self._remote.post("/tokenize", body)).get("count")
        return Prompt(list(messages), count if isinstance(count, int) else None)

    def answer(self, prompt: Prompt, params: SamplingParams, progress: Callable[[int, int], None]) -> Iterator[Piece]:
        """See `Partner`."""
        body = {"model": self.name, "messages": prompt.content, "stream_options": {"include_usage": True}}
        events = self._remote.events("/v1/chat/completions", body | _fields(params))
        start, first, pieces, end = time.perf_counter(), None, 0, None
        usage: dict[str, Any] = {}
        try:
            while (event := self._runner.run(_next(events, progress))) is not None:
                usage = event.get("usage") or usage
                for choice in event.get("choices", ()):
                    delta = choice.get("delta", {})
                    text = delta.get("content") or ""
                    reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""  # vLLM's name
                    tokens = (choice.get("logprobs") or {}).get("content") or ()
                    end = choice.get("finish_reason") or end
                    if text or tokens or reasoning:
                        first = time.perf_counter() if first is None else first
                        pieces += len(tokens) or 1
                        so_far = {"completion_tokens": pieces}
                        yield _piece(so_far, start, first, text=text, tokens=tuple(tokens), reasoning=reasoning)
            yield _piece({"completion_tokens": pieces} | usage, start, first, text="", finish_reason=end)
        finally:
            self._runner.run(events.aclose())


def _piece(usage: Mapping[str, Any], start: float, first: float | None, **more: Any) -> Piece:
    first = time.perf_counter() if first is None else first
    count, prompt = usage["completion_tokens"], usage.get("prompt_tokens", 0)
    return Piece(
        prompt_tokens=prompt,
        prompt_tps=prompt / max(first - start, 1e-9),
        generation_tokens=count,
        generation_tps=(count - 1) / max(time.perf_counter() - first, 1e-9),
        ttft_s=first - start,
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        **more,
    )


async def _next(events: Any, progress: Callable[[int, int], None]) -> dict[str, Any] | None:
    """The next event, None after the last; meanwhile `progress` may end the wait."""
    coming = asyncio.ensure_future(anext(events, None))
    try:
        while not (await asyncio.wait([coming], timeout=PATIENCE_S))[0]:
            progress(0, 0)
        return coming.result()
    finally:
        coming.cancel()
        await asyncio.wait([coming])


def _fields(params: SamplingParams) -> dict[str, Any]:
    """Fields of a request: those that differ from the defaults, since a server may not know the others."""
    defaults = SamplingParams(max_tokens=None)
    found = {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}
    found = {name: value for name, value in found.items() if value != getattr(defaults, name)}
    if grammar := Grammar.of(params.response_format):
        found["response_format"] = grammar.request
    if params.logprobs is not None:
        found |= {"logprobs": True, "top_logprobs": params.logprobs}
    return found
