"""`llama-jax verify`: a checkpoint's digests, and its numbers against those of another program."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llama_jax.cli.adapter_options import adapter_option, given_adapter
from llama_jax.cli.options import (
    examples,
    json_option,
    mesh_options,
    quiet_option,
    requested_mesh,
    yes_option,
)
from llama_jax.cli.progress import Reporter
from llama_jax.cli.terminal import print_json, printable, size_text
from llama_jax.errors import CheckpointError, VerificationError

if TYPE_CHECKING:
    from llama_jax.measure.verification import Inputs
    from llama_jax.plan import MeshRequest


@click.command(
    name="verify",
    epilog=examples(
        "llama-jax verify my-checkpoint",
        "llama-jax verify my-checkpoint --source ./Llama-3.2-1B-Instruct",
        "llama-jax verify my-checkpoint --expected expected.npz",
        "llama-jax verify my-checkpoint --expected expected.npz --save-logits ours.npz",
        "llama-jax verify my-checkpoint --adapter ./my-lora --expected expected.npz",
    ),
)
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option("--source", metavar="PATH", help="Also compare with the folder or file that it was converted from.")
@click.option("--expected", metavar="FILE.npz", help="Also run the model and compare with this file.")
@click.option("--save-logits", metavar="OUT.npz", help="Write what was computed, for others to compare.")
@adapter_option
@mesh_options
@yes_option
@quiet_option
@json_option
def command(
    checkpoint: str,
    source: str | None,
    expected: str | None,
    save_logits: str | None,
    adapters: tuple[str, ...],
    mesh: str | None,
    tp: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Check the digest of every tensor and file of CHECKPOINT (or of any other MODEL, which is converted first).

    With --source, also hash the files there and compare them, and every tensor that they give, with model.lock.json.

    With --expected, also run it in float32 on the file's input_ids and attention_mask, compare logits where the mask is
    1, then decode greedily as many tokens as `greedy` has and compare them. Prints one JSON line: max_abs_diff,
    max_rel_diff (as a share of the largest expected logit), greedy_match, ok. --tp and --mesh run it on
    several devices, --adapter with an adapter, attached and not merged.

    Exits with 4 if anything is damaged, a logit differs by more than 5e-5 of the largest one, or a token differs.
    """
    if save_logits and not expected:
        raise click.UsageError("--save-logits needs --expected, whose input_ids the model is run on")
    adapter = given_adapter(adapters)
    if expected is None and adapter is not None:
        raise click.UsageError("--adapter needs --expected: without it no model is run")
    if expected is None and (mesh is not None or tp is not None):
        raise click.UsageError("--tp and --mesh need --expected: without it no model is run")
    inputs = devices = None
    if expected is not None:
        from llama_jax.measure import verification

        inputs = verification.read_inputs(expected)
        if save_logits and not inputs.greedy:
            inputs = dataclasses.replace(inputs, greedy=verification.GREEDY_TO_SAVE)
        batch, length = inputs.tokens.shape
        devices = requested_mesh(mesh, tp, batch=batch, context=length + max(inputs.greedy, 1), prompt=length)
    with Reporter(quiet=quiet, label="Verifying") as reporter:
        path = _check_digests(checkpoint, source, reporter, as_json=as_json, print_report=expected is None)
        if expected is not None and inputs is not None:
            _check_numbers(path, expected, inputs, devices, adapter, save_logits, reporter, quiet=quiet)


def _check_digests(
    checkpoint: str, source: str | None, reporter: Reporter, *, as_json: bool, print_report: bool
) -> Path:
    from llama_jax.checkpoint import verify
    from llama_jax.convert.verify import verify_source
    from llama_jax.library import resolve

    report = verify(resolve(checkpoint, progress=reporter.progress, notify=reporter.notify), reporter.progress)
    if source is not None and report.ok:
        report = verify_source(report.path, source, reporter.progress)
    if print_report and as_json:
        print_json(dataclasses.asdict(report) | {"path": str(report.path), "ok": report.ok})
        if not report.ok:
            raise click.exceptions.Exit(CheckpointError.exit_code)
    if not report.ok:
        for failure in report.failures:
            click.echo(f"damaged: {printable(failure)}", err=True)
        raise CheckpointError(
            f"{report.path} is damaged or differs from its source: {len(report.failures)} digests differ"
            if source
            else f"{report.path} is damaged: {len(report.failures)} digests differ",
            hint="convert it again, or copy it again from where it came",
        )
    if print_report and not as_json:
        also = f", and {source} gives the same" if source else ""
        click.echo(f"ok: {report.path}, {report.tensors} tensors, {size_text(report.bytes)}, all digests match{also}")
    return report.path


def _check_numbers(
    path: Path,
    expected: str,
    inputs: Inputs,
    mesh: MeshRequest,
    adapter: str | dict[str, str] | None,
    save_logits: str | None,
    reporter: Reporter,
    *,
    quiet: bool,
) -> None:
    from llama_jax import runtime
    from llama_jax.checkpoint import open_checkpoint
    from llama_jax.measure import verification

    runtime.enable_compilation_cache()
    config = open_checkpoint(path).config
    assert not isinstance(adapter, dict)  # `given_adapter` without names
    model = verification.load_float32(
        path, config, mesh, adapter=adapter, progress=reporter.progress, notify=reporter.notify
    )
    reporter.warn_of_unused_gpu()
    try:
        computed = verification.compute(model.params, model.config, inputs, model.mesh)
        if save_logits:
            verification.save(save_logits, inputs, computed)
        result = verification.compare(computed, inputs, expected)
    except VerificationError as e:
        # The file cannot be compared with this model at all, which counts as a result too.
        result = verification.Comparison(None, None, None, (f"{e.message}; {e.hint}",))
    for reason in result.reasons:
        click.echo(f"failed: {reason}", err=True)
    if result.ok and not quiet:
        device = runtime.device_name(mesh=model.mesh)
        click.echo(f"ok: {path} agrees with {expected} on {device} in float32", err=True)
    print_json(
        {
            "max_abs_diff": result.max_abs_diff,
            "max_rel_diff": result.max_rel_diff,
            "greedy_match": result.greedy_match,
            "ok": result.ok,
        }
    )
    if not result.ok:
        raise click.exceptions.Exit(VerificationError.exit_code)
