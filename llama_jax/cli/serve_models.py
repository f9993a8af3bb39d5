"""The models of `llama-jax serve`: their names and how they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from llama_jax.cli.adapter_options import given_adapter, split_name
from llama_jax.cli.options import LoadOptions, is_auto, requested_mesh
from llama_jax.errors import ModelNotFound
from llama_jax.library import DEFAULT_MODEL, check_name

if TYPE_CHECKING:
    from llama_jax.cli.progress import Reporter
    from llama_jax.engine.compiled import Compiled
    from llama_jax.generation.engine import Engine
    from llama_jax.server.budget import Footprint
    from llama_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Named:
    """A model as `load` takes it, and its names for clients."""

    model: str
    names: tuple[str, ...]
    tool_parser: str = ""


def named_models(
    argument: str | None, options: Sequence[str], names: Sequence[str], parsers: Sequence[str]
) -> list[Named]:
    """Return the models that the command line names, without loading anything.

    Args:
      argument: MODEL; options: of `--model`, as MODEL or NAME=MODEL; names: of `--served-model-name`; parsers: of
        `--tool-parser`, as PARSER or NAME=PARSER.

    Raises:
      UsageError: the options do not go together.
      ModelNotFound: one of several models is neither local nor on the hub.
      RequestError: a tool parser is unknown.
    """
    from llama_jax.server.served import served_name
    from llama_jax.text.tools import format_named

    given = [*([] if argument is None else [("", argument)]), *map(split_name, options)] or [("", DEFAULT_MODEL)]
    if names and len(given) > 1:
        raise click.UsageError("--served-model-name is for one model; of several give --model NAME=MODEL")
    known = [names or (name or served_name(model),) for name, model in given]
    of = dict(split_name(parser) for parser in parsers)
    for parser in of.values():
        format_named(parser)
    if unknown := of.keys() - {"", *(name for each in known for name in each)}:
        raise click.UsageError(f"--tool-parser {min(unknown)}=...: no model is called so")
    if len(given) > 1:
        for _, model in given:
            check_name(model)

    def parser_of(names: Sequence[str]) -> str:
        return next((of[name] for name in names if name in of), of.get("", ""))

    return [Named(model, tuple(each), parser_of(each)) for (_, model), each in zip(given, known, strict=True)]


@dataclass(frozen=True)
class FromName:
    """A `server.slots.Source` that loads a model by its name.

    Attributes:
      sizes: of the engine, as the command line gives them; options: of `Engine` besides.
      early: of `Engine`; None for a CPU alone: on a GPU XLA times kernels as it compiles, which requests would disturb,
        and which delays them.
    """

    model: str
    loading: LoadOptions
    reporter: Reporter
    sizes: dict[str, Any]
    options: dict[str, Any]
    early: bool | None = None

    def outline(self) -> Footprint | None:
        """See `Source`."""
        import jax.numpy as jnp

        from llama_jax import runtime
        from llama_jax.library.configs import find_config
        from llama_jax.loading import held_config
        from llama_jax.plan import AutoMesh
        from llama_jax.server.budget import footprint

        try:
            config = find_config(self.model)
        except ModelNotFound:
            return None
        mesh = requested_mesh(self.loading.mesh, self.loading.tp)
        if isinstance(mesh, AutoMesh):
            return None
        loading = self.loading
        held = held_config(config, loading.weights, split=mesh is not None, activations=loading.activations)
        dtype = runtime.default_dtype() if loading.dtype is None else jnp.dtype(loading.dtype)
        return footprint(held, dtype, mesh, kv_dtype=loading.kv_dtype, **self.sizes)

    def fetch(self) -> None:
        """See `Source`."""
        from llama_jax.library import find, resolve

        bring = resolve if self.loading.convert else find
        bring(self.model, progress=self.reporter.progress, notify=self.reporter.notify)

    def open(self, kept: int, progress: Callable[[str], None]) -> tuple[Engine, Tokenizer]:
        """See `Source`."""
        from llama_jax.generation.engine import Engine

        told = _Both(self.reporter, progress)
        rows, context = self.sizes["rows"], self.sizes["context"]
        devices = requested_mesh(self.loading.mesh, self.loading.tp, batch=rows or 1, context=context)
        loaded, tokenizer = self.loading.load(self.model, devices, told, named=True)
        self.reporter.notify("Compiling the engine's programs")
        early = loaded.device.platform == "cpu" if self.early is None else self.early
        options = self.sizes | self.options
        engine = Engine(loaded, tokenizer, reserve=kept, compiling=told.compiled, early=early, **options)
        return engine, tokenizer


@dataclass(frozen=True)
class _Both:
    """Forwards loading progress to a reporter, and in a few words to `tell`."""

    reporter: Reporter
    tell: Callable[[str], None]

    def notify(self, message: str) -> None:
        """See `Reporter`."""
        self.reporter.notify(message)

    def progress(self, done: int, total: int, name: str) -> None:
        """See `Reporter`."""
        self.reporter.progress(done, total, name)
        self.tell(f"loading, {done / max(total, 1):.0%} of the weights are there")

    def compiled(self, news: Compiled) -> None:
        """See `Reporter`."""
        self.reporter.compiled(news)
        self.tell(f"compiling, {news.done} of {news.total} programs are there")


def check_mesh(loading: LoadOptions, models: Sequence[Named]) -> None:
    """Raises UsageError if a mesh would be chosen by memory that several models share."""
    if len(models) > 1 and is_auto(loading.mesh, loading.tp):
        raise click.UsageError("--mesh auto chooses by the memory that is free; with several models give --tp")


def check_adapters(loading: LoadOptions, models: Sequence[Named], *, slots: bool) -> None:
    """Raises UsageError if adapters are for several models, or named like one."""
    named = given_adapter(loading.adapters, named=True)
    if len(models) > 1 and (named is not None or slots):
        raise click.UsageError("adapters are of one model: serve it alone")
    if isinstance(named, dict) and (same := named.keys() & set(models[0].names)):
        raise click.UsageError(f"--adapter {min(same)}=...: the model is called so")
    if isinstance(named, str) and slots:
        raise click.UsageError("--adapter FOLDER changes the whole model; give NAME=FOLDER for one of several")
