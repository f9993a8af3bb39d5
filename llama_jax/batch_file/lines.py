"""Lines of a batch file: their formats, and checks of a whole file before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_jax.batch_file.openai import OpenAILine, is_openai
from llama_jax.batch_file.own import OwnLine
from llama_jax.batch_file.records import Record
from llama_jax.batch_file.request import Draft, Line
from llama_jax.errors import LlamaJaxError, RequestError
from llama_jax.sampling import SamplingParams


@dataclass(frozen=True)
class Refused:
    """A line that cannot be generated, and the reason."""

    line: Line
    error: LlamaJaxError

    @property
    def record(self) -> Record:
        """Its output line."""
        return self.line.refused(self.error)


def read_line(index: int, raw: bytes, base: SamplingParams) -> Draft | Refused:
    """Reads one line and checks it as far as possible without a model.

    Args:
      raw: a JSON object, see `OwnLine` and `OpenAILine`.
      base: defaults of sampling fields; `request.sampling` describes the seed.
    """
    line: Line = OwnLine.of(index)
    try:
        content = _object(raw)
        line = OpenAILine.of(index, content) if is_openai(content) else OwnLine.of(index, content)
        return line.read(content, base)
    except LlamaJaxError as error:
        return Refused(line, error)


@dataclass
class Findings:
    """Findings about a whole input, as far as possible without a model.

    Attributes:
      total: lines that are not empty.
      bad: number of those that cannot be generated; first_bad: the first of them.
      equal: lines with the same id: the field, the id and their numbers, from 1.
      models: model names in the lines.
    """

    total: int = 0
    bad: int = 0
    first_bad: Refused | None = None
    equal: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    models: set[str] = field(default_factory=set)

    def equal_ids(self, most: int = 5) -> str:
        """Describes which lines share an id, for up to `most` ids."""
        said = [
            f"lines {_listed(numbers)} have the same {name} {value:.100}"
            for (name, value), numbers in [*self.equal.items()][:most]
        ]
        more = len(self.equal) - most
        return "; ".join(said) + (f"; and so have lines of {more} more" if more > 0 else "")


def survey(lines: Iterable[tuple[int, bytes]], base: SamplingParams) -> Findings:
    """Reads and checks every line."""
    found = Findings()
    first: dict[tuple[str, str], int] = {}
    for index, raw in lines:
        found.total += 1
        read = read_line(index, raw, base)
        if isinstance(read, Refused):
            found.bad += 1
            found.first_bad = found.first_bad or read
        elif read.model is not None:
            found.models.add(read.model)
        if read.line.key is None:
            continue
        name, value = read.line.key
        key = name, json.dumps(value, sort_keys=True, ensure_ascii=False)
        if (number := first.setdefault(key, index + 1)) != index + 1:
            found.equal.setdefault(key, [number]).append(index + 1)
    return found


def refusal(refused: Refused) -> RequestError:
    """The error of a line as an error of the whole input."""
    error = refused.error
    param = error.param if isinstance(error, RequestError) else "line"
    return RequestError(f"line {refused.line.index + 1} of the input: {error.message}", param=param, hint=error.hint)


def _listed(numbers: Sequence[int], most: int = 10) -> str:
    """Formats numbers as in "1, 2 and 5"."""
    shown = [*map(str, numbers[:most])] + ([f"{len(numbers) - most} more"] if len(numbers) > most else [])
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def _object(raw: bytes) -> dict[str, Any]:
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"the line is not JSON: {error}", param="line", hint="one JSON object on each line"
        ) from None
    if not isinstance(content, dict):
        raise RequestError("the line is not a JSON object", param="line", hint='e.g. {"prompt": "Once upon"}')
    return content
