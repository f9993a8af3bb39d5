"""The device's side of a batch whose rows begin together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from llama_jax.cache import KVCache, NewCache
from llama_jax.decode import buckets, loop
from llama_jax.decode.prefill import NO_ROW, fork_rows, prefill
from llama_jax.generation.request import Requests
from llama_jax.kernels.dispatch import using
from llama_jax.model.loaded import Model
from llama_jax.sampling import Logprobs, SamplingParams, make_sampler
from llama_jax.sharding import on, ways


class Session:
    """Prefill, the first tokens, then dispatches of decode steps. Each call returns before the device has done the
    work."""

    def __init__(self, model: Model, requests: Requests, stride: int):
        self._model, self._requests, self._stride = model, requests, stride
        self._padded = buckets.prompt_bucket(max(map(len, requests.prompts)))
        self._longest = max(row.limit for row in requests.rows)
        self._capacity, *self._larger = buckets.capacities(self._padded, self._longest)
        self._batch = self._on_devices(buckets.batch_bucket, len(requests.rows))
        # Of each row the prompt that it is prefilled with; a prompt's later rows are forked from its first one.
        self._owners = [row.prompt for row in requests.rows]
        self._first = np.unique(self._owners, return_index=True)[1].tolist()
        self._fork = len(self._first) < len(self._owners) and not self._on_devices(self._several_pools)
        self._tokens = 1
        self._prefilled: tuple[jax.Array, KVCache]
        self._state: loop.DecodeState

    @property
    def ended(self) -> bool:
        """Whether the longest row has all of its tokens."""
        return self._tokens >= self._longest

    def prefill(self) -> Logprobs | None:
        """Runs the prompts; gives their log-probabilities, if asked for."""
        model, requests, owners, first, fork = self._model, self._requests, self._owners, self._first, self._fork
        prompts = requests.prompts if fork else [requests.prompts[i] for i in owners]
        logits, cache, prompt_logprobs = self._on_devices(
            prefill,
            model.params,
            model.config,
            prompts,
            NewCache(self._batch, self._capacity, model.dtype, requests.page_size),
            rows=first if fork else None,
            padded_rows=self._on_devices(buckets.batch_bucket, len(prompts)) if fork else self._batch,
            adapters=requests.adapters,
            adapter_ids=requests.adapter_ids if fork else [requests.adapter_ids[i] for i in owners],
            prompt_logprobs=any(p.prompt_logprobs is not None for p in requests.params),
        )
        self._prefilled = logits, cache
        if prompt_logprobs is not None and not fork and len(first) < len(owners):
            return Logprobs(*(x[np.asarray(first)] for x in vars(prompt_logprobs).values()))
        return prompt_logprobs

    def wait(self) -> None:
        """Returns once the prompts have run."""
        jax.block_until_ready(self._prefilled[0])

    def begin(self) -> loop.Progress:
        """Draws the first tokens after the prompts."""
        model, requests, owners = self._model, self._requests, self._owners
        rows = requests.rows
        logits, cache = self._prefilled
        del self._prefilled  # the cache is donated
        source = None
        if self._fork:
            others = np.setdiff1d(np.arange(len(rows)), self._first).tolist()
            sources = _padded([self._first[owners[i]] for i in others], self._batch, NO_ROW)
            cache = self._on_devices(fork_rows, cache, sources, _padded(others, self._batch, NO_ROW))
            source = _padded(owners, self._batch, 0)
        idle = SamplingParams(temperature=0.0)
        spare = self._batch - len(rows)
        self._profile, sampler = make_sampler(
            [*(row.params for row in rows), *[idle] * spare],
            [*(requests.prompt_of(i) for i in range(len(rows))), *[()] * spare],
            model.config.vocab_size,
            model.eos_token_ids,
        )
        self._state, progress = self._on_devices(
            loop.begin,
            logits,
            cache,
            sampler,
            _padded([len(requests.prompts[i]) for i in owners], self._batch, 1),
            _padded([row.limit for row in rows], self._batch, 0),
            _padded([requests.adapter_ids[i] for i in owners], self._batch, 0),
            source,
            profile=self._profile,
        )
        return progress

    def advance(self, steps: int) -> loop.Progress:
        """Runs at most `steps` decode steps; 0 only compiles the program."""
        room = self._capacity - self._padded
        if steps and self._tokens == room:
            self._capacity = self._larger.pop(0)
            self._state = self._on_devices(loop.grow, self._state, capacity=self._capacity)
            room = self._capacity - self._padded
        steps = min(steps, room - self._tokens)
        self._tokens += steps
        self._state, progress = self._on_devices(
            loop.advance,
            self._model.params,
            self._state,
            np.int32(steps),
            config=self._model.config,
            profile=self._profile,
            stride=self._stride,
            adapters=self._requests.adapters,
        )
        return progress

    def stop(self, rows: Sequence[bool]) -> None:
        """Ends rows."""
        self._state = self._on_devices(loop.stop_rows, self._state, _padded(rows, self._batch, True))

    def _several_pools(self) -> bool:
        """Whether rows are in pools of different replicas, so that they have no pages in common."""
        return self._requests.page_size is not None and ways("batch") > 1

    def _on_devices[**P, R](self, dispatch: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """A call on the model's mesh, with its kernels."""
        with on(self._model.mesh), using(**self._model.kernels):
            return dispatch(*args, **kwargs)


def _padded(values: Sequence[Any], length: int, fill: Any) -> np.ndarray:
    """Array of `values` with `fill` up to `length`: int32, or bool for bools."""
    array = np.asarray([*values, *[fill] * (length - len(values))])
    return array if array.dtype == bool else array.astype(np.int32)
