"""Output lines: their encoding, the input line they answer, and whether it failed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

Record = dict[str, Any]
"""An output line. It has "index", the number of its input line from 0, or an id that ends with that (OPENAI_ID)."""
OPENAI_ID = "batch_req_"


def encode(record: Mapping[str, Any]) -> bytes:
    """The line's bytes in a file."""
    # A lone surrogate, e.g. in an "id", becomes the JSON escape that it was in the input.
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def index_of(record: Mapping[str, Any]) -> int | None:
    """The number of the input line that an output line answers; None if it is not an output line."""
    if type(index := record.get("index")) is int:
        return index
    match = re.fullmatch(rf"{OPENAI_ID}(\d+)", str(record.get("id")))
    return int(match[1]) if match and "response" in record else None


def is_error(record: Mapping[str, Any]) -> bool:
    """Whether an output line reports that its input line failed, or that an answer has ended without a next token."""
    if "response" in record:
        response = record["response"]
        return response["status_code"] != 200 or _ended_early(response["body"].get("choices", ()))
    return "error" in record or _ended_early(record.get("outputs", [record]))


def _ended_early(answers: Iterable[Mapping[str, Any]]) -> bool:
    return any(answer.get("finish_reason") == "error" for answer in answers)
