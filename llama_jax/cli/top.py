"""`llama-jax top`: the engines of this machine, live."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import click

from llama_jax.cli.engine_text import engine_block, engine_line
from llama_jax.cli.options import examples
from llama_jax.cli.terminal import catch_interrupt, print_json, printable
from llama_jax.engine.publishing import VARIABLE, published
from llama_jax.errors import EngineNotFound

if TYPE_CHECKING:
    from llama_jax.engine.publishing import Published

_POLL_S = 0.1


@click.command(
    name="top",
    epilog=examples(
        "llama-jax top",
        "llama-jax top --once",
        "llama-jax top --json --interval 10 >> engines.jsonl",
        f"{VARIABLE}=1 llama-jax bench serve --mix chat --rate 4    # an engine to watch",
    ),
)
@click.option("--once", is_flag=True, help="Show the present state and leave.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1),
    default=1.0,
    show_default=True,
    metavar="S",
    help="Seconds between two looks.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at each look, on a line of its own.")
def command(once: bool, interval: float, as_json: bool) -> None:
    """Watch the engines that run on this machine in processes of yours.

    An engine can be watched if its process was started with LLAMA_JAX_PUBLISH=1. In a terminal the numbers are drawn
    live, and q or Ctrl-C leaves; elsewhere each look is a line for each engine. Ends when the last engine does.
    """
    engines = published()
    if not engines:
        raise EngineNotFound(
            "no engine runs that can be watched", hint=f"start it with {VARIABLE}=1 in its environment, as this user"
        )
    if as_json or once or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        _print(engines, once=once, interval=interval, as_json=as_json)
    else:
        _draw(interval)


def _print(engines: list[Published], *, once: bool, interval: float, as_json: bool) -> None:
    with catch_interrupt() as interrupted:
        while engines:
            if as_json:
                print_json({"time": time.time(), "engines": [engine.to_json() for engine in engines]})
            else:
                for engine in engines:
                    lines = engine_block(engine) if once else [f"{engine.pid} {engine_line(engine.snapshot)}"]
                    for line in lines:
                        click.echo(printable(line))
                sys.stdout.flush()
            end = time.monotonic() + interval
            while not once and not interrupted() and time.monotonic() < end:
                time.sleep(_POLL_S)
            if once or interrupted():
                return
            engines = published()


def _draw(interval: float) -> None:
    # Imported here, since it takes 0.2 s.
    from prompt_toolkit import Application
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.layout import FormattedTextControl, Layout, Window

    keys = KeyBindings()

    @keys.add("q")
    @keys.add("c-c")
    @keys.add("c-d")
    def _(event: KeyPressEvent) -> None:
        event.app.exit()

    def text() -> str:
        engines = published()
        if not engines and app.is_running and not app.is_done:
            app.exit()
        blocks = [engine_block(engine) for engine in engines]
        return "\n".join(printable(line) for block in blocks for line in [*block, ""]) + "q leaves"

    app: Application[None] = Application(
        layout=Layout(Window(FormattedTextControl(text))),
        key_bindings=keys,
        refresh_interval=interval,
        full_screen=True,
    )
    app.run()
