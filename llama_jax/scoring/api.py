"""`score`, `score_rolling` and `perplexity`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llama_jax.checkpoint import Progress
from llama_jax.errors import RequestError
from llama_jax.generation.request import Prompt
from llama_jax.model.loaded import Model
from llama_jax.scoring.compute import score_pairs
from llama_jax.scoring.pairs import Pair, encode_pair, encode_text, fitted, prefix_token, windows
from llama_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Score:
    """A continuation's likelihood behind its context.

    Attributes:
      logprob: natural logarithm of the continuation's probability.
      is_greedy: whether each of its tokens is the likeliest in its place, so that greedy decoding would write it.
      token_ids, logprobs: the tokens that were scored, and the log-probability of each; `logprob` is their sum.
      dropped: tokens at the beginning of the context that there was no room for.
    """

    logprob: float
    is_greedy: bool
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    dropped: int


@dataclass(frozen=True, eq=False)
class RollingScore:
    """A text's likelihood, each token conditioned on those before it within a window.

    Attributes:
      logprobs: float32 [tokens], log-probability of each token of the text.
      words: pieces of the text between white space, as lm-eval counts them: a trailing newline adds an empty one.
      bytes: of the text in UTF-8.
      windows: that the text was cut into.
    """

    logprobs: np.ndarray
    words: int
    bytes: int
    windows: int

    @property
    def tokens(self) -> int:
        """Tokens of the text."""
        return len(self.logprobs)

    @cached_property
    def logprob(self) -> float:
        """Natural logarithm of the text's probability."""
        return float(np.sum(self.logprobs, dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """Of a token: exp of its mean negative log-probability."""
        return _exp(-self.logprob / self.tokens)

    @property
    def error(self) -> float:
        """Standard error of `perplexity`, tokens taken as independent of each other."""
        spread = float(np.std(self.logprobs, dtype=np.float64)) / math.sqrt(self.tokens)
        return self.perplexity * spread

    @property
    def word_perplexity(self) -> float:
        """Of a word: independent of the tokenizer. Infinite where it exceeds a float, as in a long text without white
        space, which is one word."""
        return _exp(-self.logprob / self.words)

    @property
    def byte_perplexity(self) -> float:
        """Of a byte."""
        return _exp(-self.logprob / self.bytes)

    @property
    def bits_per_byte(self) -> float:
        """Binary logarithm of `byte_perplexity`."""
        return -self.logprob / (self.bytes * math.log(2))


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def score(
    model: Model,
    tokenizer: Tokenizer | None,
    pairs: Iterable[tuple[Prompt, Prompt]],
    *,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> list[Score]:
    """Scores continuations behind their contexts, tokenised as lm-eval does (`scoring.pairs`).

    A context that several pairs have is computed once. One that is too long loses its beginning, which
    `Score.dropped` tells.

    Args:
      tokenizer: None for pairs of token ids.
      pairs: (context, continuation), both text or both token ids. A context may be empty: BOS takes its place.
      max_length: tokens that the model reads of a pair, at most; by default its context.
      batch_tokens: tokens that are computed at once, padding included; by default 16384 on a GPU, 2048 on a CPU.
      progress: called now and then with pairs done, pairs in all, and "pairs".

    Returns:
      One score a pair, in order.

    Raises:
      RequestError: a continuation is empty, merges into its context's last token, or is longer than `max_length`; a
        token id is not in the vocabulary; a size is out of range.
      TokenizerError: a text cannot be encoded.
    """
    length = _checked_length(model, max_length)
    cut = [fitted(_encoded(tokenizer, number, pair), length) for number, pair in enumerate(_checked_pairs(pairs))]
    return [
        Score(
            float(np.sum(logprobs, dtype=np.float64)),
            bool(np.all(greedy)),
            pair.continuation,
            tuple(map(float, logprobs)),
            pair.dropped,
        )
        for pair, (logprobs, greedy) in zip(cut, _scores(model, cut, batch_tokens, progress), strict=True)
    ]


def score_rolling(
    model: Model,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    overlap: int = 1,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> list[RollingScore]:
    """Scores whole texts of any length in windows, each token once; with the defaults as lm-eval does.

    Args:
      max_length: tokens that the model reads of a window, at most; by default its context.
      overlap: tokens that a window repeats of the one before as context, at least. More give better predictions, and
        take longer: windows then score `max_length - overlap + 1` new tokens each.
      batch_tokens: as for `score`.
      progress: called now and then with windows done, windows in all, and "pairs".

    Raises:
      RequestError: a text is empty, or a size is out of range.
      TokenizerError: a text cannot be encoded.
    """
    length = _checked_length(model, max_length)
    if not 1 <= overlap <= length:
        raise RequestError(
            f"windows of {length} tokens cannot overlap by {overlap}", param="overlap", hint=f"1 to {length}"
        )
    if isinstance(texts, str):
        raise RequestError("texts must be a list of texts, not a single one", param="texts", hint="pass [text]")
    prefix = prefix_token(tokenizer)
    cut: list[Pair] = []
    ends = []
    for number, text in enumerate(texts):
        before = len(cut)
        cut += windows(encode_text(tokenizer, text), prefix, length, overlap)
        if len(cut) == before:
            raise RequestError(f"text {number} is empty", param="texts", hint="leave it out")
        ends.append((before, len(cut)))
    found = _scores(model, cut, batch_tokens, progress)
    return [
        RollingScore(
            np.concatenate([logprobs for logprobs, _ in found[start:end]]),
            len(re.split(r"\s+", text)),
            len(text.encode()),
            end - start,
        )
        for text, (start, end) in zip(texts, ends, strict=True)
    ]


def perplexity(
    model: Model,
    tokenizer: Tokenizer,
    text: str,
    *,
    max_length: int | None = None,
    overlap: int = 1,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> float:
    """Perplexity of a text's tokens, in windows as for `score_rolling`, which has more to say of it.

    Arguments and errors as for `score_rolling`.
    """
    (found,) = score_rolling(
        model,
        tokenizer,
        [text],
        max_length=max_length,
        overlap=overlap,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    return found.perplexity


def _checked_pairs(pairs: Iterable[tuple[Prompt, Prompt]]) -> Iterable[tuple[Prompt, Prompt]]:
    for number, pair in enumerate(pairs):
        if isinstance(pair, str) or len(pair) != 2:
            raise RequestError(
                f"pair {number} is not (context, continuation)", param="pairs", hint='e.g. [("2 + 2 =", " 4")]'
            )
        yield pair


def _encoded(tokenizer: Tokenizer | None, number: int, pair: tuple[Prompt, Prompt]) -> Pair:
    try:
        return encode_pair(tokenizer, *pair)
    except RequestError as error:
        raise RequestError(f"pair {number}: {error.message}", param=error.param, hint=error.hint) from None


def _checked_length(model: Model, max_length: int | None) -> int:
    context = model.config.context_length
    if max_length is not None and not 1 <= max_length <= context:
        raise RequestError(
            f"max_length {max_length} for a model with a context of {context} tokens",
            param="max_length",
            hint=f"1 to {context}",
        )
    return max_length or context


def _scores(
    model: Model, pairs: Sequence[Pair], batch_tokens: int | None, progress: Progress | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores pairs whose sizes and token ids are right."""
    if batch_tokens is not None and batch_tokens < 1:
        raise RequestError(f"batch_tokens {batch_tokens}", param="batch_tokens", hint="at least 1")
    size = model.config.vocab_size
    for number, pair in enumerate(pairs):
        ids = pair.context + pair.continuation
        if (bad := next((t for t in (min(ids), max(ids)) if not 0 <= t < size), None)) is not None:
            raise RequestError(
                f"pair {number} holds token id {bad}; the vocabulary has {size}",
                param="pairs",
                hint="encode it with this model's tokenizer",
            )
    return score_pairs(model, pairs, batch_tokens, progress)
