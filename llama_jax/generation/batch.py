"""Text from text: `generate`, `stream_generate` and `batch_generate`, over the decode step of `llama_jax.decode`."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from llama_jax.cache import check_page_size
from llama_jax.config import LlamaConfig
from llama_jax.decode import buckets, loop, prefill
from llama_jax.errors import RequestError
from llama_jax.generation.outputs import CompletionOutput, RequestOutput, RowText, StreamOutput, Timing, TokenLogprob
from llama_jax.kernels.dispatch import using
from llama_jax.model.loaded import Model
from llama_jax.sampling import Logprobs, SamplerOptions, SamplerState, SamplingParams, make_sampler
from llama_jax.sharding import on
from llama_jax.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]

# Steps per dispatch of a batch: the host looks at the tokens this often, for stop strings and for Ctrl-C.
BATCH_STRIDE = 64
STOP_STRIDE = 16


def generate(
    model: Model,
    tokenizer: Tokenizer | None,
    prompt: Prompt,
    params: SamplingParams | None = None,
    *,
    page_size: int | None = None,
    **fields: Any,
) -> str:
    """Continues one prompt and returns the new text.

    Args:
      tokenizer: None for token ids in, token ids out.
      prompt: text, continued as it stands, or token ids. For a conversation pass `encode_chat(tokenizer, messages)`.
      params: how to sample. Without it decoding is greedy.
      page_size: 16, 32, 64, 128 or 256 keeps keys and values in a paged cache with pages of so many tokens; by default
        the cache is dense. The tokens are the same.
      fields: fields of SamplingParams, e.g. `max_tokens=128`.

    Raises:
      RequestError: a parameter is out of range, or prompt and max_tokens exceed the model's context.
    """
    return batch_generate(model, tokenizer, [prompt], params, page_size=page_size, **fields)[0].text


def stream_generate(
    model: Model,
    tokenizer: Tokenizer | None,
    prompt: Prompt,
    params: SamplingParams | None = None,
    *,
    page_size: int | None = None,
    **fields: Any,
) -> Iterator[StreamOutput]:
    """Continues one prompt token by token. Closing the generator ends the work.

    Arguments and errors as for `generate`; n must be 1. Errors are raised here, not at the first token.
    """
    batch = _Batch.prepare(model, tokenizer, [prompt], _params(params, fields), page_size)
    if batch.params[0].n != 1:
        raise RequestError("a stream has one continuation: n must be 1", param="n", hint="use batch_generate")
    return _stream(batch)


def batch_generate(
    model: Model,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    page_size: int | None = None,
    **fields: Any,
) -> list[RequestOutput]:
    """Continues several prompts at once, all as one batch on the device.

    Args:
      prompts: texts or lists of token ids.
      params: one for all or one for each.
      page_size: as for `generate`.
      fields: fields of SamplingParams for all, in place of `params` or changing it.

    Returns:
      One output per prompt, in order.
    """
    if isinstance(prompts, str | bytes):
        raise RequestError(
            "prompts must be a list of prompts, not a single text",
            param="prompts",
            hint="pass [prompt], or use generate",
        )
    if not len(prompts):
        return []
    batch = _Batch.prepare(model, tokenizer, prompts, _params(params, fields), page_size)
    for _ in batch.run(STOP_STRIDE if any(p.stop for p in batch.params) else BATCH_STRIDE):
        pass
    return batch.outputs()


def _params(params: Any, fields: dict[str, Any]) -> Any:
    base = SamplingParams(temperature=0.0) if params is None else params
    if isinstance(base, SamplingParams):
        return dataclasses.replace(base, **fields) if fields else base
    return [dataclasses.replace(p, **fields) for p in base] if fields else list(base)


def encode_prompt(tokenizer: Tokenizer | None, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, BOS included if the model wants one; ids are returned as they are."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError(
                "without a tokenizer a prompt must be token ids", param="prompt", hint="pass a list of token ids"
            )
        ids = tokenizer.encode(prompt)
        if not ids:
            if tokenizer.bos_token_id is None:
                raise RequestError("the prompt is empty", param="prompt", hint="give at least one token")
            ids = [tokenizer.bos_token_id]
        return ids
    if not isinstance(prompt, Sequence | np.ndarray) or isinstance(prompt, bytes):
        raise RequestError(
            f"a prompt must be text or a list of token ids; got {type(prompt).__name__}",
            param="prompt",
            hint="decode bytes as UTF-8; wrap a single id in a list",
        )
    if not len(prompt):
        raise RequestError("the prompt is empty", param="prompt", hint="give at least one token")
    for token in prompt:
        if not isinstance(token, int | np.integer) or isinstance(token, bool):
            raise RequestError(
                f"the prompt holds {token!r}, which is no token id", param="prompt", hint="token ids are integers"
            )
    return [int(token) for token in prompt]


def token_limit(config: LlamaConfig, prompt_length: int, max_tokens: int | None) -> int:
    """How many tokens may follow a prompt; the model's context bounds both together.

    Raises:
      RequestError: the prompt, or prompt and max_tokens, exceed the context.
    """
    context = config.context_length
    if prompt_length >= context:
        raise RequestError(
            f"the prompt has {prompt_length} tokens, the model's context is {context}",
            param="prompt",
            hint="shorten the prompt",
        )
    if max_tokens is None:
        return context - prompt_length
    if prompt_length + max_tokens > context:
        raise RequestError(
            f"{prompt_length} prompt tokens and max_tokens={max_tokens} exceed the model's context of {context}",
            param="max_tokens",
            hint=f"max_tokens can be {context - prompt_length} at most",
        )
    return max_tokens


@dataclass
class _Batch:
    """One batch from prompts to texts: rows are continuations, `n` of them for each prompt."""

    model: Model
    prompts: list[list[int]]
    params: list[SamplingParams]
    row_prompt: list[int]
    rows: list[RowText]
    limits: list[int]
    logprobs: list[list[TokenLogprob]]
    page_size: int | None = None
    start: float = 0.0
    first: float = 0.0
    decoding: float = 0.0
    end: float = 0.0
    _prompt_logprobs: Logprobs | None = None
    _seen: int = 0
    _stopped_here: bool = False

    @classmethod
    def prepare(
        cls,
        model: Model,
        tokenizer: Tokenizer | None,
        prompts: Sequence[Prompt],
        params: SamplingParams | list[SamplingParams],
        page_size: int | None,
    ) -> _Batch:
        """Checks everything that can be checked before the device is used."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        if len(each) != len(prompts):
            raise RequestError(
                f"{len(prompts)} prompts but {len(each)} sampling parameters",
                param="params",
                hint="give one SamplingParams for all, or one for each prompt",
            )
        if page_size is not None:
            check_page_size(page_size)
        config = model.config
        for p in each:
            p.check_vocab(config.vocab_size)
        ids = [encode_prompt(tokenizer, p) for p in prompts]
        for i, tokens in enumerate(ids):
            bad = next((t for t in tokens if not 0 <= t < config.vocab_size), None)
            if bad is not None:
                raise RequestError(
                    f"prompt {i} holds token id {bad}; the vocabulary has {config.vocab_size}",
                    param="prompt",
                    hint="encode the prompt with this model's tokenizer",
                )
        if tokenizer is None and any(p.stop for p in each):
            raise RequestError("stop strings need a tokenizer", param="stop", hint="use stop_token_ids")
        row_prompt = [i for i, p in enumerate(each) for _ in range(p.n)]
        rows, limits = [], []
        for i in row_prompt:
            p = each[i]
            rows.append(RowText(tokenizer, p, p.ending_ids(model.eos_token_ids), ids[i]))
            limits.append(token_limit(config, len(ids[i]), p.max_tokens))
        return cls(model, ids, list(each), row_prompt, rows, limits, [[] for _ in rows], page_size)

    def run(self, stride: int) -> Iterator[list[tuple[int, str]]]:
        """Runs the batch, `stride` steps a dispatch; after each yields what is new, a (row, text) pair per token."""
        model, config = self.model, self.model.config
        self.start = time.perf_counter()
        padded = buckets.prompt_bucket(max(len(p) for p in self.prompts))
        longest = max(self.limits)
        capacity, *larger = buckets.capacities(padded, longest)
        batch = self._rows(len(self.rows))
        options, sampler = self._sampler(batch)
        repeated = len(self.rows) != len(self.prompts)
        logits, cache, self._prompt_logprobs = self._on_devices(
            prefill.prefill,
            model.params,
            config,
            self.prompts,
            rows=self._rows(len(self.prompts)) if repeated else batch,
            capacity=capacity,
            dtype=model.dtype,
            page_size=self.page_size,
            prompt_logprobs=max(
                (p.prompt_logprobs for p in self.params if p.prompt_logprobs is not None), default=None
            ),
        )
        if repeated:
            logits, cache = self._on_devices(prefill.take_rows, logits, cache, _padded(self.row_prompt, batch, 0))
        lengths = _padded([len(self.prompts[i]) for i in self.row_prompt], batch, 1)
        limits = _padded(self.limits, batch, 0)
        room = capacity - padded
        state, progress = self._on_devices(
            loop.first_token, logits, cache, sampler, lengths, limits, options=options, room=room
        )
        new = self._read(progress)
        self.first = self.decoding = self.end = time.perf_counter()
        yield new

        if not all(row.finish_reason for row in self.rows):
            # No step yet: it only compiles the program, so that the rate of decoding is that of decoding.
            state, _ = self._on_devices(
                loop.advance, model.params, state, np.int32(1), config=config, options=options, many=stride > 1
            )
            self.decoding = self.end = time.perf_counter()
        ahead: deque[loop.Progress] = deque()
        steps = 1
        while not all(row.finish_reason for row in self.rows):
            # A stream keeps one dispatch ahead: the device works while the host turns the last token into text.
            while len(ahead) < (2 if stride == 1 else 1) and steps < longest:
                if steps == room:
                    capacity = larger.pop(0)
                    room = capacity - padded
                    state = self._on_devices(loop.grow, state, capacity=capacity, room=room)
                steps = min(steps + stride, room)
                state, progress = self._on_devices(
                    loop.advance,
                    model.params,
                    state,
                    np.int32(steps),
                    config=config,
                    options=options,
                    many=stride > 1,
                )
                ahead.append(progress)
            new = self._read(ahead.popleft())
            self.end = time.perf_counter()
            if self._stopped_here:
                ended = [row.finish_reason is not None for row in self.rows]
                state = self._on_devices(loop.stop_rows, state, _padded(ended, batch, True))
                self._stopped_here = False
            yield new

    def _on_devices[**P, R](self, dispatch: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """A call on the model's mesh with its kernels. No context around `run`, which yields to the caller."""
        with on(self.model.mesh), using(**self.model.kernels):
            return dispatch(*args, **kwargs)

    def _rows(self, rows: int) -> int:
        """Padded batch size, the same on every device."""
        with on(self.model.mesh):
            return buckets.batch_bucket(rows)

    def _sampler(self, batch: int) -> tuple[SamplerOptions, SamplerState]:
        """The sampler of the padded batch. With n > 1 and a seed, the continuations take seed, seed + 1, ..."""
        row_params, row_prompts = [], []
        copy = 0
        for row, i in enumerate(self.row_prompt):
            copy = copy + 1 if row and self.row_prompt[row - 1] == i else 0
            p = self.params[i]
            row_params.append(p if p.seed is None else dataclasses.replace(p, seed=(p.seed + copy) % 2**64))
            row_prompts.append(self.prompts[i])
        for _ in range(batch - len(row_params)):
            row_params.append(SamplingParams(temperature=0.0))
            row_prompts.append([])
        return make_sampler(row_params, row_prompts, self.model.config.vocab_size, self.model.eos_token_ids)

    def _read(self, progress: loop.Progress) -> list[tuple[int, str]]:
        """Takes over the tokens that a dispatch has added."""
        host = jax.device_get(progress)
        new = []
        for step in range(self._seen, int(host.step)):
            for index, row in enumerate(self.rows):
                if row.finish_reason:
                    continue
                text = row.add(int(host.output[index, step]), limit=self.limits[index])
                new.append((index, text))
                n = row.params.logprobs
                if n is not None and host.logprobs is not None:
                    self.logprobs[index].append(_logprob(host.logprobs, (index, step), row.token_ids[-1], n))
                if row.finish_reason and not host.done[index]:
                    self._stopped_here = True
        self._seen = max(self._seen, int(host.step))
        return new

    def timing(self) -> Timing:
        """Of the whole batch, as far as it has run."""
        prefill, decoding = self.first - self.start, self.end - self.decoding
        generated = sum(len(row.token_ids) - 1 for row in self.rows)
        return Timing(
            ttft_s=prefill,
            prompt_tps=sum(map(len, self.prompts)) / prefill if prefill else 0.0,
            generation_tps=generated / decoding if decoding else 0.0,
        )

    def outputs(self) -> list[RequestOutput]:
        """One output per prompt, once `run` has ended."""
        timing = self.timing()
        prompt_logprobs = jax.device_get(self._prompt_logprobs)
        outputs = []
        for i, (prompt, params) in enumerate(zip(self.prompts, self.params, strict=True)):
            rows = [r for r, owner in enumerate(self.row_prompt) if owner == i]
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
                        _logprob(prompt_logprobs, (i, start + j), token, params.prompt_logprobs)
                        for j, token in enumerate(prompt[1:])
                    ),
                )
            outputs.append(RequestOutput(tuple(prompt), tuple(completions), timing, of_prompt))
        return outputs


