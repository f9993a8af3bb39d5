"""`llama-jax compile`: a model compiled for a GPU that this machine lacks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from llama_jax.cli.mesh_sizes import devices_option, mesh_sizes
from llama_jax.cli.options import (
    DTYPES,
    check_drafts,
    draft_model_option,
    drafts_option,
    examples,
    json_option,
    kv_dtype_option,
    memory_fraction_option,
    mesh_options,
    quiet_option,
)
from llama_jax.cli.terminal import print_json, printable
from llama_jax.cli.verdict import GLOSSARY
from llama_jax.errors import DoesNotFit, RequestError

if TYPE_CHECKING:
    from llama_jax.aot.model import ModelCompilation
    from llama_jax.engine.ahead import EngineCompilation
    from llama_jax.targets import Target


@click.command(
    name="compile",
    epilog=examples(
        "llama-jax compile llama-3.1-8b --target mi300x",
        "llama-jax compile llama-3.1-70b --target mi300x --tp 8 --batch 32 --context 8192",
        "llama-jax compile llama-3.1-8b --target mi300x --engine",
        "llama-jax compile ./config-folder --target rx7900xtx --json",
        more=GLOSSARY,
    ),
)
@click.argument("model")
@click.option("--target", metavar="NAME", help="An AMD GPU, such as mi300x or gfx942. [default: this machine's]")
@devices_option
@mesh_options
@click.option(
    "--engine", is_flag=True, help="Compile all programs of the engine instead, for one replica of the model."
)
@drafts_option
@draft_model_option
@click.option("--batch", type=click.IntRange(1), help="Rows. [default: 1; of the engine 256]")
@click.option(
    "--context",
    type=click.IntRange(1),
    metavar="N",
    help="Tokens of a text. [default: 4096, or the model's; of the engine the model's]",
)
@click.option("--prompt", type=click.IntRange(1), help="Prompt tokens of a row. [default: 512, or the context]")
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="Dtype of weights and cache."
)
@kv_dtype_option
@memory_fraction_option
@quiet_option
@json_option
def command(
    model: str,
    target: str | None,
    devices: int | None,
    tp: int | None,
    mesh: str | None,
    engine: bool,
    drafts: int,
    draft_model: str | None,
    batch: int | None,
    context: int | None,
    prompt: int | None,
    dtype: str,
    kv_dtype: str | None,
    memory_fraction: float | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compile prefill and a decode step of MODEL for an AMD GPU, which this machine need not have.

    MODEL is a preset such as llama-3.1-8b, or anything that `show` takes; only its configuration is read. Needs the
    extra `rocm-aot` on x86-64 Linux. Reports whether it fits, what the devices exchange, the kernels' registers, and
    the least time of a step by the data sheet, a prediction and not a measurement.

    With --engine, every program that the engine compiles when it starts, which takes minutes.

    Exits with 6 if it does not fit, 5 if the compiler is missing.
    """
    check_drafts(drafts, draft_model)
    chosen = _target(target)
    from llama_jax.aot.model import compile_model
    from llama_jax.cli.compile_report import engine_facts, engine_report, model_facts, model_report
    from llama_jax.engine.ahead import compile_engine
    from llama_jax.library.configs import find_config
    from llama_jax.plan import ENGINE_FRACTION, MEMORY_FRACTION, default_workload, remedies
    from llama_jax.plan import memory_fraction as usual_fraction

    config = find_config(model)
    usual = usual_fraction(ENGINE_FRACTION if engine else MEMORY_FRACTION)
    fraction = usual if memory_fraction is None else memory_fraction
    workload = default_workload(config, dtype, batch=batch or 1, context=context, prompt=prompt, kv_dtype=kv_dtype)
    workload.check(config)
    sizes = mesh_sizes(config, chosen, workload, mesh, tp, devices, fraction)
    began = time.monotonic()

    def say(line: str) -> None:
        if not quiet and not as_json:
            click.echo(f"[{time.monotonic() - began:5.1f} s] {line}", err=True)

    common: dict[str, Any] = {"dtype": dtype, "kv_dtype": kv_dtype, "memory_fraction": fraction, "progress": say}
    result: ModelCompilation | EngineCompilation
    if engine:
        if prompt is not None:
            raise RequestError(
                "the engine's programs take prompts of any length", param="prompt", hint="leave out --prompt"
            )
        draft = None if draft_model is None else find_config(draft_model)
        common |= {"drafts": drafts, "draft": draft}
        result = compile_engine(config, chosen, sizes, rows=batch, context=context, **common)
        facts, text = engine_facts(model, result), engine_report(model, result)
    elif drafts or draft_model is not None:
        raise RequestError("drafts are the engine's", param="drafts", hint="add --engine")
    else:
        result = compile_model(config, chosen, sizes, batch=batch or 1, context=context, prompt=prompt, **common)
        would = () if result.fits else remedies(config, result.plan)
        facts, text = model_facts(model, result, would), model_report(model, result, would)
    if as_json:
        print_json(facts)
    else:
        click.echo(printable(text))
    raise click.exceptions.Exit(DoesNotFit.exit_code if result.fits is False else 0)


def _target(name: str | None) -> Target:
    from llama_jax.targets import detected, find

    if name is not None:
        return find(name)
    if here := detected():
        return here[0]
    raise RequestError("this machine has no AMD GPU to compile for", param="target", hint="add --target mi300x")
