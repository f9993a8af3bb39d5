"""Requests of an engine's callers, and the pieces they receive."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from llama_jax.errors import RequestError
from llama_jax.generation.answer import Answer
from llama_jax.generation.outputs import FinishReason, RequestOutput, TokenLogprob
from llama_jax.generation.request import Prompt, Requests
from llama_jax.sampling import SamplingParams


@dataclass(frozen=True)
class Request:
    """A prompt for an engine, with its sampling parameters.

    Attributes:
      prompt: text or token ids; for a conversation `encode_chat(tokenizer, messages)`.
      priority: lower ones run first.
      adapter: name of an adapter of the engine, "" for none.
      tenant: requests share a cached prefix only with those of the same tenant.
    """

    prompt: Prompt
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    adapter: str = ""
    tenant: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.tenant, str):
            got = type(self.tenant).__name__
            raise RequestError(f"a tenant's name is text; got {got}", param="tenant", hint="any text of your own")


@dataclass(slots=True)  # frozen ones take four times as long to make, and there is one for each token
class Piece:
    """News of one continuation of a request.

    Attributes:
      index: of the continuation.
      text: new text; often empty while a character or a possible stop string is incomplete.
      token_ids: new ones; logprobs: of them, if requested.
      finish_reason, stop_reason: on its last piece, as in `CompletionOutput`.
      output: of the whole request, on its very last piece.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    output: RequestOutput | None = None
    stop_reason: int | str | None = None

    def __add__(self, later: Piece) -> Piece:
        """Joins this piece and a later one of the same continuation."""
        logprobs = None
        if self.logprobs is not None or later.logprobs is not None:
            logprobs = (*(self.logprobs or ()), *(later.logprobs or ()))
        text, token_ids = self.text + later.text, self.token_ids + later.token_ids
        return replace(later, text=text, token_ids=token_ids, logprobs=logprobs)


@dataclass(eq=False)
class Stream:
    """A caller: the destination of its pieces, and the state of its request.

    Pieces not yet taken are merged into one, so that a slow reader gets fewer, larger ones and no queue builds up.
    """

    requests: Requests
    request: Request
    streamed: bool
    loop: asyncio.AbstractEventLoop
    answer: Answer | None = None
    _kept: dict[int, Piece | BaseException] = field(default_factory=dict, init=False)
    _waiting: asyncio.Future[None] | None = field(default=None, init=False)

    def put(self, piece: Piece | BaseException) -> None:
        """Keeps a piece, or the error that ends the stream, until it is taken. Runs in the caller's event loop."""
        index = piece.index if isinstance(piece, Piece) else -1
        if self._kept:
            earlier = self._kept.pop(index, None)
            if isinstance(earlier, Piece) and isinstance(piece, Piece):
                piece = earlier + piece
        self._kept[index] = piece  # after all others: it may be the last of the request
        if (waiting := self._waiting) is not None and not waiting.done():
            waiting.set_result(None)

    async def take(self) -> Piece:
        """Waits for the next piece and returns it.

        Raises:
          BaseException: the error that ended the stream.
        """
        while not self._kept:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        piece = self._kept.pop(next(iter(self._kept)))
        if isinstance(piece, BaseException):
            raise piece
        return piece


News = tuple[Stream, Piece | BaseException]
"""A stream, and its next piece or the error that ends it."""


def deliver(news: Iterable[News]) -> None:
    """Hands pieces to their callers' event loops; closed loops are skipped.

    Each loop is woken once for all of its pieces, since it takes the interpreter's lock from the waking thread.
    """
    by_loop = defaultdict[asyncio.AbstractEventLoop, list[News]](list)
    for one in news:
        by_loop[one[0].loop].append(one)
    for loop, of_loop in by_loop.items():
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_put, of_loop)


def _put(news: Iterable[News]) -> None:
    for stream, piece in news:
        stream.put(piece)
