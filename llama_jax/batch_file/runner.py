"""A batch run: runs the lines of a file through an engine and writes results as they come.

A line's result depends on the line and its seed, not on the lines beside it: a run that was killed and resumed writes
the same as an undisturbed one (in bfloat16 except for near-ties, which may fall either way in another batch).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from llama_jax.batch_file.journal import Journal, check_output
from llama_jax.batch_file.lines import Findings, Refused, read_line, refusal, survey
from llama_jax.batch_file.output import Output, Stream
from llama_jax.batch_file.records import Record
from llama_jax.batch_file.request import Request
from llama_jax.batch_file.source import STANDARD, Source
from llama_jax.config import LlamaConfig
from llama_jax.engine.settings import BIASES, STOP_IDS
from llama_jax.engine.sizing import default_rows
from llama_jax.errors import LlamaJaxError, RequestError
from llama_jax.generation.constraints import constraints_of
from llama_jax.generation.llm import LLM
from llama_jax.generation.outputs import RequestOutput
from llama_jax.generation.request import Requests, prepare
from llama_jax.model.loaded import Model
from llama_jax.sampling import SamplingParams, check_widths
from llama_jax.sharding import ruled
from llama_jax.text.tokenizer import Tokenizer

WINDOW = 32
"""Lines per row that are read and ordered together: enough to order well, few enough to start soon."""

AHEAD = 4
"""Prompts per row that run or wait at once."""

WRITE_EVERY_S = 0.2
"""Interval between writes: a kill loses the results since the last one."""


@dataclass(frozen=True)
class Status:
    """Progress of a run.

    Attributes:
      done, total: lines, those of earlier runs included.
      fresh: lines of this run.
      errors: lines among those done that could not be generated.
      prompt_tokens, generated_tokens, seconds: of this run.
      cache_used: share of the cache held by running sequences.
    """

    done: int
    total: int
    fresh: int
    errors: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    cache_used: float

    @property
    def generation_tps(self) -> float:
        """Generated tokens per second of this run, prefill included."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Summary(Status):
    """Result of a run.

    Attributes:
      interrupted: whether it was asked to stop before the end.
      cut: bytes of a torn line left by an earlier run.
    """

    interrupted: bool = False
    cut: int = 0


