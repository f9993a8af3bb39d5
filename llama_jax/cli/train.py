"""`llama-jax train`: fine-tuning by a file of settings."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from llama_jax.cli.options import examples, json_option, quiet_option, yes_option
from llama_jax.cli.progress import LINE_EVERY_S, Reporter, left_text
from llama_jax.cli.terminal import catch_interrupt, print_json

if TYPE_CHECKING:
    from llama_jax.training.metrics import Measured


@click.command(
    name="train",
    epilog=examples("llama-jax train lora.toml", "llama-jax train lora.toml --json"),
)
@click.argument("config")
@yes_option
@quiet_option
@json_option
def command(config: str, quiet: bool, as_json: bool) -> None:
    """Fine-tune a model by the settings in CONFIG, a TOML file: all weights, or an adapter (LoRA, DoRA, QLoRA), from
    texts, conversations, or pairs of which one is preferred (DPO).

    Checkpoints, metrics.jsonl and the result go into the folder `output`: a checkpoint that every command takes, or an
    adapter as peft saves it. Ctrl-C saves and ends. The same command resumes a run that was stopped or killed, with the
    results of an uninterrupted one. docs/training.md lists the settings.
    """
    from llama_jax.training.run import train
    from llama_jax.training.settings import read_settings

    settings = read_settings(config)
    told = _Told(quiet=quiet)
    with (
        Reporter(quiet=quiet) as reporter,
        catch_interrupt("Saving; once more to end without") as stop,
    ):
        reporter.warn_of_unused_gpu()
        done = train(
            settings,
            told=told,
            progress=reporter.progress,
            counted=reporter.counted,
            notify=reporter.notify,
            stop=stop,
        )
    path = None if done.path is None else str(done.path)
    if as_json:
        print_json({"path": path, "step": done.step, "steps": done.steps, "loss": done.loss})
    elif path is not None:
        click.echo(path)
    if path is None:
        if not quiet:
            again = f"`llama-jax train {config}` resumes there"
            print(f"Stopped after step {done.step} of {done.steps}: {again}", file=sys.stderr)
        raise click.exceptions.Exit(130)


class _Told:
    """Prints steps, no more than one every few seconds, and the last."""

    def __init__(self, *, quiet: bool):
        self._quiet, self._last = quiet, 0.0

    def __call__(self, m: Measured) -> None:
        now = time.monotonic()
        if self._quiet or (now - self._last < LINE_EVERY_S and m.step < m.steps):
            return
        self._last = now
        means = "".join(f", {name} {value:.3f}" for name, value in m.means.items())
        mfu = "" if m.mfu is None else f", MFU {m.mfu:.2f}"
        left = f", {left_text(m.left_s)}" if m.step < m.steps else ""
        print(
            f"step {m.step} of {m.steps}: loss {m.loss:.4f}{means}, {m.tokens_per_s:,.0f} tokens/s{mfu}{left}",
            file=sys.stderr,
            flush=True,
        )
