"""Options shared by the kinds of `llama-jax bench`: model, engine, requests, and destination of results."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama_jax.cli.options import (
    Decorator,
    LoadOptions,
    batch_invariant_option,
    check_drafts,
    claim_memory,
    draft_model_option,
    drafts_option,
    gathered,
    load_options,
    model_option,
    page_size_option,
    quiet_option,
    requested_mesh,
)
from llama_jax.cli.terminal import pairs_text, print_json
from llama_jax.disk import storage_errors, write_file
from llama_jax.errors import RequestError
from llama_jax.measure.workloads import MIXES, Work, workload

if TYPE_CHECKING:
    from llama_jax.engine.compiled import Compiled
    from llama_jax.engine.settings import EngineSettings
    from llama_jax.measure.bench import Ceilings
    from llama_jax.model.loaded import Model
    from llama_jax.plan import MeshRequest

STANDARD_OUTPUT = "-"

preset_option: Decorator = click.option(
    "--preset", metavar="NAME", help="Random weights of a published shape, made on the device."
)


def measured_model(model: str, preset: str | None, loading: LoadOptions, devices: MeshRequest, *, quiet: bool) -> Model:
    """The model to measure: loaded, or with a preset's shape and random weights."""
    from llama_jax import runtime
    from llama_jax.cli.progress import Reporter
    from llama_jax.kernels.registry import checked_backends
    from llama_jax.loading import prepare_products
    from llama_jax.measure.bench import random_model

    if preset is not None and loading.adapters:
        raise click.UsageError("--adapter is for a model; --preset has random weights")
    runtime.enable_compilation_cache()
    with Reporter(quiet=quiet) as reporter:
        reporter.warn_of_unused_gpu()
        if preset is None:
            return loading.load(model, devices, reporter)[0]
        named = checked_backends(loading.kernels)
        dtype = loading.dtype or runtime.default_dtype()
        made = random_model(
            preset,
            dtype,
            devices,
            weights=loading.weights,
            kv_dtype=loading.kv_dtype,
            activations=loading.activations,
            notify=reporter.notify,
        )
        prepare_products(made.config, named, reporter.notify)
        return dataclasses.replace(made, kernels=named)


@dataclass(frozen=True)
class Subject:
    """The model and engine to measure, and the destination of the result.

    Attributes:
      rows, context, pages, page_size, steps, drafts, prefix_cache, batch_invariant, strict: of
        `engine.sizing.default_settings`.
      draft_model: a name, or another preset if `preset` is given.
      out: a file for the JSON object, "-" for standard output, None for none.
    """

    model: str
    preset: str | None
    loading: LoadOptions
    quiet: bool
    rows: int | None
    context: int | None
    pages: int | None
    page_size: int
    steps: int | None
    drafts: int
    draft_model: str | None
    prefix_cache: bool
    batch_invariant: bool
    strict: bool
    out: str | None

    def load(self) -> Model:
        """Loads the model onto the requested devices, most of whose memory the engine may take. Checks first that the
        output can be written.

        Raises:
          StorageError: it cannot be written.
        """
        check_drafts(self.drafts, self.draft_model)
        claim_memory()
        if self.out and not self._as_json:
            with storage_errors(Path(self.out)):
                Path(self.out).touch()
        devices = requested_mesh(self.loading.mesh, self.loading.tp, batch=self.rows or 1, context=self.context)
        return measured_model(self.model, self.preset, self.loading, devices, quiet=self.quiet or self._as_json)

    def load_draft(self, model: Model) -> Model | None:
        """Loads the draft model, if requested, onto the model's devices.

        Raises:
          RequestError: it does not match this model.
        """
        if self.draft_model is None:
            return None
        from llama_jax.engine.draft_model import check_draft

        preset = self.preset and self.draft_model
        quiet = self.quiet or self._as_json
        draft = measured_model(self.draft_model, preset, self.loading, model.mesh, quiet=quiet)
        check_draft(model, draft)
        return draft

    def settings(self, model: Model, longest: int, draft: Model | None = None) -> EngineSettings:
        """The engine's settings. Without `--context` they are for sequences of `longest` tokens."""
        from llama_jax.engine.replicas import replicas
        from llama_jax.engine.sizing import default_settings

        return default_settings(
            replicas(model)[0],
            rows=self.rows,
            context=self.context or longest,
            pages=self.pages,
            page_size=self.page_size,
            steps=self.steps,
            drafts=self.drafts,
            draft=None if draft is None else replicas(draft)[0],
            prefix_cache=self.prefix_cache,
            batch_invariant=self.batch_invariant,
            strict=self.strict,
        )

    @contextmanager
    def compiling(self) -> Iterator[Callable[[Compiled], None]]:
        """Shows which programs the engine compiles, and settles the process after the last; `compiling` of `LLM`."""
        from llama_jax import runtime
        from llama_jax.cli.progress import Reporter

        def compiled(news: Compiled) -> None:
            reporter.compiled(news)
            if news.done == news.total:
                runtime.freeze_live_objects()

        with Reporter(quiet=self.quiet or self._as_json) as reporter:
            reporter.notify("Compiling the engine's programs")
            yield compiled

    def about(self, model: Model, settings: EngineSettings, ceilings: Ceilings) -> dict[str, Any]:
        """Collects and shows everything that the numbers depend on."""
        from llama_jax.measure.bench import environment

        about = {**environment(model.dtype, model.mesh), "model": model.name, "random_weights": self.preset is not None}
        about |= {"kv_dtype": model.cache_dtype, "activations": model.config.activations or model.dtype.name}
        self.show("  ".join(f"{name}={value}" for name, value in about.items()), f"ceilings: {ceilings}")
        self.show(f"engine: {pairs_text(dataclasses.asdict(settings))}")
        return {**about, "ceilings": dataclasses.asdict(ceilings), "settings": dataclasses.asdict(settings)}

    def show(self, *lines: str) -> None:
        """Prints lines for people unless standard output is for JSON."""
        if not self._as_json:
            for line in lines:
                click.echo(line)

    def write(self, result: dict[str, Any]) -> None:
        """Writes the result to the destination of `--json`."""
        if self._as_json:
            print_json(result)
        elif self.out:
            with storage_errors(Path(self.out)):
                write_file(Path(self.out), (json.dumps(result, allow_nan=False) + "\n").encode())

    @property
    def _as_json(self) -> bool:
        return self.out == STANDARD_OUTPUT


