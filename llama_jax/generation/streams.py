"""Requests of an engine's callers, and the pieces that they get."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from llama_jax.generation.answer import Answer
from llama_jax.generation.outputs import FinishReason, RequestOutput, TokenLogprob
from llama_jax.generation.request import Prompt, Requests
from llama_jax.sampling import SamplingParams


@dataclass(frozen=True)
class Request:
    """A prompt for an engine, and how to continue it.

    Attributes:
      prompt: text or token ids; for a conversation `encode_chat(tokenizer, messages)`.
      priority: lower ones first.
      adapter_id: slot of the adapter, 0 for none.
      tenant: requests share what they have computed of a common prefix only with those of the same tenant.
    """

    prompt: Prompt
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    adapter_id: int = 0
    tenant: str = ""


@dataclass(frozen=True)
class Piece:
    """News of one continuation of a request.

    Attributes:
      index: of the continuation.
      text: what is new; often empty while a character or a possible stop string is incomplete.
      token_ids: new ones; logprobs: of them, if they were asked for.
      finish_reason, stop_reason: of its last piece, as in `CompletionOutput`.
      output: of the whole request, with its very last piece.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    output: RequestOutput | None = None
    stop_reason: int | str | None = None


@dataclass(eq=False)
class Stream:
    """A caller: where its pieces go, and what its request has become."""

    requests: Requests
    request: Request
    streamed: bool
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece | BaseException]
    answer: Answer | None = None


News = tuple[Stream, Piece | BaseException]
"""A piece, or the error that ends a stream, and whose it is."""


def deliver(news: Iterable[News]) -> None:
    """Hands pieces to their callers' event loops; one that has been closed wants none.

    A loop is woken once for all of its pieces: it takes the interpreter's lock from the thread that wakes it.
    """
    by_loop = defaultdict[asyncio.AbstractEventLoop, list[News]](list)
    for one in news:
        by_loop[one[0].loop].append(one)
    for loop, of_loop in by_loop.items():
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_put, of_loop)


def _put(news: Iterable[News]) -> None:
    for stream, piece in news:
        stream.pieces.put_nowait(piece)
