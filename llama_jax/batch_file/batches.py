"""Requests that run together: which ones, and their results."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import jax

from llama_jax.batch_file.records import Record
from llama_jax.batch_file.request import Request
from llama_jax.errors import DoesNotFit
from llama_jax.generation import batch_generate
from llama_jax.model.loaded import Model
from llama_jax.text.tokenizer import Tokenizer


def plan(requests: Iterable[Request], batch_size: int) -> Iterator[list[Request]]:
    """Batches of up to `batch_size` continuations, similar in prompt length and in how long they may become."""
    batch: list[Request] = []
    rows = 0
    for r in sorted(requests, key=lambda r: (r.longest, r.params.max_tokens or 0, r.line.index)):
        if batch and rows + r.rows > batch_size:
            yield batch
            batch, rows = [], 0
        batch.append(r)
        rows += r.rows
    if batch:
        yield batch


def generate(model: Model, tokenizer: Tokenizer, batch: list[Request]) -> list[tuple[Request, Record, int]]:
    """Of each request its output line, and the number of its new tokens."""
    prompts = [(prompt, r.params) for r in batch for prompt in r.prompts]
    try:
        outputs = iter(batch_generate(model, tokenizer, [p for p, _ in prompts], [params for _, params in prompts]))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        rows, longest = sum(r.rows for r in batch), max(r.longest for r in batch)
        raise DoesNotFit(
            f"a batch of {rows} with up to {longest} prompt tokens does not fit into the device's memory",
            hint="run again with a smaller --batch-size: the run resumes",
        ) from error
    made = []
    for r in batch:
        own = [*itertools.islice(outputs, len(r.prompts))]
        tokens = sum(len(c.token_ids) for output in own for c in output.outputs)
        made.append((r, r.line.answered(r, own, model, tokenizer), tokens))
    return made
