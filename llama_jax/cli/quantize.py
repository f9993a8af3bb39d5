"""`llama-jax quantize`: a model with its weights in few bits."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from llama_jax.cli.inputs import read_text
from llama_jax.cli.options import AUTO, examples, json_option, quiet_option, yes_option
from llama_jax.cli.progress import Reporter
from llama_jax.cli.recipe_options import RecipeOptions, recipe_options
from llama_jax.cli.terminal import print_json, size_text

if TYPE_CHECKING:
    from jax.sharding import Mesh


@click.command(
    name="quantize",
    epilog=examples(
        "llama-jax quantize ./Llama-3.2-1B-Instruct ./llama-1b-int8 --weights int8",
        "llama-jax quantize meta-llama/Llama-3.2-1B-Instruct ./llama-1b-int4 --weights int4 --group 128",
        "llama-jax quantize ./llama-1b ./llama-1b-int4 --weights int4 --ignore 'layers.0.*' --lm-head bf16",
        "llama-jax quantize ./llama-1b ./llama-1b-gptq --weights int4 --method gptq --calibration prose.txt",
        "llama-jax quantize ./70b ./70b-awq --weights int4 --method awq --calibration prose.txt --mesh auto",
    ),
)
@click.argument("model")
@click.argument("dst")
@recipe_options
@click.option(
    "--method",
    metavar="METHOD",
    default="rtn",
    show_default=True,
    help="rtn rounds to nearest; hqq, gptq and awq lose less, the last two with a calibration text.",
)
@click.option(
    "--calibration",
    metavar="FILE",
    help="UTF-8 text for gptq and awq: some ten thousand tokens of the kind that the model will read.",
)
@click.option(
    "--mesh",
    metavar="AXES",
    help="Devices to quantise on, e.g. data=4; auto takes all. They share the rows of each weight, and of the "
    "calibration text. [default: one]",
)
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint at DST, once the new one is complete.")
@yes_option
@quiet_option
@json_option
def command(
    model: str,
    dst: str,
    wanted: RecipeOptions,
    method: str,
    calibration: str | None,
    mesh: str | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write MODEL with quantised weights to a checkpoint at DST.

    MODEL is anything that `show` takes, including a checkpoint; one that is already quantised is decoded first. Norms,
    biases, routers and the weights named by --ignore are stored in bfloat16. Weights are quantised one by one, so
    memory is needed for the largest of them, not for the model. An interrupted run resumes when the same command runs
    again.

    gptq and awq process the layers in order, each with the outputs of the quantised layers before it; memory holds one
    layer in float32, on each device of a mesh, and the text's hidden states. Embeddings and output projections are
    rounded to nearest.

    Prints the error of each layer's weights (with gptq and awq: of its outputs): the root mean square of the difference
    relative to that of the original, for the layer and for its worst weight.
    """
    from llama_jax.checkpoint import open_checkpoint
    from llama_jax.convert import convert
    from llama_jax.library import DEFAULT_MODEL, check_source, find

    if (recipe := wanted.recipe(method)) is None:
        raise click.UsageError("Missing option '--weights': int8, int4 or fp8.")
    recipe.check_text(given=calibration is not None)
    text = None if calibration is None else read_text(calibration, param="calibration")
    devices = _mesh(mesh)
    began, errors = time.monotonic(), dict[str, float]()
    with Reporter(quiet=quiet, label="Quantising") as reporter:
        found = find(model, progress=reporter.progress, notify=reporter.notify)
        if found.converted is not None:
            check_source(found.path, reporter.notify)
        path = convert(
            found.path,
            dst,
            recipe=recipe,
            calibration=text,
            mesh=devices,
            overwrite=overwrite,
            warn_larger=model != DEFAULT_MODEL,
            name=found.name,
            revision=found.revision,
            progress=reporter.progress,
            notify=reporter.notify,
            quantised=errors.__setitem__,
        )
    seconds = time.monotonic() - began
    checkpoint = open_checkpoint(path)
    if as_json:
        print_json(
            {
                "path": str(path),
                "weights": recipe.weights.name,
                "method": method,
                "tensors": len(checkpoint.tensors),
                "bytes": checkpoint.nbytes,
                "seconds": round(seconds, 3),
                "errors": {leaf: round(error, 6) for leaf, error in errors.items()},
            }
        )
        return
    click.echo(path)
    if not quiet:
        for line in _by_layer(errors, "outputs" if recipe.calibrated else "weights"):
            click.echo(line, err=True)
        size = size_text(checkpoint.nbytes)
        click.echo(f"{len(checkpoint.tensors)} tensors, {size}, {recipe.weights.described}, {seconds:.1f} s", err=True)


def _mesh(axes: str | None) -> Mesh | None:
    """The devices that an option asks for; None for jax's default device."""
    if axes is None:
        return None
    import jax

    from llama_jax.sharding import make_mesh

    if axes == AUTO:
        devices = jax.local_devices()
        return make_mesh(data=len(devices), devices=devices)
    return make_mesh(axes)


def _by_layer(errors: dict[str, float], of: str) -> list[str]:
    """A line per layer, and one for weights outside layers, whose errors are always those of the weights."""
    layers: dict[str, dict[str, float]] = {}
    for leaf, error in errors.items():
        parts = leaf.split(".")
        layer = ".".join(parts[:2]) if parts[0] == "layers" else leaf
        layers.setdefault(layer, {})[leaf.removeprefix(f"{layer}.")] = error
    lines = []
    for layer, found in layers.items():
        worst = max(found, key=found.__getitem__)
        mean = (sum(error**2 for error in found.values()) / len(found)) ** 0.5
        most = f", most in {worst}: {found[worst]:.4f}" if len(found) > 1 else ""
        lines.append(f"{layer}: error {mean:.4f} of the {of if layer.startswith('layers.') else 'weights'}{most}")
    return lines
