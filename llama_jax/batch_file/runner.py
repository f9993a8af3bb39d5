"""A batch run: requests in batches of similar length, results to the journal.

Which requests share a batch depends on the input and the batch size alone. So a run that was killed and resumed
generates every batch with the rows that it would have had, and ends with the file that an undisturbed run writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax

from llama_jax.batch_file.journal import Journal
from llama_jax.batch_file.lines import Request, output_record, parse_line
from llama_jax.errors import DoesNotFit, RequestError
from llama_jax.generation import batch_generate
from llama_jax.model.loaded import Model
from llama_jax.sampling import SamplingParams
from llama_jax.text.tokenizer import Tokenizer

# Batches whose lines are read and sorted by length together: enough to sort well, little enough to start soon.
WINDOW = 32


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
      done, total: lines, those of earlier runs included.
      fresh: lines of this run.
      prompt_tokens, generated_tokens, seconds: of this run.
    """

    done: int
    total: int
    fresh: int
    errors: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float

    @property
    def generation_tps(self) -> float:
        """Generated tokens per second of this run, prefill included."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Summary(Status):
    """How a run ended.

    Attributes:
      interrupted: whether it was asked to stop before the end.
      cut: bytes of a torn line that an earlier run had left.
    """

    interrupted: bool = False
    cut: int = 0


def run(
    model: Model,
    tokenizer: Tokenizer,
    source: Path,
    target: Path,
    *,
    sampling: SamplingParams,
    batch_size: int = 8,
    strict: bool = False,
    overwrite: bool = False,
    identity: Mapping[str, Any] | None = None,
    progress: Callable[[Status], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Summary:
    """Generates every line of `source` and writes the results to `target`, going on where an earlier run ended.

    Args:
      source: JSON lines, see `parse_line`; empty lines are passed over.
      target: JSON lines, one for each of the input's, with "index" (the input line's number, from 0), "id", "text",
        "token_ids", "finish_reason" and so on, or "error". In the input's order once all are there.
      sampling: for lines that do not say otherwise; line i without a seed takes `sampling.seed + i`.
      batch_size: continuations generated together, at most. A resumed run may choose another.
      strict: raise at the first bad line, before anything is generated, instead of writing an error for it.
      overwrite: discard what `target` holds.
      identity: what else the results depend on (the model's digest, say); a resumed run must have the same.
      progress: called after every batch.
      stop: asked after every batch whether to end early.

    Raises:
      RequestError: a parameter is out of range, the input cannot be read, the output belongs to another run, or
        (strict) a line is bad.
      StorageError, DoesNotFit: the output cannot be written, or a batch does not fit into the device's memory.
      CheckpointError: the output is damaged.
    """
    if batch_size < 1:
        raise RequestError(f"batch_size must be at least 1; got {batch_size}", param="batch_size", hint="8 is usual")
    if target.exists() and source.exists() and target.samefile(source):
        raise RequestError("input and output are the same file", param="output", hint="choose another output file")
    total, digest = _survey(source)
    settings = {
        "format": 1,
        "input": digest,
        "dtype": str(model.dtype),
        **json.loads(json.dumps(dataclasses.asdict(sampling))),  # as they are read back from the disk
        **(identity or {}),
    }

    def parse(index: int, raw: bytes) -> Request | dict[str, Any]:
        return parse_line(raw, index, tokenizer, model.config, sampling)

    if strict:
        _refuse_bad_lines(parse(*line) for line in _lines(source))
    with Journal(target, settings=settings, overwrite=overwrite) as journal:
        start, before = time.perf_counter(), len(journal.done)
        prompt_tokens = generated_tokens = 0

        def status() -> Status:
            done, seconds = len(journal.done), time.perf_counter() - start
            return Status(done, total, done - before, journal.errors, prompt_tokens, generated_tokens, seconds)

        if progress:
            progress(status())
        for window in itertools.batched(_lines(source), WINDOW * batch_size):
            if stop():
                break
            if all(index in journal.done for index, _ in window):
                continue
            parsed = [parse(*line) for line in window]
            journal.append([r for r in parsed if isinstance(r, dict) and r["index"] not in journal.done])
            for batch in plan([r for r in parsed if isinstance(r, Request)], batch_size):
                if stop():
                    break
                if all(r.index in journal.done for r in batch):
                    continue
                # Also where only some of its lines are missing, the batch is generated whole: see above.
                records = _generate(model, tokenizer, batch)
                journal.append([r for r in records if r["index"] not in journal.done])
                prompt_tokens += sum(len(r.prompt) for r in batch)
                generated_tokens += sum(_generated(r) for r in records)
                if progress:
                    progress(status())
        if len(journal.done) == total:
            journal.sort()
        return Summary(**dataclasses.asdict(status()), interrupted=len(journal.done) < total, cut=journal.cut)


def plan(requests: Iterable[Request], batch_size: int) -> Iterator[list[Request]]:
    """Batches of up to `batch_size` continuations, similar in prompt length and in how long they may become."""
    batch: list[Request] = []
    rows = 0
    for r in sorted(requests, key=lambda r: (len(r.prompt), r.params.max_tokens or 0, r.index)):
        if batch and rows + r.params.n > batch_size:
            yield batch
            batch, rows = [], 0
        batch.append(r)
        rows += r.params.n
    if batch:
        yield batch


def _generate(model: Model, tokenizer: Tokenizer, batch: list[Request]) -> list[dict[str, Any]]:
    try:
        outputs = batch_generate(model, tokenizer, [r.prompt for r in batch], [r.params for r in batch])
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        rows, longest = sum(r.params.n for r in batch), max(len(r.prompt) for r in batch)
        raise DoesNotFit(
            f"a batch of {rows} with up to {longest} prompt tokens does not fit into the device's memory",
            hint="run again with a smaller --batch-size: the run resumes",
        ) from error
    return [output_record(r, output) for r, output in zip(batch, outputs, strict=True)]


def _generated(record: Mapping[str, Any]) -> int:
    return sum(len(c["token_ids"]) for c in record.get("outputs", [record]))


def _refuse_bad_lines(parsed: Iterable[Request | dict[str, Any]]) -> None:
    for result in parsed:
        if isinstance(result, dict):
            error = result["error"]
            raise RequestError(
                f"line {result['index'] + 1} of the input: {error['message']}",
                param=error.get("param", "line"),
                hint=error["hint"],
            )


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is not empty."""
    with _open(source) as file:
        for index, raw in enumerate(file):
            if raw.strip():
                yield index, raw


def _survey(source: Path) -> tuple[int, str]:
    """Number of lines and digest of the input."""
    digest = hashlib.sha256()
    total = 0
    with _open(source) as file:
        for raw in file:
            digest.update(raw)
            total += bool(raw.strip())
    return total, f"sha256:{digest.hexdigest()}"


def _open(source: Path) -> BinaryIO:
    # Read more than once, so that a pipe will not do.
    if source.exists() and not source.is_file():
        raise RequestError(f"{source} is not a regular file", param="input", hint="give a file of JSON lines")
    try:
        return open(source, "rb")
    except OSError as error:
        raise RequestError(
            f"cannot read {source}: {error.strerror}", param="input", hint="give a file of JSON lines"
        ) from error
