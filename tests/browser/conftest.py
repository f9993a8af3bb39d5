"""A server with a tiny random model, and a browser: `uv run --group dev --group browser pytest -m browser -n 0`."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from test_server_process import KEY, serving
from tiny_chat_model import write_chat_model

from browser.reader import Reader

CONTEXT = 2048
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the group `browser`")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def url(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = write_chat_model(tmp_path_factory.mktemp("browser") / "tiny", context=CONTEXT)
    with serving(folder, "--context", str(CONTEXT)) as (_, said):
        yield said["url"]


@pytest.fixture
def visit(chromium: Any, url: str) -> Iterator[Any]:
    """A function that opens the page as somebody who has never been there."""
    with contextlib.ExitStack() as stack:
        readers: list[Reader] = []

        def visit(*, key: str = KEY, browser: dict[str, Any] | None = None, **settings: Any) -> Reader:
            context = chromium.new_context(**{"viewport": {"width": 1200, "height": 800}} | (browser or {}))
            stack.callback(context.close)
            readers.append(Reader(context, url, {"max_tokens": 24, "seed": 0} | settings, key))
            return readers[-1]

        yield visit
        for reader in readers:
            reader.check()
