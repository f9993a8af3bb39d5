"""A batch from prompts to texts: what a session's tokens come to on the host."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import jax

from llama_jax.decode.loop import Progress
from llama_jax.generation.outputs import CompletionOutput, RequestOutput, RowText, Timing, TokenLogprob
from llama_jax.generation.request import Requests
from llama_jax.generation.session import Session
from llama_jax.model.loaded import Model
from llama_jax.sampling import Logprobs
from llama_jax.text.tokenizer import Tokenizer

# Steps of a dispatch: the host looks at the tokens this often, for stop strings and for Ctrl-C.
BATCH_STRIDE = 64
STOP_STRIDE = 16


class Batch:
    """Texts, log-probabilities and times of requests that run together.

    Attributes:
      rows: the text of each continuation so far; logprobs: of its tokens, where they were asked for.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer | None, requests: Requests):
        for params in requests.params:
            params.check_unconstrained("a static batch")
        self.model, self.requests = model, requests
        self.rows = [
            RowText(
                tokenizer,
                row.params,
                row.params.ending_ids(model.eos_token_ids),
                requests.prompt_of(i),
                finish_reason=None if row.limit else "length",
            )
            for i, row in enumerate(requests.rows)
        ]
        self.logprobs: list[list[TokenLogprob]] = [[] for _ in self.rows]
        self._prompt_logprobs: Logprobs | None = None
        self._stopped_here = False
        # Times: of the call, of the first tokens, from which decoding counts, and of the newest tokens.
        self._start = self._first = self._decoding = self._end = 0.0

    def run(self, steps: int) -> Iterator[list[tuple[int, str]]]:
        """Runs the batch, `steps` decode steps a dispatch; after each yields what is new, (row, text) for each
        token."""
        self._start = time.perf_counter()
        session = Session(self.model, self.requests, BATCH_STRIDE if steps > 1 else 1)
        self._prompt_logprobs = session.prefill()
        if not self._unfinished():  # nothing is to be generated, so that nothing is compiled for it
            session.wait()
            self._first = self._decoding = self._end = time.perf_counter()
            return
        new = self._read(session.begin())
        self._first = self._decoding = self._end = time.perf_counter()
        yield new

        if self._unfinished():
            # No step yet: it only compiles the program, so that the rate of decoding is that of decoding.
            session.advance(0)
            self._decoding = self._end = time.perf_counter()
        ahead: deque[Progress] = deque()
        while self._unfinished():
            # A stream keeps one dispatch ahead: the device works while the host turns the last token into text.
            while len(ahead) < (2 if steps == 1 else 1) and not session.ended:
                ahead.append(session.advance(steps))
            new = self._read(ahead.popleft())
            self._end = time.perf_counter()
            if self._stopped_here:
                session.stop([row.finish_reason is not None for row in self.rows])
                self._stopped_here = False
            yield new

    def _unfinished(self) -> bool:
        return not all(row.finish_reason for row in self.rows)

    def _read(self, progress: Progress) -> list[tuple[int, str]]:
        """Takes over the tokens that a dispatch has added."""
        host = jax.device_get(progress)
        added = []
        for column in range(int(host.new.max())):
            for index, row in enumerate(self.rows):
                if row.finish_reason or column >= host.new[index]:
                    continue
                text = row.add(int(host.tokens[index, column]), limit=self.requests.rows[index].limit)
                added.append((index, text))
                n = row.params.logprobs
                if n is not None and host.logprobs is not None:
                    self.logprobs[index].append(TokenLogprob.of(host.logprobs, (index, column), row.token_ids[-1], n))
                if row.finish_reason and not host.done[index]:
                    self._stopped_here = True
        return added

    def timing(self) -> Timing:
        """Of the whole batch, as far as it has run."""
        prefill, decoding = self._first - self._start, self._end - self._decoding
        generated = sum(max(len(row.token_ids) - 1, 0) for row in self.rows)
        return Timing(
            ttft_s=prefill,
            prompt_tps=sum(map(len, self.requests.prompts)) / prefill if prefill else 0.0,
            generation_tps=generated / decoding if decoding else 0.0,
        )

    def outputs(self) -> list[RequestOutput]:
        """One output per prompt, once `run` has ended."""
        timing = self.timing()
        prompt_logprobs = jax.device_get(self._prompt_logprobs)
        outputs = []
        for i, (prompt, params) in enumerate(zip(self.requests.prompts, self.requests.params, strict=True)):
            rows = [r for r, row in enumerate(self.requests.rows) if row.prompt == i]
            completions = []
            for index, r in enumerate(rows):
                row = self.rows[r]
                assert row.finish_reason is not None
                logprobs = None if params.logprobs is None else tuple(self.logprobs[r])
                completions.append(CompletionOutput(index, tuple(row.token_ids), row.text, row.finish_reason, logprobs))
            of_prompt = None
            if params.prompt_logprobs is not None:
                # Entry j is of padded token j + 1: the row's own are the last ones.
                start = prompt_logprobs.token.shape[1] + 1 - len(prompt)
                of_prompt = (
                    None,
                    *(
                        TokenLogprob.of(prompt_logprobs, (i, start + j), token, params.prompt_logprobs)
                        for j, token in enumerate(prompt[1:])
                    ),
                )
            outputs.append(RequestOutput(tuple(prompt), tuple(completions), timing, of_prompt))
        return outputs