class BatchFile:
    """A run over a file in three steps, so that errors are found before a model is loaded; a context manager.

        with BatchFile(source, target, sampling=sampling, dtype="float32") as batch:
            batch.open(tokenizer, config, identity={"model": digest})
            summary = batch.run(model, tokenizer)

    Attributes:
      findings: about the input.
    """

    def __init__(
        self,
        source: Path,
        target: Path,
        *,
        sampling: SamplingParams,
        dtype: str,
        kv_dtype: str | None = None,
        batch_size: int | None = None,
        batch_invariant: bool = False,
        strict: bool = False,
        overwrite: bool = False,
    ):
        """Reads the whole input, and checks everything that needs no model.

        Args:
          source: JSON lines, see `own.OwnLine` and `openai.OpenAILine`; empty lines are skipped. "-" is standard input.
          target: the output, one line per input line, in the input's order once all are there. "-" is standard
            output, which cannot be resumed.
          sampling: defaults for lines; line i without a seed takes `sampling.seed + i`.
          dtype: of the computation; kv_dtype: of the model's keys and values (`Model`).
          batch_size: most continuations generated together; by default as many as suit the device
            (`default_settings`). A resumed run may choose another, unless it is batch-invariant.
          batch_invariant: bitwise identical results in any order and batch (`EngineSettings`).
          strict: refuse an input with a bad line, or with equal ids.
          overwrite: discard what `target` holds.

        Raises:
          RequestError: a value is out of range, the input cannot be read, the output belongs to another run, or
            (strict) a line is bad.
          StorageError: the output cannot be a file.
          CheckpointError: the output is damaged.
        """
        if batch_size is not None and batch_size < 1:
            raise RequestError(f"batch_size must be at least 1; got {batch_size}", param="batch_size", hint="e.g. 8")
        if STANDARD not in (source, target) and target.exists() and source.exists() and target.samefile(source):
            raise RequestError("input and output are the same file", param="output", hint="choose another output file")
        self._target, self._sampling, self._batch_size = target, sampling, batch_size
        self._batch_invariant, self._strict, self._overwrite = batch_invariant, strict, overwrite
        self._source = Source(source)
        self._output: Output | None = None
        try:
            self._settings = {
                "format": 1,
                "input": self._source.digest,
                "dtype": dtype,
                **({} if kv_dtype is None else {"kv_dtype": kv_dtype}),
                **json.loads(json.dumps(dataclasses.asdict(sampling))),  # as they are read back from disk
                # An engine of another size rounds differently.
                **({"batch_invariant": {"batch_size": batch_size}} if batch_invariant else {}),
            }
            self.findings: Findings = survey(self._source.lines(), sampling)
            if strict:
                self._refuse_findings()
            if target != STANDARD:
                check_output(target, self._settings, overwrite=overwrite)
        except BaseException:
            self._source.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._source.close()
        if self._output is not None:
            self._output.__exit__(*raised)

    def open(self, tokenizer: Tokenizer, config: LlamaConfig, identity: Mapping[str, Any] | None = None) -> None:
        """Checks the lines against tokenizer and context (strict), and opens the output. Needs no weights.

        Args:
          identity: other values the results depend on (e.g. the model's digest); a resumed run must have the same.

        Raises:
          RequestError, CheckpointError: as the constructor does.
          StorageError, DoesNotFit: the output cannot be written, or another process is writing it.
        """
        if self._strict:
            for _ in self._requests(self._source.lines(), tokenizer, config, config.eos_token_ids, strict=True):
                pass
        if self._target == STANDARD:
            self._output = Stream(sys.stdout.buffer, self._source.indices)
        else:
            self._output = Journal(
                self._target, settings=self._settings | {**(identity or {})}, overwrite=self._overwrite
            )

    def run(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        drafts: int = 0,
        draft: Model | None = None,
        progress: Callable[[Status], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Summary:
        """Generates every line that the output lacks.

        Args:
          drafts, draft: of `LLM`; they change no result.
          progress: called at the beginning, and whenever lines have reached the disk.
          stop: called at every step; True ends the run early. Lines with a started answer are finished.

        Raises:
          RequestError: the input has changed.
          StorageError, DoesNotFit: the output cannot be written, or the device's memory is too small.
        """
        output, total = self._output, len(self._source.indices)
        assert output is not None, "open() comes first"
        rows = self._batch_size or default_rows(model)
        of_replica = -(-rows // ruled(model.mesh).ways("batch"))
        options: dict[str, Any] = {"rows": of_replica, "drafts": drafts, "draft": draft}
        if self._batch_invariant:  # such an engine does not grow
            options |= {"batch_invariant": True, "context": model.config.context_length}
        llm = LLM(model, tokenizer, **options)
        start, before, written = time.perf_counter(), len(output.done), time.perf_counter()
        prompt_tokens = generated_tokens = 0
        records: list[Record] = []

        def status() -> Status:
            done, seconds = len(output.done), time.perf_counter() - start
            used = llm.snapshot().cache_use
            return Status(done, total, done - before, output.errors, prompt_tokens, generated_tokens, seconds, used)

        def write() -> None:
            nonlocal written
            output.append(records)
            records.clear()
            written = time.perf_counter()
            if progress:
                progress(status())

        def asked() -> Iterator[tuple[Request, Requests]]:
            for window in itertools.batched(self._source.lines(), WINDOW * rows):
                missing = [line for line in window if line[0] not in output.done]
                read = [*self._requests(missing, tokenizer, model.config, model.eos_token_ids)]
                records.extend(r.record for r in read if isinstance(r, Refused))
                # Longest first, so that short ones remain at the end. Others in the input's order, where neighbours
                # often begin alike.
                requests = [r for r in read if isinstance(r, Request)]
                for r in sorted(requests, key=lambda r: r.params.max_tokens or 0, reverse=True):
                    yield r, prepare(model, tokenizer, r.prompts, r.params, r.adapter(model))

        outputs: dict[int, dict[int, RequestOutput]] = {}  # of lines with several prompts, until all are there
        try:
            write()
            for r, number, made in llm.serve(asked(), ahead=AHEAD * rows, stop=stop):
                answers = outputs.setdefault(r.line.index, {})
                answers[number] = made
                if len(answers) == len(r.prompts):
                    ready = [answers[i] for i in range(len(answers))]
                    del outputs[r.line.index]
                    records.append(r.line.answered(r, ready, model, tokenizer))
                    prompt_tokens += sum(map(len, r.prompts))
                    generated_tokens += sum(len(c.token_ids) for each in ready for c in each.outputs)
                if time.perf_counter() - written > WRITE_EVERY_S:
                    write()
        finally:
            write()
        if len(output.done) == total:
            output.finish()
        return Summary(**dataclasses.asdict(status()), interrupted=len(output.done) < total, cut=output.cut)

    def _requests(
        self,
        lines: Iterable[tuple[int, bytes]],
        tokenizer: Tokenizer,
        config: LlamaConfig,
        eos_token_ids: Sequence[int],
        *,
        strict: bool = False,
    ) -> Iterator[Request | Refused]:
        """The lines' requests. Strict: raises the error of the first bad one."""
        for index, raw in lines:
            read = read_line(index, raw, self._sampling)
            if not isinstance(read, Refused):
                try:
                    request = read.request(tokenizer, config)
                    check_widths(request.params, eos_token_ids, stop_width=STOP_IDS, bias_width=BIASES)
                    for prompt in request.prompts:
                        constraints_of(tokenizer, prompt, request.params, config.vocab_size, eos_token_ids)
                    yield request
                    continue
                except LlamaJaxError as error:
                    read = Refused(read.line, error)
            if strict:
                raise refusal(read)
            yield read

    def _refuse_findings(self) -> None:
        if self.findings.first_bad is not None:
            raise refusal(self.findings.first_bad)
        if self.findings.equal:
            raise RequestError(self.findings.equal_ids(), param="id", hint="make the ids differ, or leave out --strict")


def run(
    model: Model,
    tokenizer: Tokenizer,
    source: Path,
    target: Path,
    *,
    sampling: SamplingParams,
    batch_size: int | None = None,
    batch_invariant: bool = False,
    strict: bool = False,
    overwrite: bool = False,
    identity: Mapping[str, Any] | None = None,
    progress: Callable[[Status], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Summary:
    """Generates every line of `source` and writes the results to `target`, resuming where an earlier run ended.

    Args, Raises: see `BatchFile`, which does the same in three steps.
    """
    batch = BatchFile(
        source,
        target,
        sampling=sampling,
        dtype=str(model.dtype),
        kv_dtype=model.kv_dtype,
        batch_size=batch_size,
        batch_invariant=batch_invariant,
        strict=strict,
        overwrite=overwrite,
    )
    with batch:
        batch.open(tokenizer, model.config, identity)
        return batch.run(model, tokenizer, progress=progress, stop=stop)
