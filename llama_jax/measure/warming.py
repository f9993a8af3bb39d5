"""Warm-up of an engine before it is measured: runs each of its programs for greedy requests once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llama_jax.engine.settings import EngineSettings
from llama_jax.measure.workloads import FIRST_ID, Work


def warm_up(settings: EngineSettings, vocab: int) -> Iterator[list[Work]]:
    """Groups of requests, each to be answered before the next: prompts that fill each mixed step, alone and beside more
    rows than a step for few has, and as many short requests as each decode step has rows."""
    rng = np.random.default_rng(0)
    longest = settings.context

    def work(number: int, length: int, new: int) -> Work:
        # Random ids: prompts with a common prefix would share it, and make smaller steps.
        return Work(number, 0.0, tuple(rng.integers(FIRST_ID, vocab, length).tolist()), new)

    def prompts(tokens: int) -> list[Work]:
        whole, rest = divmod(tokens, longest - 1)
        return [work(i, length, 1) for i, length in enumerate([longest - 1] * whole + [rest] * bool(rest))]

    def decoding(rows: int) -> list[Work]:
        # Some prompts begin in each step; the first rows must last until the others have begun.
        new = -(-rows // settings.chunk_rows) + 4 * settings.steps
        return [work(i, 1, min(new, longest - 1)) for i in range(rows)]

    for tokens in settings.few_tokens:
        yield prompts(tokens)
    beside = settings.few_rows + 1 if settings.few_tokens else 0
    for tokens in settings.mixed_tokens:
        if tokens > beside:
            yield [*decoding(beside), *prompts(tokens - beside)]
    for rows in settings.decode_rows:
        yield decoding(rows)
