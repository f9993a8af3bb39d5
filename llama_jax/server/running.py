"""Life cycle of a server: listening, answering, graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager

import uvicorn

from llama_jax.errors import RequestError
from llama_jax.server.app import application
from llama_jax.server.connections import protocol
from llama_jax.server.settings import ServerSettings
from llama_jax.server.state import ServerState
from llama_jax.server.watchdog import FAULT, LAST_WORDS_S, watched

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_POLL_S = 0.05
_INTERRUPTED = 130
_SEND_BUFFER = 64 << 10
"""Bytes that the kernel buffers for a client that does not read; without a bound up to 4 MB, unnoticed."""
_THREADS = 32
"""Threads for encoding prompts and compiling grammars; some wait for seconds."""

log = logging.getLogger("llama_jax.server")


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers, which would end the process by the signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bound_socket(settings: ServerSettings) -> socket.socket:
    """Return a socket at the server's address, before any slow work.

    Raises:
      RequestError: the address is in use, or not on this machine.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, number)
    except (OSError, UnicodeError) as error:  # the second of a name that is too long
        raise RequestError(f"there is no address {settings.host!r}: {error}", param="host", hint="see --host") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)  # inherited by each connection
        made.bind(address)
    except OSError as error:
        made.close()
        raise RequestError(
            f"cannot listen at {settings.host} port {settings.port}: {error.strerror}",
            param="port",
            hint="another program may use it; --port takes another, 0 any that is free",
        ) from None
    return made


async def run(
    state: ServerState,
    listening: socket.socket,
    *,
    ready: Callable[[], None] = lambda: None,
    ssl_keyfile: str | None = None,
    ssl_certfile: str | None = None,
    ssl_keyfile_password: str | None = None,
) -> None:
    """Load the first model and run the server until SIGINT, SIGTERM or, unless it is ignored (nohup), SIGHUP.

    Then new requests are rejected (503) while those in progress have `drain_s` to finish; the rest end in an error
    that is sent to their clients. A second signal cuts this short.

    Args:
      ready: called once the server answers.

    Raises:
      RequestError: a certificate or key cannot be used.
    """
    settings = state.settings
    config = uvicorn.Config(
        application(state),
        http=protocol(settings.limits),  # h11, with deadlines
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=2 * settings.limits.header_bytes,
        timeout_keep_alive=round(settings.limits.idle_s),
        limit_concurrency=settings.limits.connections,
        timeout_graceful_shutdown=int(LAST_WORDS_S),
        ssl_keyfile=ssl_keyfile,
        ssl_certfile=ssl_certfile,
        ssl_keyfile_password=ssl_keyfile_password,
    )
    try:
        config.load()  # before the engine is compiled, which may take minutes
    except OSError as error:
        raise RequestError(
            f"the certificate or its key cannot be used: {error}", param="ssl_certfile", hint="both are PEM files"
        ) from None
    server = _Server(config)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, "llama_jax server"))
    async with AsyncExitStack() as models, _signals() as asked:
        await models.enter_async_context(state.models)
        await models.enter_async_context(watched(state))
        asked.started = True
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        ending = asyncio.create_task(asked.acquire())
        while not (server.started or serving.done()):
            await asyncio.sleep(_POLL_S)
        ready()
        await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            await _drained(state, asked)
            await _ended(models)
            server.should_exit = True
        ending.cancel()
        await serving
    if state.models.busy:  # a thread that loads or compiles cannot be stopped, and the process would wait for it
        log.info("a model was being loaded or compiled")
        os._exit(0)


class _Asked(asyncio.Semaphore):
    """Released by each signal. A signal before the server has started ends the process, since compilation cannot be
    stopped otherwise."""

    started = False

    def signalled(self) -> None:
        if not self.started:
            log.warning("interrupted")
            os._exit(_INTERRUPTED)
        self.release()


@asynccontextmanager
async def _signals() -> AsyncIterator[_Asked]:
    loop, asked = asyncio.get_running_loop(), _Asked(0)
    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in heeded:
        loop.add_signal_handler(number, asked.signalled)
    try:
        yield asked
    finally:
        for number in heeded:
            loop.remove_signal_handler(number)


async def _drained(state: ServerState, asked: _Asked) -> None:
    """Waits until no request is in progress, time is up, or another signal arrives."""
    state.life.draining = True
    log.info("ending: %d requests are under way and have %g s", state.life.active, state.settings.drain_s)
    again = asyncio.create_task(asked.acquire())
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(state.settings.drain_s):
            while state.life.active and not again.done():
                await asyncio.sleep(_POLL_S)
    again.cancel()


async def _ended(models: AsyncExitStack) -> None:
    """Ends the engines, which notify waiting callers; a hung device does not keep the process alive."""
    closing = asyncio.create_task(models.aclose())
    await asyncio.wait({closing}, timeout=LAST_WORDS_S)
    if not closing.done():
        log.error("an engine does not end; the process does")
        os._exit(FAULT)
    await closing
