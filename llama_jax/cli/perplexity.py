"""`llama-jax perplexity`: how well a model predicts a text."""

from __future__ import annotations

import math

import click

from llama_jax.cli.inputs import read_text
from llama_jax.cli.options import (
    LoadOptions,
    batch_tokens_option,
    examples,
    json_option,
    load_options,
    model_option,
    quiet_option,
    requested_mesh,
)
from llama_jax.cli.progress import Reporter
from llama_jax.cli.terminal import print_json


@click.command(
    name="perplexity",
    epilog=examples(
        "llama-jax perplexity prose.txt -m ./Llama-3.2-1B",
        "llama-jax perplexity prose.txt --window 1024 --overlap 512",
        "llama-jax perplexity - --json < prose.txt",
    ),
)
@click.argument("file")
@model_option
@click.option(
    "--window", type=int, metavar="N", help="Maximum number of tokens that the model sees. [default: its context]"
)
@click.option(
    "--overlap",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="Tokens that a window shares with the previous one: more context for each prediction, and more work.",
)
@batch_tokens_option
@load_options
@quiet_option
@json_option
def command(
    file: str,
    model: str,
    window: int | None,
    overlap: int,
    batch_tokens: int | None,
    loading: LoadOptions,
    quiet: bool,
    as_json: bool,
) -> None:
    """Find the perplexity of the text in FILE, in UTF-8; - is standard input.

    Each token is predicted once from those before it in its window, the first from BOS, as lm-eval does it
    (loglikelihood_rolling). Per-token perplexity compares models with the same tokenizer; per word or byte, and as bits
    per byte, it compares any (null in JSON where it exceeds a float). `llama-jax quality` scores half of each window
    instead, as llama.cpp does.
    """
    text = read_text(file, param="file")
    devices = requested_mesh(loading.mesh, loading.tp)

    from llama_jax.scoring import score_rolling

    with Reporter(quiet=quiet) as reporter:
        loaded, tokenizer = loading.load(model, devices, reporter)
        reporter.warn_of_unused_gpu()
    with Reporter(quiet=quiet, label="Scoring") as reporter:
        (found,) = score_rolling(
            loaded,
            tokenizer,
            [text],
            max_length=window,
            overlap=overlap,
            batch_tokens=batch_tokens,
            progress=reporter.counted,
        )
    if as_json:
        measured = {
            "perplexity": found.perplexity,
            "perplexity_error": found.error,
            "word_perplexity": found.word_perplexity,
            "byte_perplexity": found.byte_perplexity,
            "bits_per_byte": found.bits_per_byte,
            "loglikelihood": found.logprob,
        }
        print_json(
            {
                "model": model,
                "dtype": loaded.dtype.name,
                **{name: value if math.isfinite(value) else None for name, value in measured.items()},
                "tokens": found.tokens,
                "words": found.words,
                "bytes": found.bytes,
                "windows": found.windows,
                "max_length": window or loaded.config.context_length,
                "overlap": overlap,
            }
        )
        return
    click.echo(f"perplexity  {found.perplexity:.4f} ± {found.error:.4f} a token, {found.word_perplexity:.4f} a word")
    click.echo(f"bits        {found.bits_per_byte:.5f} a byte")
    click.echo(f"text        {found.tokens} tokens, {found.words} words, {found.bytes} bytes; windows: {found.windows}")
