"""`llama-jax eval`: lm-eval's tasks."""

from __future__ import annotations

import json
import math
import numbers
import sys
from pathlib import Path
from typing import Any

import click

from llama_jax.cli.options import (
    LoadOptions,
    batch_tokens_option,
    claim_memory,
    examples,
    json_option,
    load_options,
    model_option,
    quiet_option,
    requested_mesh,
)
from llama_jax.cli.progress import Reporter
from llama_jax.cli.terminal import print_json, printable, table
from llama_jax.disk import storage_errors


@click.command(
    name="eval",
    epilog=examples(
        "llama-jax eval arc_easy,hellaswag -m ./Llama-3.2-1B --limit 100",
        "llama-jax eval my_task --include_path ./tasks --json",
        "llama-jax eval gsm8k -m ./Llama-3.2-1B-Instruct --apply-chat-template --output results.json",
    ),
)
@click.argument("tasks")
@model_option
@click.option("--include-path", "--include_path", metavar="DIR", help="A folder of tasks besides lm-eval's own.")
@click.option("--num-fewshot", type=click.IntRange(min=0), metavar="N", help="Examples before each question.")
@click.option("--limit", type=click.FloatRange(min=0, min_open=True), metavar="N", help="Only the first N, or a share.")
@click.option("--apply-chat-template", is_flag=True, help="Apply the model's chat template to the questions.")
@click.option("--system-instruction", metavar="TEXT", help="The system message; with a chat template.")
@click.option("--gen-kwargs", metavar="K=V,...", help="Generation settings that override those of the tasks.")
@click.option(
    "--max-length", type=int, metavar="N", help="Maximum number of tokens that the model sees. [default: its context]"
)
@batch_tokens_option
@click.option(
    "--seed", type=int, default=0, show_default=True, metavar="N", help="The seed of everything random in lm-eval."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write all results and every item, as JSON.",
)
@click.option("--confirm-run-unsafe-code", is_flag=True, help="Allow tasks that run code written by the model.")
@load_options
@quiet_option
@json_option
def command(
    tasks: str,
    model: str,
    include_path: str | None,
    max_length: int | None,
    batch_tokens: int | None,
    seed: int,
    output: Path | None,
    loading: LoadOptions,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Run TASKS of lm-eval (comma-separated) and print each metric.

    Needs the extra `eval` (lm-eval 0.4.13; no torch). Tasks fetch their data from the Hugging Face hub unless it is in
    a file; LLAMA_JAX_OFFLINE=1 forbids that. Paths in a task's file are relative to the working directory. A task's own
    Python code is run.
    """
    import logging

    from llama_jax.scoring.tasks import adapter, evaluate

    adapter()  # what is not installed is said before a model is loaded
    logging.getLogger("lm_eval").setLevel(logging.ERROR if quiet else logging.WARNING)
    claim_memory()
    devices = requested_mesh(loading.mesh, loading.tp)
    with Reporter(quiet=quiet) as reporter:
        loaded, tokenizer = loading.load(model, devices, reporter)
        reporter.warn_of_unused_gpu()
    with Reporter(quiet=quiet, label="Scoring") as reporter:
        found = evaluate(
            loaded,
            tokenizer,
            [name for name in tasks.split(",") if name],
            include_path=include_path,
            max_length=max_length,
            batch_tokens=batch_tokens,
            progress=reporter.counted,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            log_samples=output is not None,
            **options,
        )
    if output is not None:
        with storage_errors(output):
            output.write_text(json.dumps(found, default=str, indent=1))
    results = {task: _metrics(values) for task, values in found["results"].items()}
    if as_json:
        print_json({"model": model, "dtype": loaded.dtype.name, "results": results, "n-samples": found["n-samples"]})
        return
    rows = [
        (printable(task), name, f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else ""))
        for task, values in results.items()
        for name, value in values.items()
        if "_stderr," not in name and value is not None
        for error in [values.get(name.replace(",", "_stderr,"))]
    ]
    sys.stdout.write("".join(line + "\n" for line in table([("task", "metric", "value"), *rows])))


def _metrics(values: dict[str, Any]) -> dict[str, float | None]:
    """A task's metrics by lm-eval's names ("acc,none"); what was not computed, or is no number, is None."""
    metrics = {name: value for name, value in values.items() if "," in name}
    return {
        name: float(value) if isinstance(value, numbers.Real) and math.isfinite(value) else None
        for name, value in metrics.items()
    }
