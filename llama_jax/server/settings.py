"""Settings of a server: address, admission, and limits."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, field
from pathlib import Path

from llama_jax.errors import RequestError


@dataclass(frozen=True)
class Limits:
    """Limits on one request, and on a client's time.

    Attributes:
      body: bytes; header_count, header_bytes: of all headers.
      depth: of nested values in a body.
      tools: that a request offers.
      temperature: OpenAI's bound.
      prompts: of one request; n: continuations of each; stops: strings that end a text, of `stop_chars` characters.
      header_s, body_s: until the headers, and the body, are complete.
      idle_s: between two requests of a connection.
      stalled_s: until a client that does not read is disconnected; reader_rate: bytes per second that it must read of
        an answer that exceeds the buffers between it and the server.
      keep_alive_s: between comments in a stream without events.
      step_s: that a step of the engine may take before it counts as stalled; hung_s: before the process ends.
      connections: at once.
    """

    body: int = 8 << 20
    header_count: int = 100
    header_bytes: int = 32 << 10
    depth: int = 64
    tools: int = 128
    temperature: float = 2.0
    prompts: int = 256
    n: int = 16
    stops: int = 4
    stop_chars: int = 1024
    header_s: float = 10.0
    body_s: float = 30.0
    idle_s: float = 75.0
    stalled_s: float = 30.0
    reader_rate: float = 1024.0
    keep_alive_s: float = 15.0
    step_s: float = 60.0
    hung_s: float = 300.0
    connections: int = 1000


@dataclass(frozen=True)
class ServerSettings:
    """Settings of one server.

    Attributes:
      host, port: to listen at; port 0 takes a free one.
      keys: any of which admits a client; without keys everybody is admitted, which requires a loopback address.
      hosts: names of the server for clients, besides its addresses.
      adapters_from: folder within which clients may name adapters to load; None for no loading by clients.
      drain_s: how long answers may continue once the server is to shut down.

    Raises:
      RequestError: there is no key, and the address is not loopback or clients may load adapters; or a key cannot be
        sent in a header.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    drain_s: float = 30.0
    limits: Limits = field(default_factory=Limits)
    adapters_from: Path | None = None

    def __post_init__(self) -> None:
        for key in self.keys:
            if not key.isascii() or not key.isprintable() or " " in key or not key:
                raise RequestError(
                    "a key is empty or has characters that a header cannot hold",
                    param="api_key",
                    hint="use letters, digits and signs of ASCII, without spaces",
                )
        if self.adapters_from is not None and not self.keys:
            raise RequestError(
                "clients may load adapters only with a key",
                param="adapters_from",
                hint="give --api-key or set LLAMA_JAX_API_KEY",
            )
        if not self.keys and not is_loopback(self.host):
            raise RequestError(
                f"{self.host} can be reached from other machines, and there is no key",
                param="host",
                hint="give --api-key or set LLAMA_JAX_API_KEY, or listen at 127.0.0.1",
            )

    def serves(self, host: str) -> bool:
        """Whether a Host header names this server.

        A foreign page whose name is made to resolve to this machine (DNS rebinding) sends its own name. Addresses
        cannot be rebound: a server that listens on all addresses accepts each of them.
        """
        name = _without_port(host).lower()
        if name in self.hosts or name == self.host.lower():
            return True
        address = _address(name)
        own = _address(self.host)
        everywhere = own is not None and own.is_unspecified
        if name == "localhost" or (address is not None and address.is_loopback):
            return everywhere or is_loopback(self.host)
        return everywhere and (address is not None or name == socket.gethostname().lower())


def is_loopback(host: str) -> bool:
    """Return whether an address is reachable only from this machine."""
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
