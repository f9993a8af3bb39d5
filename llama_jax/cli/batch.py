"""`llama-jax batch`: generate a file of prompts, resumable after a kill at any moment."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama_jax.cli.adapter_options import adapter_option, given_adapter, recorded
from llama_jax.cli.errors import INTERRUPTED
from llama_jax.cli.options import (
    batch_invariant_option,
    check_drafts,
    claim_memory,
    draft_model_option,
    drafts_option,
    dtype_option,
    given,
    kv_dtype_option,
    mesh_options,
    model_option,
    quiet_option,
    receipt_option,
    requested_mesh,
    sampling_options,
)
from llama_jax.cli.progress import Reporter
from llama_jax.cli.terminal import catch_interrupt, print_json, printable

if TYPE_CHECKING:
    from rich.progress import Progress

    from llama_jax.batch_file import Findings, Status, Summary

LINE_EVERY_S = 10.0
SOME_FAILED = 1
"""Exit code of a complete run in which lines failed."""


@click.command(
    name="batch",
    epilog="""\b
Each line of IN is an object with one of
  "prompt": text          "messages": [{"role": …, "content": …}]          "token_ids": [1, 2, …]
and optionally "id", sampling fields such as "max_tokens", "temperature", "seed" or "stop", and for messages "tools".

\b
Each line of OUT has "index" (the line of IN, from 0), "id", "prompt_tokens", "text", "token_ids", "finish_reason", or
"error" for a line that cannot be generated. During the run, lines appear as they are finished; at its end they are in
the order of IN.

