"""Operations that load and unload adapters while the server runs, as vLLM has them."""

from __future__ import annotations

from pathlib import Path

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from llama_jax.errors import CheckpointError, RequestError, UnsupportedModel
from llama_jax.server.errors import Refused
from llama_jax.server.operations import Operation, asked_model, read
from llama_jax.server.state import ServerState


class LoadAdapterBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /v1/load_lora_adapter; `lora_path` is a folder within the server's `--adapters-from`."""

    lora_name: str
    lora_path: str
    model: str | None = None


class UnloadAdapterBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /v1/unload_lora_adapter."""

    lora_name: str


async def _load(server: ServerState, request: Request) -> Response:
    body = await read(server, request, LoadAdapterBody)
    folder = _folder(server, body.lora_path)
    if body.lora_name in server.models.names:
        raise RequestError(
            f"there is a model or an adapter {body.lora_name!r:.100} already",
            param="lora_name",
            hint="unload it first, or take another name",
        )
    async with asked_model(server, request, body.model) as served:
        try:
            await served.engine.load_adapter(body.lora_name, folder)
        except (CheckpointError, UnsupportedModel) as error:  # the client's choice of a folder, not our fault
            raise Refused(400, error.message, code="bad_adapter", param="lora_path", hint=error.hint) from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def _unload(server: ServerState, request: Request) -> Response:
    body = await read(server, request, UnloadAdapterBody)
    _allowed(server)
    slot = server.models.find(body.lora_name)
    if body.lora_name not in slot.adapters:
        raise RequestError(f"{body.lora_name!r:.100} is not an adapter", param="lora_name", hint="models stay loaded")
    async with asked_model(server, request, slot.names[0]) as served:
        await served.engine.unload_adapter(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _allowed(server: ServerState) -> Path:
    if (root := server.settings.adapters_from) is None:
        raise Refused(
            403,
            "adapters are neither loaded nor unloaded here",
            code="adapters_are_fixed",
            hint="start the server with --adapters-from DIR and an --api-key",
        )
    return root


def _folder(server: ServerState, path: str) -> Path:
    """The folder of an adapter; clients must not learn of any other on this machine."""
    root = _allowed(server)
    try:
        folder = (root / path).resolve()
        found = folder.is_relative_to(root.resolve()) and folder.is_dir()
    except (OSError, ValueError):
        found = False
    if not found:
        raise RequestError(
            f"there is no adapter in {path!r:.200}", param="lora_path", hint="name a folder within --adapters-from"
        )
    return folder


OPERATIONS = (
    Operation("POST", "/v1/load_lora_adapter", "Load an adapter under a name", _load, LoadAdapterBody),
    Operation("POST", "/v1/unload_lora_adapter", "Unload an adapter", _unload, UnloadAdapterBody),
)
