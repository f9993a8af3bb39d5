"""`llama-jax plan`: whether a model fits, and how fast it could be, before anything is downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llama_jax.cli.mesh_sizes import devices_option, mesh_sizes
from llama_jax.cli.options import (
    DTYPES,
    activations_option,
    examples,
    json_option,
    kv_dtype_option,
    memory_fraction_option,
    mesh_options,
    quiet_option,
)
from llama_jax.cli.plan_report import compared, facts, report
from llama_jax.cli.recipe_options import RecipeOptions, recipe_options
from llama_jax.cli.terminal import print_json, printable
from llama_jax.cli.verdict import GLOSSARY
from llama_jax.errors import DoesNotFit

if TYPE_CHECKING:
    from llama_jax.aot.model import ModelCompilation
    from llama_jax.config import LlamaConfig
    from llama_jax.plan import Plan
    from llama_jax.targets import Target


@click.command(
    name="plan",
    epilog=examples(
        "llama-jax plan llama-3.1-8b --target mi300x",
        "llama-jax plan llama-3.1-70b --target mi300x --devices 8 --mesh auto --batch 32 --context 8192",
        "llama-jax plan llama-3.1-405b --target mi355x --tp 8 --compile",
        "llama-jax plan llama-3.1-70b --target rx7900xtx --devices 2 --weights int4 --embed int8 --kv-dtype int8",
        "llama-jax plan ./config-folder --target h200 --json",
        more=GLOSSARY,
    ),
)
@click.argument("model")
@click.option("--target", metavar="NAME", help="A device, such as mi300x, h200 or gfx942. [default: this machine's]")
@devices_option
@mesh_options
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Texts at a time.")
@click.option(
    "--context", type=click.IntRange(1), metavar="N", help="Tokens of a text. [default: 4096, or the model's]"
)
@click.option("--prompt", type=click.IntRange(1), metavar="N", help="Of these, prompt tokens. [default: 512, or all]")
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Dtype of weights and cache. [default: bfloat16; float32 on a CPU]"
)
@kv_dtype_option
@activations_option
@recipe_options
@memory_fraction_option
@click.option(
    "--latency",
    type=click.FloatRange(0),
    default=0.0,
    metavar="US",
    help="Latency added to each collective, in microseconds.",
)
@click.option(
    "--compile", "compiled", is_flag=True, help="Also compile for the target (AMD GPUs) and show XLA's own numbers."
)
@quiet_option
@json_option
def command(
    model: str,
    target: str | None,
    devices: int | None,
    tp: int | None,
    mesh: str | None,
    batch: int,
    context: int | None,
    prompt: int | None,
    dtype: str | None,
    kv_dtype: str | None,
    activations: str | None,
    wanted: RecipeOptions,
    memory_fraction: float | None,
    latency: float,
    compiled: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Predict whether MODEL fits on a number of devices, and the least time that it could take there.

    MODEL is a preset such as llama-3.1-8b, or anything that `show` takes; only its configuration is read. `--mesh auto`
    takes the smallest tensor parallelism that fits, as it does in the commands that run a model. A quantised model is
    counted as `load` would keep it there, stored or decoded (docs/quantization.md); --weights counts one that
    `quantize` would make. Bytes of weights and cache are exact. Times follow from data sheets: they are lower bounds,
    not measurements.

    Exits with 6 if it does not fit.
    """
    from llama_jax.library.configs import find_config
    from llama_jax.plan import default_workload, make_plan, remedies
    from llama_jax.plan import memory_fraction as usual_fraction
    from llama_jax.recipe import FLOAT, check_activations, schemes, usual_form

    recipe = wanted.recipe()
    chosen = _target(target)
    config = find_config(model)
    several = mesh is not None or tp is not None or (devices or 1) > 1
    form = usual_form(chosen, config.schemes, split=several, activations=activations)
    if recipe is not None or form == FLOAT:
        config = config.replace(schemes=())
    if recipe is not None:
        config = config.replace(schemes=schemes(config, recipe))
    check_activations(config, activations)
    config = config.replace(activations=activations)
    dtype = dtype or ("float32" if chosen.vendor == "cpu" else "bfloat16")
    workload = default_workload(config, dtype, batch=batch, context=context, prompt=prompt, kv_dtype=kv_dtype)
    workload.check(config)
    fraction = usual_fraction() if memory_fraction is None else memory_fraction
    sizes = mesh_sizes(config, chosen, workload, mesh, tp, devices, fraction)
    plan = make_plan(config, chosen, sizes, workload, memory_fraction=fraction, latency_s=latency * 1e-6)
    xla = _compile(config, plan, quiet=quiet or as_json) if compiled else None
    would = remedies(config, plan)
    if as_json:
        print_json(facts(model, config, plan, xla, would))
    else:
        lines = [*report(model, plan, would), *([] if xla is None else compared(config, plan, xla))]
        click.echo(printable("\n".join(lines)))
    raise click.exceptions.Exit(DoesNotFit.exit_code if plan.fits is False else 0)


def _target(name: str | None) -> Target:
    from llama_jax.targets import current, detected, find

    if name is not None:
        return find(name)
    here = detected()
    return here[0] if here else current()


def _compile(config: LlamaConfig, plan: Plan, *, quiet: bool) -> ModelCompilation:
    from llama_jax.aot.model import compile_model

    w = plan.workload
    return compile_model(
        config,
        plan.target,
        plan.sizes,
        batch=w.batch,
        context=w.context,
        prompt=w.prompt,
        dtype=w.dtype,
        kv_dtype=w.kv_dtype,
        memory_fraction=plan.verdict.fraction,
        progress=None if quiet else lambda line: click.echo(line, err=True),
    )
