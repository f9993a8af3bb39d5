"""`llama-jax serve`: models behind the APIs of OpenAI and Anthropic."""

from __future__ import annotations

from pathlib import Path

import click

from llama_jax.cli.options import (
    LoadOptions,
    claim_memory,
    examples,
    json_option,
    load_options,
    page_size_option,
    quiet_option,
    yes_option,
)
from llama_jax.cli.serve_models import FromName, check_adapters, check_mesh, named_models
from llama_jax.cli.terminal import print_json

KEY = "LLAMA_JAX_API_KEY"
DEFAULT_ADAPTERS = 8
"""Slots of adapters, where clients may load some."""


@click.command(
    name="serve",
    epilog=examples(
        "llama-jax serve",
        "llama-jax serve meta-llama/Llama-3.1-8B-Instruct --tp 2 --served-model-name llama",
        "llama-jax serve --model chat=meta-llama/Llama-3.1-8B-Instruct --model big=/models/llama-3.1-70b",
        "llama-jax serve meta-llama/Llama-3.1-8B-Instruct --adapter sql=./sql-lora --adapter chat=./chat-lora",
        f"{KEY}=... llama-jax serve --host 0.0.0.0 --ssl-certfile cert.pem --ssl-keyfile key.pem",
        "curl http://127.0.0.1:8000/v1/models",
    ),
)
@click.argument("model", metavar="[MODEL]", required=False)
@click.option(
    "-m",
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]MODEL",
    help="A model to serve; NAME is its name for clients. The first is loaded at start-up, others when a request names "
    "them.",
)
@yes_option
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 picks a free port.")
@click.option(
    "--api-key",
    "keys",
    multiple=True,
    envvar=KEY,
    metavar="KEY",
    help=f"What clients must send; needed for any address but this machine's own. May be repeated. [also: {KEY}, which "
    "other users of the machine cannot see]",
)
@click.option(
    "--allowed-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="A name that clients call the server by, as behind a proxy. May be repeated.",
)
@click.option(
    "--served-model-name",
    "names",
    multiple=True,
    metavar="NAME",
    help="The model's name for clients. May be repeated. [default: MODEL; for a path, its last part]",
)
@click.option(
    "--tool-parser",
    "parsers",
    multiple=True,
    metavar="[NAME=]PARSER",
    help="How models, or the model of that name, write tool calls. [default: by the chat template]",
)
@click.option("--rows", type=click.IntRange(1), help="Sequences that run at once. [default: 8 on a CPU, else 256]")
@click.option("--context", type=click.IntRange(2), help="Tokens of a sequence. [default: the model's, 4096 on a CPU]")
@click.option("--pages", type=click.IntRange(1), help="Pages of the KV cache. [default: as many as fit into memory]")
@page_size_option
@click.option(
    "--waiting",
    type=click.IntRange(0),
    default=512,
    show_default=True,
    metavar="N",
    help="Sequences that may wait; beyond that, requests are rejected (429).",
)
@click.option(
    "--max-adapters",
    type=click.IntRange(1),
    metavar="N",
    help="Maximum number of adapters loaded at once. [default: those of --adapter; 8 with --adapters-from]",
)
@click.option(
    "--max-adapter-rank",
    type=click.IntRange(1),
    metavar="R",
    help="Their largest rank. [default: that of those given, and 16 at least if others may come]",
)
@click.option(
    "--adapters-from",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Let clients, with a key, load adapters from folders in DIR, and unload them.",
)
@click.option("--prefix-cache/--no-prefix-cache", default=True, show_default=True)
@click.option(
    "--early/--no-early",
    default=None,
    help="Answer once a few programs are compiled, at first less quickly, and compile the others meanwhile. "
    "[default: on a CPU]",
)
@load_options
@click.option("--max-body", type=click.IntRange(1), default=8 << 20, show_default=True, metavar="BYTES")
@click.option(
    "--drain-s",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    metavar="S",
    help="How long answers may continue after SIGTERM or Ctrl-C; a second signal ends at once.",
)
@click.option(
    "--restarts",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    metavar="N",
    help="Consecutive attempts to restart the engine after a device failure.",
)
@click.option(
    "--hung-s",
    type=click.FloatRange(0, min_open=True),
    default=300.0,
    show_default=True,
    metavar="S",
    help="A device step that takes longer ends the process, so that its supervisor restarts it.",
)
@click.option("--ssl-certfile", type=click.Path(exists=True, dir_okay=False), help="TLS certificate, for https.")
@click.option("--ssl-keyfile", type=click.Path(exists=True, dir_okay=False), help="Its private key.")
@click.option("--ssl-keyfile-password", envvar="LLAMA_JAX_SSL_KEYFILE_PASSWORD", help="Of the private key.")
@click.option(
    "--metrics-names",
    type=click.Choice(("llama_jax", "vllm")),
    default="llama_jax",
    show_default=True,
    help="Names of the metrics; vllm is for dashboards made for vLLM.",
)
@click.option("--access-log", is_flag=True, help="Write one line of JSON per request to standard error.")
@quiet_option
@json_option
def command(
    model: str | None,
    models: tuple[str, ...],
    host: str,
    port: int,
    keys: tuple[str, ...],
    hosts: tuple[str, ...],
    names: tuple[str, ...],
    parsers: tuple[str, ...],
    rows: int | None,
    context: int | None,
    pages: int | None,
    page_size: int,
    waiting: int,
    max_adapters: int | None,
    max_adapter_rank: int | None,
    adapters_from: Path | None,
    prefix_cache: bool,
    early: bool | None,
    loading: LoadOptions,
    max_body: int,
    drain_s: float,
    restarts: int,
    hung_s: float,
    ssl_certfile: str | None,
    ssl_keyfile: str | None,
    ssl_keyfile_password: str | None,
    metrics_names: str,
    access_log: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Serve MODEL, by default the bundled one, to OpenAI's and Anthropic's clients over HTTP.

    It answers /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /v1/models, /tokenize, /detokenize,
    /health/live, /health/ready, /engines, /metrics and /version. --json prints one object, with the address, once it
    answers. See docs/server.md.
    """
    from llama_jax.server.settings import Limits, ServerSettings

    if ssl_keyfile and not ssl_certfile:
        raise click.UsageError("--ssl-keyfile needs --ssl-certfile")
    lower = tuple(name.lower() for name in hosts)
    limits = Limits(body=max_body, hung_s=hung_s)
    settings = ServerSettings(host, port, keys, lower, drain_s, limits, adapters_from)
    served = named_models(model, models, names, parsers)
    check_mesh(loading, served)
    if adapters_from is not None and max_adapters is None:
        max_adapters = DEFAULT_ADAPTERS
    check_adapters(loading, served, slots=max_adapters is not None)

    import asyncio
    import logging

    from llama_jax import runtime
    from llama_jax.cli.progress import Reporter
    from llama_jax.generation.restarts import Restarts
    from llama_jax.server.metrics import NAMINGS, Metrics
    from llama_jax.server.models import Models
    from llama_jax.server.running import bound_socket, run
    from llama_jax.server.slots import Slot
    from llama_jax.server.state import ServerState

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("llama_jax.server").setLevel(logging.WARNING if quiet else logging.INFO)
    logging.getLogger("llama_jax.server.access").setLevel(logging.INFO if access_log else logging.WARNING)
    claim_memory()
    with bound_socket(settings) as listening, Reporter(quiet=quiet or as_json) as reporter:
        reporter.warn_of_unused_gpu()
        sizes = {"rows": rows, "context": context, "pages": pages, "page_size": page_size}
        metrics = Metrics(NAMINGS[metrics_names])

        def slot(index: int) -> Slot:
            one = served[index]
            options = {
                "waiting": waiting,
                "prefix_cache": prefix_cache,
                "restarts": Restarts(restarts),
                "max_adapters": max_adapters,
                "max_adapter_rank": max_adapter_rank,
            }
            return Slot(one.names, FromName(one.model, loading, reporter, sizes, options, early), one.tool_parser)

        models_here = Models(map(slot, range(len(served))), settings, metrics, settle=runtime.freeze_live_objects)
        state = ServerState(settings, models_here, metrics)
        shown = f"[{host}]" if ":" in host else host
        url = f"http{'s' if ssl_certfile else ''}://{shown}:{listening.getsockname()[1]}"

        def ready() -> None:
            first, *others = state.models.slots
            if as_json:
                names = state.models.names
                print_json(
                    {"url": url, "model": first.names[0], "models": names, "context": first.context, "keys": len(keys)}
                )
            else:
                reporter.notify(f"{first.names[0]} answers at {url}/v1; chat with it at {url}")
                if others:
                    reporter.notify(f"Loaded when they are asked for: {', '.join(one.names[0] for one in others)}")

        asyncio.run(
            run(
                state,
                listening,
                ready=ready,
                ssl_keyfile=ssl_keyfile,
                ssl_certfile=ssl_certfile,
                ssl_keyfile_password=ssl_keyfile_password,
            )
        )
