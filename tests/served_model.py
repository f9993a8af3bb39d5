"""A tiny model behind a server, in this process; the event loop that it needs belongs to its user."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asgi_client import Answer, call
from engines import small_settings
from tiny_chat_model import write_chat_model

from llama_jax.engine.settings import EngineSettings
from llama_jax.generation.engine import Engine
from llama_jax.generation.restarts import Restarts
from llama_jax.loading import load
from llama_jax.server.app import application
from llama_jax.server.settings import ServerSettings
from llama_jax.server.state import ServerState

SETTINGS = small_settings(context=128, pages=24)
NAME = "tiny"


def tiny_model(folder: Path, **options: Any) -> tuple[Any, Any]:
    """A model that chats, and its tokenizer; options as of `write_chat_model`."""
    return load(write_chat_model(folder, **options), dtype="float32", convert=False)


class Server:
    """A server that is not behind a socket; engines of one model share their programs."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        runner: asyncio.Runner,
        waiting: int = 64,
        sizes: EngineSettings = SETTINGS,
        restarts: Restarts | None = None,
        ahead: bool = False,
        adapters: dict[str, Any] | None = None,
        max_adapters: int | None = None,
        **settings: Any,
    ):
        sizes = dataclasses.replace(sizes, waiting=waiting)
        slots = {"adapters": adapters, "max_adapters": max_adapters}
        self.engine = Engine(model, tokenizer, settings=sizes, ahead=ahead, restarts=restarts, **slots)
        self.state = ServerState.of(self.engine, tokenizer, (NAME,), ServerSettings(**settings))
        (self.served,) = self.state.models.loaded
        self.app, self.tokenizer, self._runner = application(self.state), tokenizer, runner

    def __enter__(self) -> Server:
        self.run(self.state.models.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self.state.models.__aexit__())

    def run(self, coroutine: Any) -> Any:
        return self._runner.run(coroutine)

    def call(self, method: str, path: str, body: Any = None, **options: Any) -> Answer:
        return self.run(call(self.app, method, path, body, **options))

    def post(self, path: str, /, **body: Any) -> Answer:
        return self.call("POST", path, body)

    def chat(self, text: str = "Hi", **body: Any) -> Answer:
        return self.post("/v1/chat/completions", messages=[{"role": "user", "content": text}], **body)

    async def until(self, true: Callable[[], bool]) -> None:
        for _ in range(3000):
            if true():
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"never true: {self.engine.snapshot()}")

    @property
    def unused(self) -> bool:
        """Whether no request has a row, waits or holds a page."""
        counts = self.engine.snapshot().counts
        return counts.running == counts.waiting == counts.pages_used == 0