subject_options = gathered(
    Subject,
    "subject",
    model_option,
    preset_option,
    click.option("--rows", type=click.IntRange(1), help="Sequences that run at once. [default: 8 on a CPU, else 256]"),
    click.option("--context", type=click.IntRange(2), help="Tokens of a sequence. [default: of the longest request]"),
    click.option(
        "--pages", type=click.IntRange(1), help="Pages of the KV cache. [default: as many as fit into memory]"
    ),
    page_size_option,
    click.option(
        "--steps",
        type=click.IntRange(1),
        help="Decode steps per dispatch while no request waits. [default: 8 if the device can loop on its own, else 1]",
    ),
    drafts_option,
    draft_model_option,
    click.option("--prefix-cache/--no-prefix-cache", default=True, show_default=True),
    batch_invariant_option,
    click.option("--strict", is_flag=True, help="Fail if anything is compiled once the engine is ready."),
    load_options,
    quiet_option,
    click.option(
        "--json",
        "out",
        is_flag=False,
        flag_value=STANDARD_OUTPUT,
        metavar="[FILE]",
        help="Print one JSON object instead, or write it to FILE.",
    ),
)
"""The options of a `Subject`, as a command's argument `subject`."""


def counts_text(counts: Mapping[str, Any]) -> str:
    """Counts of an engine during a run (`throughput.meanwhile`), as text."""
    return (
        f"{counts['steps']} steps, {counts['padding_share']:.1%} padding, {counts['prefix_hit_tokens']} tokens found, "
        f"{counts['preemptions']} preemptions, {counts['late_compilations']} late compilations"
    )


def rounds_option(default: int) -> Decorator:
    """`--rounds`, the argument `rounds`."""
    return click.option(
        "--rounds",
        type=click.IntRange(1),
        default=default,
        show_default=True,
        help="Timed rounds, of which medians are taken.",
    )


@dataclass(frozen=True)
class Requests:
    """Requests to send; see `workloads.workload`."""

    mix: str
    requests: int | None
    seed: int
    scale: float

    def make(self, vocab: int, context: int | None, rate: float = math.inf) -> list[Work]:
        """Makes the requests.

        Args:
          vocab, context: of the model; the context is None if unknown.
          rate: arrivals per second.

        Raises:
          RequestError: one of them is longer than the model's context.
        """
        works = workload(self.mix, vocab, requests=self.requests, rate=rate, seed=self.seed, scale=self.scale)
        longest = longest_of(works)
        if context is not None and longest > context:
            raise RequestError(
                f"a request of {longest} tokens; the model's context is {context}",
                param="scale",
                hint=f"--scale {0.95 * self.scale * context / longest:.2g} makes all of them fit",
            )
        return works

    def about(self, works: Sequence[Work], subject: Subject) -> dict[str, Any]:
        """Collects and shows the options and the resulting sizes."""
        about = {
            **dataclasses.asdict(self),
            "requests": len(works),
            "total_input_tokens": sum(len(work.prompt) for work in works),
            "total_output_tokens": sum(work.output_tokens for work in works),
        }
        subject.show(f"requests: {pairs_text(about)}")
        return about


def longest_of(works: Sequence[Work]) -> int:
    """Number of tokens of the longest request."""
    return max(work.length for work in works)


request_options = gathered(
    Requests,
    "requests",
    click.option(
        "--mix",
        type=click.Choice(tuple(MIXES)),
        default="sharegpt",
        show_default=True,
        help="; ".join(f"{name}: {mix.about}" for name, mix in MIXES.items()) + ".",
    ),
    click.option("--requests", type=click.IntRange(1), help="Number of requests. [default: 256; mixed 60, fixed 64]"),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
    click.option(
        "--scale",
        type=click.FloatRange(0, 1, min_open=True),
        default=1.0,
        show_default=True,
        help="Factor on all lengths, for small models.",
    ),
)
"""The options of `Requests`, as a command's argument `requests`."""
