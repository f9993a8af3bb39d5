"""A client for servers with OpenAI's API."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any, Self
from urllib.parse import urlsplit

from llama_jax.errors import (
    EngineFailed,
    LlamaJaxError,
    ModelNotFound,
    NetworkError,
    Overloaded,
    RequestError,
    did_you_mean,
)

CONNECT_S, READ_S = 10.0, 600.0
"""Time limit for a connection, and for the next piece of an answer."""
_HOST = re.compile(r"[A-Za-z0-9._:%-]+")
"""A name or an address."""


class Remote:
    """A server, within `async with`.

    Attributes:
      url: without the path of a route; headers: of every request.
    """

    def __init__(self, url: str, key: str | None = None):
        """A server that is not asked anything yet; a URL that ends in /v1 is taken, too.

        Raises:
          RequestError: the URL, or the key, is none.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        if not _is_url(self.url):
            raise RequestError(f"{url!r} is not a URL of a server", param="url", hint="e.g. http://127.0.0.1:8000")
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            raise RequestError(
                "the key has characters that a key cannot have", param="api_key", hint="give one key, without spaces"
            )
        self.headers = {"authorization": f"Bearer {key}"} if key else {}

    async def __aenter__(self) -> Self:
        import httpx2  # takes 0.1 s

        self._client = httpx2.AsyncClient(
            base_url=self.url,
            headers=self.headers,
            timeout=httpx2.Timeout(READ_S, connect=CONNECT_S),
            limits=httpx2.Limits(max_connections=None),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()
        del self._client  # what is left can be sent to other processes

    async def models(self) -> list[dict[str, Any]]:
        """The models that the server has, as it describes them.

        Raises:
          NetworkError: it cannot be reached.
          LlamaJaxError: it refuses, or gives no such list.
        """
        with contextlib.suppress(TypeError, KeyError):
            return [dict(model) for model in (await self._json("GET", "/v1/models"))["data"]]
        raise NetworkError(f"{self.url}/v1/models gives no list of models", hint="is it a server with OpenAI's API?")

    async def model(self, name: str | None) -> dict[str, Any]:
        """One of the models; the first without a name.

        Raises:
          ModelNotFound: there is none of that name; otherwise as for `models`.
        """
        models = await self.models()
        names = [str(model.get("id")) for model in models]
        found = next((model for model in models if model.get("id") and name in (None, model["id"])), None)
        if found is None:
            hint = did_you_mean(name or "", names) or f"it has {', '.join(names) or 'none'}"
            raise ModelNotFound(f"{self.url} has no model {name or ''}".rstrip(), hint=hint)
        return found

    async def get(self, path: str) -> Any:
        """The answer of a route, in JSON; errors as for `events`."""
        return await self._json("GET", path)

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request that is not streamed; errors as for `events`."""
        return dict(await self._json("POST", path, json=body))

    async def _json(self, method: str, path: str, **options: Any) -> Any:
        with _network(self.url):
            answer = await self._client.request(method, path, **options)
            if answer.status_code != 200:
                raise refusal(answer.status_code, answer.text)
            return answer.json()

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """The events of a streamed answer, as they come.

        Raises:
          NetworkError: the server cannot be reached, or has gone.
          Overloaded: it takes no more requests at the moment.
          RequestError: it refuses this one.
          EngineFailed: it reports a fault of its own.
        """
        import httpx2

        with _network(self.url):
            async with self._client.stream("POST", path, json={**body, "stream": True}) as answer:
                if answer.status_code != 200:
                    raise refusal(answer.status_code, (await answer.aread()).decode(errors="replace"))
                async for event in httpx2.EventSource(answer):
                    if event.data == "[DONE]":
                        return
                    found = json.loads(event.data)
                    if "error" in found:
                        raise EngineFailed(f"the server ended the answer: {_message(found)}", hint="look into its log")
                    yield found
        raise NetworkError(f"{self.url} ended an answer before its end", hint="look into the server's log")


def _is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.port != 0
        # As the resolver does, which fails with a UnicodeError.
        return known and _HOST.fullmatch((parts.hostname or "").encode("idna").decode()) is not None
    except ValueError:
        return False


@contextlib.contextmanager
def _network(url: str) -> Iterator[None]:
    import httpx2

    try:
        yield
    except httpx2.TransportError as error:
        what = str(error) or type(error).__name__
        raise NetworkError(
            f"{url} does not answer: {what}", hint="is the server running, and the URL right?"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NetworkError(f"{url} answers with what is not JSON: {error}", hint="is it OpenAI's API?") from error


def refusal(status: int, text: str) -> LlamaJaxError:
    """The error that a status other than 200 means, with the body's text."""
    message = text[:500]
    with contextlib.suppress(ValueError):
        message = _message(json.loads(text))
    what = f"the server answers {status}: {message}"
    if status in (401, 403):
        return RequestError(what, param="api_key", hint="pass its key: --api-key, or LLAMA_JAX_API_KEY")
    if status in (429, 503):
        return Overloaded(what, hint="send it again later, or fewer at a time")
    if 400 <= status < 500:
        return RequestError(what, param="body", hint="another server may know other fields, models or ids")
    return EngineFailed(what, hint="look into its log")


def _message(found: Any) -> str:
    error = found.get("error", found) if isinstance(found, dict) else found
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
