"""`llama-jax bench latency`: one request at a time."""

from __future__ import annotations

from dataclasses import asdict

import click

from llama_jax.cli.bench_options import Subject, rounds_option, subject_options
from llama_jax.cli.options import examples
from llama_jax.cli.terminal import share_text


@click.command(
    name="latency",
    short_help="The engine with one request at a time.",
    epilog=examples(
        "llama-jax bench latency",
        "llama-jax bench latency --preset llama-3.1-8b --depth 0 --depth 4096 --json out.json",
        "llama-jax bench latency --prompt 128 --prompt 512 --new 32",
    ),
)
@click.option("--prompt", "prompts", type=click.IntRange(1), multiple=True, default=(512,), show_default=True)
@click.option("--new", type=click.IntRange(2), default=128, show_default=True, help="Tokens after each depth.")
@click.option(
    "--depth",
    "depths",
    type=click.IntRange(0),
    multiple=True,
    default=(0,),
    show_default=True,
    help="Prompt tokens before the new ones.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@rounds_option(5)
@subject_options
def command(
    prompts: tuple[int, ...], new: int, depths: tuple[int, ...], seed: int, rounds: int, subject: Subject
) -> None:
    """Measure one request at a time through an engine, in rows like those of llama-bench.

    pp512 is a prompt of 512 tokens until its first token; tg128 @ d4096 are 128 tokens after a prompt of 4096. MFU is
    of pp, MBU of tg, as shares of what was measured in the same run.
    """
    from llama_jax.measure.bench import measure_ceilings
    from llama_jax.measure.latency import latency_rows
    from llama_jax.measure.throughput import make_ready

    model = subject.load()
    draft = subject.load_draft(model)
    longest = max(*(n + 1 for n in prompts), *(max(1, depth) + new for depth in depths))
    settings = subject.settings(model, longest, draft)
    ceilings = measure_ceilings(model.dtype)
    result = {**subject.about(model, settings, ceilings), "rounds": rounds, "seed": seed}
    with subject.compiling() as compiling:
        llm, result["ready_s"] = make_ready(model, settings, ceilings, compiling, draft)
    subject.show(f"ready in {result['ready_s']:.1f} s")
    subject.show(f"{'test':<16} {'tok/s':>10} {'first ms':>9} {'ITL ms':>8} {'MFU/MBU':>7} {'spread':>6}")
    result["results"] = []
    rows = latency_rows(llm, ceilings, prompts=prompts, new=new, depths=depths, rounds=rounds, seed=seed)
    for row in rows:
        result["results"].append(asdict(row))
        itl = "" if row.itl_ms is None else f"{row.itl_ms:.3f}"
        subject.show(
            f"{row.test:<16} {row.tokens_per_second:10.1f} {row.ttft_ms:9.2f} {itl:>8} {share_text(row.share):>7} "
            f"{row.spread:6.2f}"
        )
    result["late_compilations"] = llm.snapshot().late_compilations
    subject.write(result)
