"""Conversations in files: a list of messages, or, with branches, the tree format that the server's page exports."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.cli.chat_conversation import Conversation, Messages
from llama_jax.cli.inputs import read_json
from llama_jax.errors import RequestError, StorageError

_FORMAT, _VERSION = "llama_jax conversations", 1  # of llama_jax/server/ui/src/transfer.ts


def save_conversation(conversation: Conversation, path: Path) -> None:
    """Writes the messages as `llama-jax generate --messages` reads them, readable only by the user (mode 0600).

    Raises:
      StorageError: the file cannot be written, or exists and is not a conversation.
    """
    if os.path.lexists(path):
        try:
            load_conversation(path)
        except RequestError as error:
            raise StorageError(
                f"{path} exists and is not a conversation, so it is not replaced", hint="choose another name"
            ) from error
    linear = conversation.branches == (conversation.messages,)
    value: Any = conversation.all_messages if linear else _tree(conversation)
    text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # with mode 0600
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}", hint="choose another file") from error


def load_conversation(path: Path) -> Conversation:
    """Reads a file of `save_conversation` or the page, or another list of messages; a leading system message becomes
    the system prompt.

    Raises:
      RequestError: it cannot be read, or contains anything but text messages.
    """
    from llama_jax.text.chat import EXAMPLE, check_messages

    found = read_json(str(path.absolute()), param="messages", hint=EXAMPLE)
    try:
        if is_tree(found):
            conversation = conversation_of(found)
            for branch in conversation.branches:
                check_messages([dict(message) for message in branch])
            return conversation
        check_messages(found)
        for i, message in enumerate(found):
            if not isinstance(message.get("content"), str):
                raise _wrong(f"message {i} has no text", "a chat takes content that is a string")
    except RequestError as error:
        raise RequestError(f"{path}: {error.message}", param=error.param, hint=error.hint) from error
    system = found.pop(0)["content"] if found[0]["role"] == "system" else None
    return Conversation(tuple(found), system)


def is_tree(value: Any) -> bool:
    """Whether a value was exported by the page, or saved with branches."""
    return isinstance(value, dict) and value.get("format") == _FORMAT


def _tree(conversation: Conversation) -> dict[str, Any]:
    """The content of a page file. Fields of messages unknown to the page are under "extra"."""
    messages: dict[tuple[str | None, str], dict[str, Any]] = {}

    def placed(path: Messages) -> list[str]:
        """The ids of a path's messages, which are added if the tree lacks them."""
        parent: str | None = None
        ids = []
        for message in path:
            extra = {name: value for name, value in message.items() if name not in ("role", "content")}
            item = {"id": str(len(messages)), "parent": parent, "role": message["role"], "text": message["content"]}
            item = messages.setdefault((parent, json.dumps(message)), item | ({"extra": extra} if extra else {}))
            ids.append(parent := item["id"])
        return ids

    for path in conversation.branches:
        placed(path)
    shown = placed(conversation.messages)
    first = conversation.messages[0]["content"].strip() if conversation.messages else ""
    one = {
        "title": first.partition("\n")[0][:60] or "Untitled",
        "settings": {"system": conversation.system or ""},
        "messages": [*messages.values()],
        "shown": dict(zip(["", *shown], [*shown, None], strict=True)),
    }
    return {"format": _FORMAT, "version": _VERSION, "conversations": [one]}


def conversation_of(value: Mapping[str, Any]) -> Conversation:
    """The conversation in a file of the page, whose messages it has checked (transfer.ts says which fields there are).

    Raises:
      RequestError: there are several, or it is invalid.
    """
    if value.get("version") != _VERSION:
        raise _wrong(f"this file has version {value.get('version')!r:.20}", f"known is {_VERSION}")
    found = value.get("conversations")
    if not isinstance(found, list) or len(found) != 1:
        raise _wrong("this file has not just one conversation", "export one by itself")
    try:
        paths: dict[str | None, Messages] = {None: ()}
        children: dict[str | None, list[str]] = {}
        for item in found[0]["messages"]:
            parent, name = item["parent"], item["id"]
            if name in paths:
                raise _wrong(f"two messages have the id {name!r:.40}", "export it again")
            paths[name] = (*paths[parent], _message(item))
            children.setdefault(parent, []).append(name)
        shown, at = found[0].get("shown", {}), None
        while at in children:
            chosen = shown.get(at or "", children[at][-1])
            if chosen is None:
                break
            at = chosen if chosen in children[at] else children[at][-1]
        system = found[0].get("settings", {}).get("system") or None
        ends = tuple(path for name, path in paths.items() if name not in children)
        return Conversation(paths[at], system, ends)
    except (AttributeError, KeyError, TypeError) as error:
        raise _wrong("this is not a conversation of the server's page", "export it again") from error


def _message(item: Mapping[str, Any]) -> dict[str, Any]:
    """A message as a chat template takes it."""
    if not isinstance(item["role"], str) or not isinstance(item["text"], str):
        raise TypeError
    message: dict[str, Any] = {"role": item["role"], "content": item["text"]}
    if calls := item.get("calls"):
        message["tool_calls"] = [
            {"id": each["id"], "type": "function", "function": {name: each[name] for name in ("name", "arguments")}}
            for each in calls
        ]
    if call := item.get("call"):
        message["tool_call_id"] = call
    return message | dict(item.get("extra", {}))


def _wrong(what: str, hint: str) -> RequestError:
    return RequestError(what, param="messages", hint=hint)
