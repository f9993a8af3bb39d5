"""`llama-jax quality`: divergence of a model's predictions from those of its original."""

from __future__ import annotations

import dataclasses

import click

from llama_jax.cli.inputs import read_text
from llama_jax.cli.options import (
    LoadOptions,
    examples,
    json_option,
    load_options,
    quiet_option,
    requested_mesh,
    yes_option,
)
from llama_jax.cli.progress import Reporter
from llama_jax.cli.terminal import print_json


@click.command(
    name="quality",
    epilog=examples(
        "llama-jax quality ./llama-1b-int4 --reference ./Llama-3.2-1B-Instruct --text prose.txt",
        "llama-jax quality ./llama-1b-int4 --reference ./Llama-3.2-1B-Instruct --text prose.txt --json",
        "llama-jax quality ./llama-1b-int4 --reference ./llama-1b-int4 --activations int8 --text prose.txt",
    ),
)
@click.argument("model")
@click.option("--reference", required=True, metavar="MODEL", help="The original model.")
@click.option(
    "--text", required=True, metavar="FILE", help="UTF-8 text that neither model was calibrated on; 100 KB are enough."
)
@load_options
@yes_option
@quiet_option
@json_option
def command(model: str, reference: str, text: str, loading: LoadOptions, quiet: bool, as_json: bool) -> None:
    """Compare the predictions of MODEL with those of --reference on a text.

    Prints the perplexity of both, the mean Kullback-Leibler divergence of the model from its reference in nats per
    token, and how often both rank the same token first. Windows of 512 tokens are independent, and the second half of
    each is predicted, as in llama.cpp. Standard errors follow the plus-minus signs.

    The options apply to both models, which are in memory together, except --activations, which applies to MODEL only.
    On a GPU they compute in bfloat16, whose own rounding is part of the divergence; --dtype float32 --weights float
    compares weights alone.
    """
    from llama_jax.measure.quality import compare, refer, windows

    prose = read_text(text, param="text")
    devices = requested_mesh(loading.mesh, loading.tp)
    with Reporter(quiet=quiet, label="Reference") as reporter:
        exact, tokenizer = dataclasses.replace(loading, activations=None).load(reference, devices, reporter)
        rows = windows(tokenizer.encode(prose, parse_special=False))
        known = refer(exact, rows, reporter.progress)
    with Reporter(quiet=quiet, label="Model") as reporter:
        other, _ = loading.load(model, devices, reporter)
        found = compare(other, known, reporter.progress)
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    click.echo(f"perplexity  {found.perplexity:.3f}, of the reference {found.reference_perplexity:.3f}")
    click.echo(f"log ratio   {found.log_ratio:.5f} ± {found.log_ratio_error:.5f}")
    click.echo(f"divergence  {found.kl:.5f} ± {found.kl_error:.5f}")
    click.echo(f"same token  {100 * found.same_top:.2f} % of {found.tokens}")
