"""Outputs of generation, and the detokenization of a row with stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llama_jax.sampling import Logprobs, SamplingParams
from llama_jax.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of one token, and those of the most likely tokens in its place (itself among them).

    All are under the model's raw logits: before temperature, penalties and truncation.
    """

    token_id: int
    logprob: float
    top: dict[int, float]

    @classmethod
    def of(cls, logprobs: Logprobs, at: Any, token: int, n: int) -> TokenLogprob:
        """The entry of a token, with the n most likely ones, at index `at` of numpy arrays."""
        value = float(logprobs.token[at])
        top = {int(i): float(v) for i, v in zip(logprobs.top_ids[at][:n], logprobs.top[at][:n], strict=True)}
        return cls(token, value, {**top, token: value} if n else {token: value})


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation of a prompt.

    Attributes:
      token_ids: generated ids; the last is the id that ended the text, if one did.
      text: without stop strings and, unless requested, control tokens.
      finish_reason: "stop" (end of text, stop id or stop string, or the grammar allows nothing more), "length", or
        "error" (there was no next token); error: the reason.
      stop_reason: the string of `stop`, or the id of `stop_token_ids`, that ended the text.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds and rates of the batch that a request ran in.

    Attributes:
      ttft_s: from the call to the first token on the host, including compilation if any; if no token is requested,
        to the end of the prompts.
      prompt_tps: prompt tokens of the batch per second of prefill.
      generation_tps: tokens of the batch per second of decoding, after the first and without compilation.
    """

    ttft_s: float
    prompt_tps: float
    generation_tps: float


@dataclass(frozen=True)
class RequestOutput:
    """Everything generated for one prompt.

    Attributes:
      prompt_logprobs: one entry per prompt token; None for the first, which nothing predicts.
      cached_tokens: prompt tokens that the engine had already computed for other requests.
    """

    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    timing: Timing
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    cached_tokens: int = 0

    @property
    def text(self) -> str:
        """Text of the first continuation."""
        return self.outputs[0].text


@dataclass(frozen=True)
class StreamOutput:
    """One step of `stream_generate`; field names as in mlx-lm.

    Attributes:
      text: the text that this token adds; often empty while a character or a possible stop string is incomplete.
      token: its id; -1 if the text has ended without another ("error").
      finish_reason: set on the last one only.
      new_logprobs: of all tokens of this step; there may be several with drafts.
      cached_tokens: prompt tokens that the engine had already computed.
    """

    text: str
    token: int
    logprobs: TokenLogprob | None
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    ttft_s: float
    finish_reason: FinishReason | None = None
    new_logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0


@dataclass
class RowText:
    """The text of one row as its tokens arrive. Holds back what may turn out to be the start of a stop string.

    Without a tokenizer there is no text, only token ids.
    """

    tokenizer: Tokenizer | None
    params: SamplingParams
    stop_ids: frozenset[int]
    prompt_ids: Sequence[int] = ()
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def __post_init__(self) -> None:
        skipping = self.params.skip_special_tokens
        self._detokenizer = (
            self.tokenizer.detokenizer(skip_special_tokens=skipping, prompt_ids=self.prompt_ids)
            if self.tokenizer
            else None
        )
        self._known_ids = self.tokenizer.vocab_size if self.tokenizer else 0
        self._pending = ""

    def add(self, token_id: int, *, limit: int) -> str:
        """Adds the next token, which is the last one if it reaches `limit`; returns the text that is now certain."""
        self.token_ids.append(token_id)
        ended = token_id in self.stop_ids and len(self.token_ids) >= self.params.min_tokens
        last = ended or len(self.token_ids) >= limit
        # Some models pad the vocabulary beyond the tokenizer's: such an id has no text.
        if self._detokenizer and not ended and token_id < self._known_ids:
            self._pending += self._detokenizer.add(token_id)
        if last:
            self._complete("stop" if ended else "length")
        if ended and token_id in self.params.stop_token_ids:
            self.stop_reason = token_id
        if not self.params.stop:
            return self._certain(len(self._pending))
        if len(self.token_ids) > self.params.min_tokens:
            found = [(at, s) for s in self.params.stop if (at := self._pending.find(s)) >= 0]
            if found:
                cut, self.stop_reason = min(found)
                self._pending = self._pending[:cut]
                self.finish_reason = "stop"
        held = 0 if self.finish_reason else max((_overlap(self._pending, s) for s in self.params.stop), default=0)
        return self._certain(len(self._pending) - held)

    def end(self, reason: FinishReason) -> str:
        """Ends the text after its last token, unless it has ended; returns the text held back."""
        if self.finish_reason is None:
            self._complete(reason)
        return self._certain(len(self._pending))

    def _complete(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        if self._detokenizer:
            self._pending += self._detokenizer.finish()

    def _certain(self, count: int) -> str:
        certain, self._pending = self._pending[:count], self._pending[count:]
        self.text += certain
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of a stop string."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-n:]):
            return n
    return 0
