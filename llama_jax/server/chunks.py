"""The choices of a stream's chunks, as OpenAI's clients expect them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from llama_jax.batch_file.openai_endpoints import Completions
from llama_jax.generation.openai_shapes import CompletionLogprobs, chat_logprobs
from llama_jax.generation.streams import Piece
from llama_jax.server.asking import Asked
from llama_jax.server.reading import ChatReader
from llama_jax.text.tokenizer import Tokenizer

Chunks = Callable[[int, Piece], Iterator[dict[str, Any]]]
"""Maps a prompt's index and a piece to choices."""


def chunks_of(tokenizer: Tokenizer, asked: Asked) -> Chunks:
    """Return the maker of one stream's choices."""
    of = _CompletionChunks if isinstance(asked.endpoint, Completions) else _ChatChunks
    return of(tokenizer, asked)


class _ChatChunks:
    """The role comes first, once per choice; the finish reason last, in its own choice. Log-probabilities come with the
    first delta of their tokens, or with empty content."""

    def __init__(self, tokenizer: Tokenizer, asked: Asked):
        self._tokenizer, self._asked = tokenizer, asked
        self._readers: dict[int, ChatReader] = {}

    def __call__(self, prompt: int, piece: Piece) -> Iterator[dict[str, Any]]:
        def choice(delta: dict[str, Any], **more: Any) -> dict[str, Any]:
            return {"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": None} | more

        if piece.index not in self._readers:
            self._readers[piece.index] = self._asked.reader()
            yield choice({"role": "assistant", "content": ""})
        reader, most = self._readers[piece.index], self._asked.params.logprobs
        deltas = reader.feed(piece.text)
        if piece.finish_reason is not None:
            deltas += reader.finish()
        if piece.logprobs and most is not None:
            first = deltas.pop(0) if deltas else {"content": ""}
            yield choice(first, logprobs=chat_logprobs(self._tokenizer, piece.logprobs, most))
        for delta in deltas:
            yield choice(delta)
        if piece.finish_reason is not None:
            yield choice({}, finish_reason=reader.reason(piece.finish_reason), stop_reason=piece.stop_reason)


class _CompletionChunks:
    """The choices of one prompt follow those of the previous one; with `echo` each begins with its prompt's text."""

    def __init__(self, tokenizer: Tokenizer, asked: Asked):
        self._tokenizer, self._asked = tokenizer, asked
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._begun: set[int] = set()

    def __call__(self, prompt: int, piece: Piece) -> Iterator[dict[str, Any]]:
        asked, index = self._asked, prompt * self._asked.params.n + piece.index
        ids, text, logprobs = asked.prompts[prompt], piece.text, None
        if index not in self._begun:
            self._begun.add(index)
            if isinstance(asked.endpoint, Completions) and asked.endpoint.echo:
                text = self._tokenizer.decode(ids) + text
        if piece.logprobs and asked.params.logprobs is not None:
            if index not in self._logprobs:
                self._logprobs[index] = CompletionLogprobs(self._tokenizer, asked.params.logprobs, ids)
            logprobs = self._logprobs[index]([of.token_id for of in piece.logprobs], piece.logprobs)
        if text or logprobs or piece.finish_reason:
            choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": piece.finish_reason}
            yield choice | ({"stop_reason": piece.stop_reason} if piece.finish_reason else {})
