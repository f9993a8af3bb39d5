"""Reading of the user's inputs: standard input, and files of messages."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from llama_jax.errors import RequestError


def read_text(source: str, *, param: str) -> str:
    """The text of a file, or of standard input for "-".

    Raises:
      RequestError: it cannot be read, or is not UTF-8.
    """
    where = "standard input" if source == "-" else source
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise RequestError(
            f"{where} is not UTF-8 (byte {e.start})", param=param, hint="convert it, e.g. with iconv"
        ) from e
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else str(e)
        raise RequestError(f"cannot read {where}: {reason}", param=param, hint="check the path") from e


def read_prompt(prompt: str) -> str:
    """The prompt itself, or standard input for "-", without one final newline.

    Raises:
      RequestError: it is not valid Unicode.
    """
    if prompt == "-":
        return read_text("-", param="prompt").removesuffix("\n")
    return valid(prompt, "the prompt", param="prompt")


def valid(text: str, what: str, *, param: str) -> str:
    """The text, of the command line or the terminal.

    Raises:
      RequestError: it is not valid Unicode: bytes that are not UTF-8 arrive as lone surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise RequestError(f"{what} is not UTF-8", param=param, hint="convert it, e.g. with iconv") from e
    return text


def read_json(source: str, *, param: str, hint: str) -> Any:
    """A value from a JSON file, or from standard input for "-".

    Raises:
      RequestError: it cannot be read, or is not JSON; with this hint.
    """
    text = read_text(source, param=param)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise RequestError(f"{source} is not valid JSON: {e}", param=param, hint=hint) from e


def read_messages(source: str) -> list[dict[str, Any]]:
    """A conversation from a JSON file, or from standard input for "-": a list of objects with role and content, or
    a file saved by a chat or the server's page, of which the shown path is used.

    Raises:
      RequestError: it cannot be read, is not a conversation, or has an unknown role.
    """
    from llama_jax.cli.chat_files import conversation_of, is_tree
    from llama_jax.text.chat import EXAMPLE, check_messages

    found = read_json(source, param="messages", hint=EXAMPLE)
    try:
        messages = [dict(m) for m in conversation_of(found).all_messages] if is_tree(found) else found
        check_messages(messages)
    except RequestError as e:
        raise RequestError(f"{source}: {e.message}", param=e.param, hint=e.hint) from e
    return messages
