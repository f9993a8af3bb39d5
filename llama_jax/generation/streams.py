"""Requests of an engine's callers, and the pieces that they get."""

from __future__ import annotations

import asyncio
import contextlib
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

    def send(self, piece: Piece | BaseException) -> None:
        """Hands a piece to the caller's event loop; one that has been closed wants none."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
