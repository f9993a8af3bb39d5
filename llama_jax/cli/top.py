"""`llama-jax top`: the engines of this machine, or of a server, live."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable

import click

from llama_jax.cli.engine_text import engine_block, engine_line
from llama_jax.cli.options import examples
from llama_jax.cli.serve import KEY
from llama_jax.cli.terminal import catch_interrupt, print_json, printable
from llama_jax.engine.publishing import VARIABLE, Published, published
from llama_jax.errors import EngineNotFound, LlamaJaxError, NetworkError
from llama_jax.remote import Remote

Look = Callable[[], list[Published]]
"""Returns the current engines. Its exceptions end the watching."""

_POLL_S = 0.1


@click.command(
    name="top",
    epilog=examples(
        "llama-jax top",
        "llama-jax top --once",
        "llama-jax top --json --interval 10 >> engines.jsonl",
        "llama-jax top --url http://127.0.0.1:8000",
        f"{VARIABLE}=1 llama-jax bench serve --mix chat --rate 4    # an engine to watch",
    ),
)
@click.option("--url", metavar="URL", help="Watch the engines of a llama-jax server instead of this machine's.")
@click.option(
    "--api-key", envvar=KEY, metavar="KEY", help=f"The server's key. [also: {KEY}, which other users cannot see]"
)
@click.option("--once", is_flag=True, help="Print the current state and exit.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1),
    default=1.0,
    show_default=True,
    metavar="S",
    help="Seconds between updates.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per update, each on its own line.")
def command(url: str | None, api_key: str | None, once: bool, interval: float, as_json: bool) -> None:
    """Watch the engines in your processes on this machine, or those of a server.

    An engine of this machine can be watched if its process was started with LLAMA_JAX_PUBLISH=1; those of a server of
    llama-jax by whoever has its key. In a terminal the numbers are updated live, and q or Ctrl-C quits; elsewhere each
    update is a line per engine. Ends when the last engine does.
    """
    look = published if url is None else of_server(Remote(url, api_key))
    engines = look()
    if not engines:
        hint = f"start it with {VARIABLE}=1 in its environment, as this user" if url is None else "look into its log"
        where = "" if url is None else f" at {url}"
        raise EngineNotFound(f"no engine runs{where} that can be watched", hint=hint)
    if as_json or once or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        _print(engines, look, once=once, interval=interval, as_json=as_json)
    else:
        _draw(look, interval)


def of_server(server: Remote) -> Look:
    """Return what asks a server for its engines. It raises what `Remote` does, and NetworkError where there is none of
    llama-jax."""

    async def asked() -> list[Published]:
        async with server:
            return [Published.from_json(engine) for engine in (await server.get("/engines"))["engines"]]

    def look() -> list[Published]:
        try:
            return asyncio.run(asked())
        except (KeyError, TypeError):
            raise NetworkError(
                f"{server.url}/engines does not tell of engines as this version knows them",
                hint="is it a server of llama-jax, of the same version?",
            ) from None

    return look


def _print(engines: list[Published], look: Look, *, once: bool, interval: float, as_json: bool) -> None:
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
            engines = look()


def _draw(look: Look, interval: float) -> None:
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

    shown, left = "", threading.Event()

    def watch() -> None:
        """Polls in a separate thread: a server may be slow to answer, and q must leave at once."""
        nonlocal shown
        while True:
            try:
                engines = look()
            except LlamaJaxError as error:
                return end(error)
            if not engines:
                return end(None)
            blocks = [engine_block(engine) for engine in engines]
            shown = "\n".join(printable(line) for block in blocks for line in [*block, ""]) + "q leaves"
            app.invalidate()
            if left.wait(interval):
                return None

    def end(error: LlamaJaxError | None) -> None:
        def leave() -> None:
            if not app.is_done:
                app.exit(exception=error) if error else app.exit()

        if app.loop is not None:
            app.loop.call_soon_threadsafe(leave)

    app: Application[None] = Application(
        layout=Layout(Window(FormattedTextControl(lambda: shown))), key_bindings=keys, full_screen=True
    )
    watching = threading.Thread(target=watch, daemon=True)
    try:
        app.run(pre_run=watching.start)
    finally:
        left.set()
