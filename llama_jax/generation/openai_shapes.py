"""Log-probabilities in the shapes of OpenAI's API, of tokens that a model has drawn or read.

Source: https://platform.openai.com/docs/api-reference (chat/create, completions/create).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llama_jax.generation.outputs import TokenLogprob
from llama_jax.text.tokenizer import Tokenizer

LEAST = -9999.0
"""Stands for minus infinity and NaN, which JSON lacks, as the first of two arguments of `max`; as in vLLM."""


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token as OpenAI spells it: its text, or its bytes if they are only part of a character."""
    data = tokenizer.bytes_of(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprob], most: int) -> dict[str, Any]:
    """Return the "logprobs" of a chat's choice.

    Args:
      most: likeliest tokens to name in the place of each.
    """
    content = [
        _spelled(tokenizer, of.token_id, of.logprob)
        | {"top_logprobs": [_spelled(tokenizer, *top) for top in [*of.top.items()][:most]]}
        for of in entries
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """The "logprobs" of a completion's choice, built from consecutive runs of tokens."""

    def __init__(self, tokenizer: Tokenizer, most: int, before: Sequence[int] = (), offset: int = 0):
        """Start without tokens.

        Args:
          most: likeliest tokens to name in the place of each; 0 for none.
          before: ids that precede the tokens; offset: where the tokens' text begins in the choice's text.
        """
        self._tokenizer, self._most, self._at = tokenizer, most, offset
        self._stream = tokenizer.detokenizer(prompt_ids=before)

    def __call__(self, ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        """Return the entries of the next tokens. A part of a character has the offset of the whole character."""
        offsets = []
        for token_id in ids:
            offsets.append(self._at)
            self._at += len(self._stream.add(token_id)) if token_id < self._tokenizer.vocab_size else 0
        return {
            "tokens": [token_text(self._tokenizer, i) for i in ids],
            "token_logprobs": [None if of is None else max(LEAST, of.logprob) for of in entries],
            "top_logprobs": [self._tops(of) for of in entries] if self._most else None,
            "text_offset": offsets,
        }

    def _tops(self, of: TokenLogprob | None) -> dict[str, float] | None:
        if of is None:
            return None
        return {token_text(self._tokenizer, i): max(LEAST, value) for i, value in of.top.items()}


def _spelled(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": token_text(tokenizer, token_id),
        "logprob": max(LEAST, logprob),
        "bytes": list(tokenizer.bytes_of(token_id)),
    }
