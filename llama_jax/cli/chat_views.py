"""Branches, tokens and probabilities as lines of text, for the commands of a chat."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.cli.chat_conversation import Conversation
from llama_jax.cli.terminal import meter, table

_EXCERPT = 50
_METER = 5


def branch_lines(conversation: Conversation) -> list[str]:
    """One line per branch: its number, its messages, and where it leaves the shown path."""
    rows = []
    for number, path in enumerate(conversation.branches, start=1):
        pairs = zip(path, conversation.messages, strict=False)
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(path), len(conversation.messages)))
        shown = path == conversation.messages
        where = "shown" if shown else f"from message {common + 1}" if common < len(path) else "its end"
        first = path[-1 if shown else common] if path else {"role": "", "content": ""}
        rows.append(
            ("*" if shown else " ", str(number), f"{len(path)} messages", where, f"{first['role']}: {_excerpt(first)}")
        )
    return table(rows)


def token_lines(messages: Sequence[Mapping[str, Any]], counts: Sequence[int | None], context: int | None) -> list[str]:
    """One line for each message, and the sum.

    Args:
      counts: tokens of the conversation up to the end of each message; None if unknown.
    """
    rows, before = [], 0
    for number, (message, count) in enumerate(zip(messages, counts, strict=True), start=1):
        more = "?" if count is None else str(count - before)
        before = before if count is None else count
        rows.append((str(number).rjust(3), message["role"], more.rjust(6), _excerpt(message)))
    total = counts[-1] if counts else 0
    room = f" of {context} tokens" if context is not None else " tokens"
    share = f" ({total / context:.0%})".replace("%", " %") if total is not None and context else ""
    return [*(table(rows) if rows else []), f"context: {'unknown' if total is None else total}{room}{share}"]


def logprob_lines(tokens: Sequence[Mapping[str, Any]], columns: int) -> list[str]:
    """One line per token: its probability, and the likeliest alternatives, as far as they fit.

    Args:
      tokens: in the format of OpenAI's API.
    """
    rows = []
    for token in tokens:
        others = [_likely(other) for other in token.get("top_logprobs") or () if other["token"] != token["token"]]
        share = math.exp(min(token["logprob"], 0.0))
        rows.append((_percent(share), meter(share, _METER), _quoted(token["token"]), ", ".join(others)))
    return [line[:columns] for line in table(rows)]


def _likely(token: Mapping[str, Any]) -> str:
    return f"{_quoted(token['token'])} {_percent(math.exp(min(token['logprob'], 0.0))).lstrip()}"


def _percent(share: float) -> str:
    return f"{100 * share:5.1f} %"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _excerpt(message: Mapping[str, Any]) -> str:
    text = " ".join(str(message["content"]).split())
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 1] + "…"
