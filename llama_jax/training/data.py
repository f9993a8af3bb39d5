"""Data to learn from: files of JSON lines, each a text, a conversation, or a pair of answers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from llama_jax.errors import DataError, LlamaJaxError, RequestError, did_you_mean
from llama_jax.text.chat import check_messages, encode_chat
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.packing import Example, Pair, Text

FIELDS = ("messages", "text")
PAIR_FIELDS = ("prompt", "chosen", "rejected", "tools")
LEARNED = ("assistant", "last", "all")
"""The turns of a conversation that are learned: all turns of the assistant, its last one, or every token."""


@dataclass
class Texts:
    """The examples in files, in their order.

    Attributes:
      texts: to learn; of pairs, the pairs.
      lines: that were read.
      cut: conversations and pairs whose end did not fit a row; dropped: those of which nothing learned did.
      pieces: texts that come from longer ones, beyond one for each line.
    """

    texts: list[Example] = field(default_factory=list)
    lines: int = 0
    cut: int = 0
    dropped: int = 0
    pieces: int = 0

    @property
    def digest(self) -> str:
        """Of all tokens, and of which are learned."""
        hashed = xxhash.xxh3_128()
        for text in (text for example in self.texts for text in example.texts):
            hashed.update(text.tokens.tobytes())
            hashed.update(text.learned.tobytes())
        return hashed.hexdigest()


def read_texts(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    length: int,
    learned: str = "assistant",
    eos: bool = True,
    template: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Texts:
    """Reads files of JSON lines, all of them before anything is trained. Empty lines are skipped.

    A line has "text", or "messages" and perhaps "tools". Of a text every token is learned; a longer one than `length`
    is cut into pieces. A longer conversation loses its end.

    Args:
      length: the most tokens of a text.
      learned: of conversations, one of `LEARNED`.
      eos: whether the end-of-text token follows a "text".
      template: variables of the chat template, such as a fixed date_string.
      progress: called with bytes done, bytes in all and "bytes".

    Raises:
      DataError: a file cannot be read, or a line cannot be used; names file and line.
    """

    def add(found: Texts, value: Any) -> None:
        line = _text_or_chat(value)
        if "text" in line:
            _add_text(found, _text_ids(line["text"], tokenizer, eos), length)
        else:
            _add_chat(found, *chat_tokens(tokenizer, line["messages"], learned, line.get("tools"), template), length)

    return _read(paths, add, progress)


def read_pairs(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    length: int,
    learned: str = "assistant",
    eos: bool = True,
    template: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Texts:
    """Reads files of JSON lines, each with an answer that is preferred to another: "chosen", "rejected" and "prompt".

    Either all three are text, or all are lists of messages, of which "prompt" may be left out if the other two begin
    with the same ones. Of each the last answer is compared. A pair shares a row: if both together are longer than
    `length`, the longer loses its end, and then both.

    Args:
      length: the most tokens of a pair.
      learned, eos, template, progress: see `read_texts`; of conversations the last turn is learned.

    Raises:
      DataError: as for `read_texts`. RequestError: `learned` is "all".
    """
    if learned == "all":
        raise RequestError("of pairs the last answers are compared", param="learned", hint='"last"')

    def add(found: Texts, value: Any) -> None:
        line = _pair(value)

        def side(answer: Any) -> tuple[np.ndarray, np.ndarray]:
            if isinstance(answer, str):
                return _completion(line["prompt"], answer, tokenizer, eos)
            return chat_tokens(tokenizer, [*line["prompt"], *answer], "last", line.get("tools"), template)

        sides = [side(line[name]) for name in ("chosen", "rejected")]
        sizes = [len(ids) for ids, _ in sides]
        room = [max(length // 2, length - size) for size in reversed(sizes)]
        found.cut += sum(sizes) > length
        if all(mask[1:most].any() for (_, mask), most in zip(sides, room, strict=True)):
            chosen, rejected = (Text(ids[:n], mask[:n]) for (ids, mask), n in zip(sides, room, strict=True))
            found.texts.append(Pair(chosen, rejected))
        else:
            found.dropped += 1

    return _read(paths, add, progress)


def _read(
    paths: Sequence[str | Path],
    add: Callable[[Texts, Any], None],
    progress: Callable[[int, int, str], None] | None,
) -> Texts:
    """Adds what JSON lines hold; errors are named by file and line."""
    found, done = Texts(), 0
    total = sum(_size(path) for path in paths)
    for path in paths:
        for number, raw in _lines(path):
            done += len(raw)
            if progress is not None and found.lines % 256 == 0:
                progress(done, total, "bytes")
            if not raw.strip():
                continue
            found.lines += 1
            try:
                add(found, _json(raw))
            except LlamaJaxError as error:
                raise DataError(f"{path}, line {number}: {error.message}", hint=error.hint) from error
    if progress is not None:
        progress(total, total, "bytes")
    return found


def chat_tokens(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    learned: str = "assistant",
    tools: Sequence[Mapping[str, Any]] | None = None,
    template: Mapping[str, Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a conversation, int32 [len], and whether each is learned, bool [len].

    The tokens of a turn are those that follow the prompt for it, up to what the template writes behind it: what the
    model would have had to generate. A token that holds both the end of the prompt and a beginning belongs to the turn.

    Raises:
      RequestError, TemplateError, TokenizerError: see `encode_chat`.
      DataError: nothing is learned, or the template writes earlier turns in another way than the last.
    """
    check_messages(messages)

    def encoded(count: int, prompt: bool) -> list[int]:
        return encode_chat(
            tokenizer, messages[:count], add_generation_prompt=prompt, tools=tools, **dict(template or {})
        )

    ids = encoded(len(messages), False)
    mask = np.full(len(ids), learned == "all")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in turns[-1:] if learned == "last" else turns if learned == "assistant" else ():
        before = encoded(i, True) if i else []
        through = encoded(i + 1, False)
        start = _shared(before, through)
        if ids[: len(through)] != through or not _continues(tokenizer, before[start:], through[start:]):
            raise DataError(
                f"the chat template writes message {i} in another way once others follow, or not behind its prompt",
                hint="learn the last turn alone (`learned`: last), with a line for each turn",
            )
        mask[start : len(through)] = True
    if not mask[1:].any():
        raise DataError("no token of the conversation is learned", hint="end it with a message of the assistant")
    return np.asarray(ids, np.int32), mask


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the beginning that two lists have in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _continues(tokenizer: Tokenizer, prompt: Sequence[int], text: Sequence[int]) -> bool:
    """Whether tokens have the prompt's text at their beginning."""
    if not prompt:
        return True
    ends = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (text, prompt))
    return next(ends).startswith(next(ends))