\b
Lines of OpenAI's Batch API are answered in its format:
  {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": […]}}
  {"custom_id": "2", "method": "POST", "url": "/v1/completions", "body": {"prompt": …}}
--model answers them all, whatever model they name, but for those that name an adapter (--adapter NAME=FOLDER), and what
a body does not say is taken from the options.

\b
The exit code is 0 if every line was generated, 1 if some lines have an error or a finish_error, 130 if the run was
interrupted; see `llama-jax --help` for errors of the whole run.

\b
Examples:
  llama-jax batch prompts.jsonl answers.jsonl
  llama-jax batch prompts.jsonl answers.jsonl --batch-size 32 --temperature 0.7 --top-p 0.95
  llama-jax batch texts.jsonl scores.jsonl --max-tokens 0 --prompt-logprobs 0
  zcat prompts.jsonl.gz | llama-jax batch - - > answers.jsonl
Run the same command again after an interruption: it resumes.
""",
)
@click.argument("source", metavar="IN", type=click.Path(path_type=Path, allow_dash=True))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path, allow_dash=True))
@model_option
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Maximum number of continuations at once. [default: 256 on a GPU, 8 on a CPU]",
)
@click.option(
    "--max-tokens",
    type=int,
    default=256,
    show_default=True,
    metavar="N",
    help="Maximum number of new tokens per line; 0 with --prompt-logprobs only scores prompts.",
)
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, metavar="T", help="0 takes the likeliest token."
)
@sampling_options
@click.option("--prompt-logprobs", type=int, metavar="N", help="Also log-probabilities of the prompt; N likeliest ids.")
@drafts_option
@draft_model_option
@batch_invariant_option
@dtype_option
@kv_dtype_option
@adapter_option
@mesh_options
@click.option("--strict", is_flag=True, help="Refuse IN if a line is bad or an id occurs twice; generate nothing then.")
@click.option("--overwrite", is_flag=True, help="Start over, whatever OUT contains.")
@click.option("--no-verify", is_flag=True, help="Do not check the weights' digests while loading.")
@receipt_option
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def command(
    source: Path,
    target: Path,
    model: str,
    batch_size: int | None,
    drafts: int,
    draft_model: str | None,
    batch_invariant: bool,
    dtype: str | None,
    kv_dtype: str | None,
    adapters: tuple[str, ...],
    mesh: str | None,
    tp: int | None,
    strict: bool,
    overwrite: bool,
    no_verify: bool,
    receipt: Path | None,
    quiet: bool,
    as_json: bool,
    **fields: Any,
) -> int:
    """Generate an answer to every line of IN and write it to OUT, both JSON lines; - is standard input or output.

    All of IN is checked before a model is loaded. A line without its own seed takes --seed (0 by default) plus its
    number, so that every run gives the same results. Ctrl-C ends the run once the lines under way are done, a second
    Ctrl-C at once; finished lines are never lost. OUT.meta.json records which input and settings OUT belongs to; a run
    that writes to standard output cannot be resumed. --receipt is written once all lines are done.
    """
    if as_json and str(target) == "-":
        raise click.UsageError("--json prints the summary to standard output, where OUT - puts the lines")
    check_drafts(drafts, draft_model)
    adapter = given_adapter(adapters, named=True)
    if receipt is not None and "-" in (str(source), str(target)):
        raise click.UsageError("--receipt needs IN and OUT to be files: it is made of both")

    # Imported here: --help and usage errors do not need jax.
    from llama_jax.sampling import SamplingParams

    sampling = SamplingParams(**{"seed": 0, **given(fields)})

    import dataclasses

    from llama_jax.adapters.files import adapters_digest
    from llama_jax.batch_file import BatchFile
    from llama_jax.checkpoint import open_checkpoint
    from llama_jax.checkpoint.format import digest
    from llama_jax.engine.sizing import GPU_ROWS
    from llama_jax.generation.draft import opened_draft
    from llama_jax.library import resolve
    from llama_jax.loading import load
    from llama_jax.runtime import default_dtype, device_name
    from llama_jax.text.tokenizer import load_tokenizer

    claim_memory()
    devices = requested_mesh(mesh, tp, batch=batch_size or GPU_ROWS)
    dtype = dtype or default_dtype().name
    batch = BatchFile(
        source,
        target,
        sampling=sampling,
        dtype=dtype,
        kv_dtype=kv_dtype,
        batch_size=batch_size,
        batch_invariant=batch_invariant,
        strict=strict,
        overwrite=overwrite,
    )
    with batch:
        if not quiet:
            _report_findings(batch.findings, {model, *(adapter if isinstance(adapter, dict) else ())}, model)
        with Reporter(quiet=quiet) as reporter:
            folder = resolve(model, progress=reporter.progress, notify=reporter.notify)
            checkpoint = open_checkpoint(folder)
            # Identifies weights, tokenizer and chat template regardless of their names.
            digests = [f"{name} {t.digest}" for name, t in checkpoint.tensors.items()]
            parts = sorted([*digests, *checkpoint.file_digests.values()])
            identity = {"model": digest("\n".join(parts).encode())}
            if adapter is not None:
                identity["adapters"] = adapters_digest(adapter, checkpoint.config)
            batch.open(load_tokenizer(folder), checkpoint.config, identity)
            loaded, tokenizer = load(
                folder,
                adapter=adapter,
                dtype=dtype,
                kv_dtype=kv_dtype,
                mesh=devices,
                verify=not no_verify,
                progress=reporter.progress,
                notify=reporter.notify,
            )
            draft = opened_draft(
                draft_model,
                loaded,
                tokenizer,
                verify=not no_verify,
                progress=reporter.progress,
                notify=reporter.notify,
            )
            reporter.warn_of_unused_gpu()
        loaded = dataclasses.replace(loaded, name=model)
        if not quiet:
            click.echo(f"{model} on {device_name(loaded.device, loaded.mesh)} in {loaded.dtype.name}", err=True)
        notice = "\nending after the lines that have begun; Ctrl-C again ends at once"
        with _Display(quiet=quiet) as display, catch_interrupt(notice) as interrupted:
            summary = batch.run(loaded, tokenizer, drafts=drafts, draft=draft, progress=display.show, stop=interrupted)
    _report(summary, target, quiet=quiet, as_json=as_json)
    if receipt is not None and not summary.interrupted:
        from llama_jax.receipts.batch import batch_receipt

        made = batch_receipt(
            loaded,
            source,
            target,
            sampling=sampling,
            batch_size=batch_size,
            batch_invariant=batch_invariant,
            load={"adapters": recorded(adapters)},
        )
        made.save(receipt)
    return INTERRUPTED if summary.interrupted else SOME_FAILED if summary.errors else 0


def _report_findings(found: Findings, known: set[str], model: str) -> None:
    """Reports oddities of the input before any slow work."""
    if found.first_bad is not None:
        first = f"line {found.first_bad.line.index + 1}: {found.first_bad.error.message}"
        click.echo(printable(f"{found.bad} of {found.total} lines cannot be generated; the first is {first}"), err=True)
    if found.equal:
        click.echo(printable(f"warning: {found.equal_ids()}"), err=True)
    if others := sorted(found.models - known):
        named = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        click.echo(printable(f"lines name the model {named:.200}; {model} answers them"), err=True)


class _Display:
    """Shows lines done, tokens per second and the time left: a bar in a terminal, occasional lines elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Progress | None = None
        self._last_line = time.monotonic()

    def __enter__(self) -> _Display:
        if not self._quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            # Imported here, since log files do not need it.
            from rich import progress as bars
            from rich.console import Console

            self._bar = bars.Progress(
                bars.BarColumn(),
                bars.MofNCompleteColumn(),
                bars.TextColumn("{task.fields[rate]}"),
                bars.TimeElapsedColumn(),
                bars.TextColumn("{task.fields[left]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=None, rate="", left="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, status: Status) -> None:
        """Shows the state of the run."""
        rate = f"{status.generation_tps:.0f} tokens/s, cache {status.cache_used:.0%}"
        left = _time_left(status)
        if self._bar is not None:
            self._bar.update(self._task, completed=status.done, total=status.total, rate=rate, left=left)
        elif not self._quiet and time.monotonic() - self._last_line > LINE_EVERY_S:
            self._last_line = time.monotonic()
            click.echo(f"{status.done} of {status.total} lines, {rate}, {left}", err=True)


def _time_left(status: Status) -> str:
    if not status.fresh:
        return ""
    seconds = round(status.seconds / status.fresh * (status.total - status.done))
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"


def _report(summary: Summary, target: Path, *, quiet: bool, as_json: bool) -> None:
    where = "standard output" if str(target) == "-" else target
    if summary.cut and not quiet:
        click.echo(f"cut off an unfinished line of {summary.cut} bytes that an earlier run had left", err=True)
    if as_json:
        print_json(
            {
                "output": str(target),
                "lines": summary.total,
                "done": summary.done,
                "done_before": summary.done - summary.fresh,
                "errors": summary.errors,
                "prompt_tokens": summary.prompt_tokens,
                "generated_tokens": summary.generated_tokens,
                "seconds": round(summary.seconds, 3),
                "generation_tps": round(summary.generation_tps, 3),
                "interrupted": summary.interrupted,
            }
        )
    elif not quiet:
        before = summary.done - summary.fresh
        click.echo(
            f"{summary.done} of {summary.total} lines in {where}"
            + (f", {before} of them from before" if before else "")
            + (f", {summary.errors} with an error" if summary.errors else "")
            + f"; {summary.generated_tokens} tokens in {summary.seconds:.1f} s ({summary.generation_tps:.0f} tokens/s)"
            + ("; run the same command to resume" if summary.interrupted and where == target else ""),
            err=True,
        )
