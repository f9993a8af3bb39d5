"""A request's answer: texts, log-probabilities and the caller's output."""

from __future__ import annotations

import time

from llama_jax.engine.core import Drawn
from llama_jax.generation.outputs import CompletionOutput, RequestOutput, RowText, StreamOutput, Timing, TokenLogprob
from llama_jax.sampling import Logprobs, SamplingParams
from llama_jax.text.tokenizer import Tokenizer


class Answer:
    """The continuations of one prompt as they grow.

    Attributes:
      rows: the text of each; logprobs: of its tokens, if requested; errors: the error that ended it, if any.
      left: number of continuations that have not ended.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt: list[int],
        params: SamplingParams,
        limit: int,
        eos_token_ids: tuple[int, ...],
    ):
        self.prompt, self.params, self.limit = prompt, params, limit
        endings = params.ending_ids(eos_token_ids)
        self.rows = [RowText(tokenizer, params, endings, prompt) for _ in range(params.n)]
        self.left = params.n
        self.errors: list[str | None] = [None] * params.n
        self.logprobs: list[list[TokenLogprob]] = [[] for _ in self.rows]
        self._of_prompt: Logprobs | None = None
        self._cached: int | None = None
        self._asked = self._last = time.perf_counter()
        self._first: float | None = None

    def take(self, copy: int, drawn: Drawn) -> str:
        """Adds new tokens of one continuation; returns the text that is now certain."""
        row = self.rows[copy]
        if copy == 0 and self._cached is None:  # the others reuse what the first has computed
            self._cached = drawn.cached
        self._last = time.perf_counter()
        if self._first is None:
            self._first = self._last
        if drawn.prompt_logprobs is not None:
            self._of_prompt = drawn.prompt_logprobs
        added = ""
        for i, token in enumerate(drawn.tokens):
            if row.finish_reason:  # a stop string ended it; these came after
                break
            added += row.add(token, limit=self.limit)
            if drawn.logprobs is not None and self.params.logprobs is not None:
                self.logprobs[copy].append(TokenLogprob.of(drawn.logprobs, i, token, self.params.logprobs))
        # If the engine runs out of room, the answer resumes in a larger one.
        outgrown = drawn.ending == "length" and len(row.token_ids) < self.limit
        if drawn.ending and not outgrown:
            added += row.end("error" if drawn.ending == "failed" else drawn.ending)
            if drawn.ending == "stop":  # a grammar's end may coincide with the limit
                row.finish_reason = "stop"
            self.errors[copy] = drawn.error
        self.left -= row.finish_reason is not None
        return added

    def timing(self) -> Timing:
        """Timing of this request alone."""
        first = self._last if self._first is None else self._first
        ttft, decoding = first - self._asked, self._last - first
        behind = sum(max(len(row.token_ids) - 1, 0) for row in self.rows)
        return Timing(
            ttft_s=ttft,
            prompt_tps=len(self.prompt) / ttft if ttft else 0.0,
            generation_tps=behind / decoding if decoding else 0.0,
        )

    def stream_output(self, text: str, tokens: int) -> StreamOutput:
        """Progress of the only continuation: its new text and the number of new tokens."""
        (row,), (logprobs,), timing = self.rows, self.logprobs, self.timing()
        return StreamOutput(
            text=text,
            token=row.token_ids[-1] if tokens else -1,
            logprobs=logprobs[-1] if tokens and logprobs else None,
            prompt_tokens=len(self.prompt),
            prompt_tps=timing.prompt_tps,
            generation_tokens=len(row.token_ids),
            generation_tps=timing.generation_tps,
            ttft_s=timing.ttft_s,
            finish_reason=row.finish_reason,
            new_logprobs=tuple(logprobs[max(len(logprobs) - tokens, 0) :]),
            cached_tokens=self._cached or 0,
        )

    def output(self) -> RequestOutput:
        """The caller's output, once the request has ended."""
        completions = []
        for index, row in enumerate(self.rows):
            assert row.finish_reason is not None
            logprobs = None if self.params.logprobs is None else tuple(self.logprobs[index])
            error, why = self.errors[index], row.stop_reason
            completions.append(
                CompletionOutput(index, tuple(row.token_ids), row.text, row.finish_reason, logprobs, error, why)
            )
        of_prompt = None
        if self.params.prompt_logprobs is not None:
            n, found = self.params.prompt_logprobs, self._of_prompt
            known = enumerate(self.prompt[1:]) if found is not None else ()
            of_prompt = (None, *(TokenLogprob.of(found, i, token, n) for i, token in known if found is not None))
        return RequestOutput(tuple(self.prompt), tuple(completions), self.timing(), of_prompt, self._cached or 0)