def _add_text(found: Texts, ids: np.ndarray, length: int) -> None:
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    found.pieces += max(0, len(pieces) - 1)
    found.texts += [Text(piece, np.ones(len(piece), bool)) for piece in pieces]


def _add_chat(found: Texts, ids: np.ndarray, mask: np.ndarray, length: int) -> None:
    found.cut += len(ids) > length
    if mask[1:length].any():
        found.texts.append(Text(ids[:length], mask[:length]))
    else:
        found.dropped += 1


def _text_ids(text: Any, tokenizer: Tokenizer, eos: bool) -> np.ndarray:
    if not isinstance(text, str):
        raise DataError(f'"text" is {type(text).__name__}', hint='e.g. {"text": "Once upon a time"}')
    ids = tokenizer.encode(text, parse_special=False)
    if eos and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return np.asarray(ids, np.int32)


def _completion(prompt: str, answer: str, tokenizer: Tokenizer, eos: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a prompt with an answer, and which are the answer's: those from the first that the prompt has not."""
    ids = _text_ids(prompt + answer, tokenizer, eos)
    mask = np.arange(len(ids)) >= _shared(tokenizer.encode(prompt, parse_special=False), ids.tolist())
    if not mask[1:].any():
        raise DataError("an answer has no token to learn", hint="leave the line out")
    return ids, mask


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"it is not JSON: {error}", hint="one JSON object on each line, in UTF-8") from None


def _pair(line: Any) -> dict[str, Any]:
    """A line with "prompt", "chosen" and "rejected", of one kind."""
    hint = 'e.g. {"prompt": "…", "chosen": "…", "rejected": "…"}, each a text or a list of messages'
    names = list(line) if isinstance(line, dict) else []
    if missing := [name for name in ("chosen", "rejected") if name not in names]:
        near = next(
            (near for name in names if name not in PAIR_FIELDS and (near := did_you_mean(name, PAIR_FIELDS))), ""
        )
        raise DataError(f'it has no "{missing[0]}"', hint=near or hint)
    sides = [line["chosen"], line["rejected"]]
    if all(isinstance(x, list) for x in sides) and "prompt" not in line and sides[0][:-1] == sides[1][:-1]:
        return {**line, "prompt": []}
    kinds = {type(line.get("prompt"))} | {type(x) for x in sides}
    if kinds not in ({str}, {list}):
        raise DataError('"prompt", "chosen" and "rejected" are neither all text nor all lists of messages', hint=hint)
    return dict(line)


def _text_or_chat(line: Any) -> dict[str, Any]:
    given = [name for name in FIELDS if isinstance(line, dict) and name in line]
    if len(given) != 1:
        names = list(line) if isinstance(line, dict) else []
        near = next((near for name in names if (near := did_you_mean(name, FIELDS))), "")
        raise DataError(
            'it has both "text" and "messages"' if given else 'it has neither "text" nor "messages"',
            hint=near or 'e.g. {"text": "…"} or {"messages": [{"role": "user", "content": "…"}, …]}',
        )
    return line


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", hint="check the path") from error


def _size(path: str | Path) -> int:
    with _readable(path):
        return Path(path).stat().st_size


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    with _readable(path), Path(path).open("rb") as file:
        yield from enumerate(file, 1)