def _stream(batch: _Batch) -> Iterator[StreamOutput]:
    (row,) = batch.rows
    for new in batch.run(stride=1):
        for _, text in new:
            timing = batch.timing()
            yield StreamOutput(
                text=text,
                token=row.token_ids[-1],
                logprobs=batch.logprobs[0][-1] if batch.logprobs[0] else None,
                prompt_tokens=len(batch.prompts[0]),
                prompt_tps=timing.prompt_tps,
                generation_tokens=len(row.token_ids),
                generation_tps=timing.generation_tps,
                ttft_s=timing.ttft_s,
                finish_reason=row.finish_reason,
            )


def _padded(values: Sequence[Any], length: int, fill: Any) -> np.ndarray:
    """Array of `values` with `fill` up to `length`: int32, or bool for bools."""
    array = np.asarray([*values, *[fill] * (length - len(values))])
    return array if array.dtype == bool else array.astype(np.int32)


def _logprob(logprobs: Logprobs, at: tuple[int, int], token: int, n: int) -> TokenLogprob:
    value = float(logprobs.token[at])
    top = {int(i): float(v) for i, v in zip(logprobs.top_ids[at][:n], logprobs.top[at][:n], strict=True)}
    return TokenLogprob(token, value, {**top, token: value} if n else {token: value})
