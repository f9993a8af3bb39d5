#!/usr/bin/env python
"""Generate a file of prompts: JSON lines in, JSON lines out, resumable after a kill at any moment."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama_jax.cli.command_line import run_command
from llama_jax.cli.errors import INTERRUPTED
from llama_jax.cli.options import (
    dtype_option,
    given,
    mesh_options,
    model_option,
    quiet_option,
    requested_mesh,
    sampling_options,
)
from llama_jax.cli.progress import Reporter
from llama_jax.cli.terminal import catch_interrupt, print_json

if TYPE_CHECKING:
    from rich.progress import Progress

    from llama_jax.batch_file import Status, Summary

LINE_EVERY_S = 10.0


@click.command(
    epilog="""\b
Each input line is an object with one of
  "prompt": text          "messages": [{"role": …, "content": …}]          "token_ids": [1, 2, …]
and optionally "id", sampling fields such as "max_tokens", "temperature", "seed" or "stop", and for messages "tools".

\b
Each output line has "index" (the input line, from 0), "id", "prompt_tokens", "text", "token_ids", "finish_reason", or
"error" for a line that cannot be generated. While the run lasts, lines come batch by batch; at its end they stand in
the input's order.

\b
Examples:
  python scripts/batch_generate.py prompts.jsonl answers.jsonl
  python scripts/batch_generate.py prompts.jsonl answers.jsonl --batch-size 32 --temperature 0.7 --top-p 0.95
Run the same command again after an interruption: it resumes.
"""
)
@click.argument("source", metavar="IN.jsonl", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT.jsonl", type=click.Path(path_type=Path))
@model_option
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Lines at once, at most.")
@click.option("--max-tokens", type=int, default=256, show_default=True, metavar="N", help="New tokens a line, at most.")
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, metavar="T", help="0 takes the likeliest token."
)
@sampling_options
@dtype_option
@mesh_options
@click.option("--strict", is_flag=True, help="Stop at a bad line, before anything is generated.")
@click.option("--overwrite", is_flag=True, help="Start afresh, whatever OUT.jsonl holds.")
@click.option("--no-verify", is_flag=True, help="Do not check the weights' digests while loading.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def command(
    source: Path,
    target: Path,
    model: str,
    batch_size: int,
    dtype: str | None,
    mesh: str | None,
    tp: int | None,
    strict: bool,
    overwrite: bool,
    no_verify: bool,
    quiet: bool,
    as_json: bool,
    **fields: Any,
) -> int:
    """Generate every line of IN.jsonl and write the results to OUT.jsonl.

    A line without a seed of its own takes --seed (0 by default) plus its number, so that every run gives the same
    results. Ctrl-C ends the run after the current batch, a second one at once; nothing is lost either way.
    OUT.jsonl.meta.json says which input and settings OUT.jsonl belongs to.
    """
    # Imported here: --help and usage errors do without jax.
    from llama_jax.sampling import SamplingParams

    sampling = SamplingParams(**{"seed": 0, **given(fields)})

    from llama_jax.batch_file import run
    from llama_jax.checkpoint import open_checkpoint
    from llama_jax.checkpoint.format import digest
    from llama_jax.library import resolve
    from llama_jax.loading import load
    from llama_jax.runtime import device_name

    devices = requested_mesh(mesh, tp, batch=batch_size)
    with Reporter(quiet=quiet) as reporter:
        folder = resolve(model, progress=reporter.progress, notify=reporter.notify)
        loaded, tokenizer = load(
            folder,
            dtype=dtype,
            mesh=devices,
            verify=not no_verify,
            progress=reporter.progress,
            notify=reporter.notify,
        )
        reporter.warn_of_unused_gpu()
    if not quiet:
        click.echo(f"{model} on {device_name(loaded.device, loaded.mesh)} in {loaded.dtype.name}", err=True)
    checkpoint = open_checkpoint(folder)
    # The weights, the tokenizer and the chat template, whatever name they go by.
    parts = [*(f"{name} {t.digest}" for name, t in checkpoint.tensors.items()), *checkpoint.file_digests.values()]
    identity = {"model": digest("\n".join(sorted(parts)).encode())}

    notice = "\nending after this batch; Ctrl-C again ends at once"
    with _Display(quiet=quiet) as display, catch_interrupt(notice) as interrupted:
        summary = run(
            loaded,
            tokenizer,
            source,
            target,
            sampling=sampling,
            batch_size=batch_size,
            strict=strict,
            overwrite=overwrite,
            identity=identity,
            progress=display.show,
            stop=interrupted,
        )
    _report(summary, target, quiet=quiet, as_json=as_json)
    return INTERRUPTED if summary.interrupted else 0


class _Display:
    """Lines done, tokens per second and the time left: a bar in a terminal, a line now and then elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Progress | None = None
        self._last_line = time.monotonic()

    def __enter__(self) -> _Display:
        if not self._quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            # Imported here, since a log file does not need it.
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
        """Takes over the state after a batch."""
        rate, left = f"{status.generation_tps:.0f} tokens/s", _time_left(status)
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
            f"{summary.done} of {summary.total} lines in {target}"
            + (f", {before} of them from before" if before else "")
            + (f", {summary.errors} with an error" if summary.errors else "")
            + f"; {summary.generated_tokens} tokens in {summary.seconds:.1f} s ({summary.generation_tps:.0f} tokens/s)"
            + ("; run the same command to go on" if summary.interrupted else ""),
            err=True,
        )


def main() -> None:
    """Runs the script; errors become a message and the exit codes of `llama-jax --help`."""
    run_command(command.main, sys.argv[1:])


if __name__ == "__main__":
    main()
