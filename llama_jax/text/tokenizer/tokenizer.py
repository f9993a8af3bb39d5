"""`Tokenizer`: a model's text encoding, as described by its own files."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llama_jax.errors import LlamaJaxError, TokenizerError
from llama_jax.text.tokenizer.detokenizer import Detokenizer, token_bytes
from llama_jax.text.tokenizer.guard import SENTINEL, ControlGuard, escape

if TYPE_CHECKING:
    import tokenizers


_LONG = 8192
"""Characters of a text that takes milliseconds to encode. Unlike `encode`, which is faster for short texts,
`encode_batch` lets other threads run meanwhile."""


def call_backend[T](what: str, function: Callable[..., T], *args: object, **kwargs: object) -> T:
    """Call the `tokenizers` library and turn anything it raises into a `TokenizerError`; our own errors pass.

    It raises bare `Exception`s, and its Rust panics arrive as a `PanicException`, which is not an `Exception`.
    """
    try:
        return function(*args, **kwargs)
    except LlamaJaxError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{what}: {error}", hint="the tokenizer files may be damaged; fetch them again") from error


class Tokenizer:
    """Encodes text as token ids and decodes ids to text. Made by `load_tokenizer`; thread-safe.

    Attributes:
      vocab_size: one more than the largest token id.
      special_ids: ids of the control tokens. Added tokens that the model's own files do not call special ("<think>" in
        some) are not among them.
      special_tokens: the control tokens' strings and their ids.
      special_tokens_map: the strings behind names such as "bos_token", as chat templates see them.
      bos_token, eos_token: the strings, or None.
      bos_token_id, eos_token_id, pad_token_id: the ids, or None.
      chat_templates: named Jinja templates; "default" is the one that `chat_template` returns.
      guard: breaks up control tokens in text that must not contain any.
      rows: of the model's embedding, if the model is known (`for_model`): ids from `vocab_size` on have no text, and
        tokens from `rows` on cannot be used.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens_map: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        prefix: str = "",
    ):
        """
        Args:
          prefix: text to prepend, unless the text begins with an added token.
        """
        self._backend = backend
        self._prefix = prefix
        self.rows: int | None = None
        self.special_tokens_map = dict(special_tokens_map or {})
        self.chat_templates = dict(chat_templates or {})
        self.special_tokens: dict[str, int] = {}
        self._added: dict[int, str] = {}
        for token_id, token in backend.get_added_tokens_decoder().items():
            self._added[token_id] = token.content
            if token.special:
                self.special_tokens[token.content] = token_id
        self.special_ids = frozenset(self.special_tokens.values())
        self.vocab_size = max([backend.get_vocab_size() - 1, *self._added]) + 1
        while backend.id_to_token(self.vocab_size) is not None:  # a vocabulary with gaps
            self.vocab_size += 1
        self.bos_token = self.special_tokens_map.get("bos_token")
        self.eos_token = self.special_tokens_map.get("eos_token")
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self.pad_token_id = self._id_of("pad_token")
        self.guard = ControlGuard(
            frozenset(self.special_tokens), frozenset(self._added.values()) - self.special_tokens.keys()
        )
        self._shown: dict[int, bytes] = {}
        self._bytes_of = token_bytes(json.loads(backend.decoder.__getstate__()) if backend.decoder else None)
        self._adds_bos = self.bos_token_id is not None and (
            call_backend("the tokenizer cannot encode", backend.encode, "").ids[:1] == [self.bos_token_id]
        )

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens_map.get(name)
        return None if token is None else self._backend.token_to_id(token)

    @property
    def chat_template(self) -> str | None:
        """The default chat template, or None."""
        return self.chat_templates.get("default")

    @cached_property
    def _unknown_id(self) -> int | None:
        """The id of text outside the vocabulary; the only control id that plain text may yield."""
        token = getattr(self._backend.model, "unk_token", None)
        return None if token is None else self._backend.token_to_id(token)

    @property
    def largest_id(self) -> int:
        """The largest id that the tokenizer can yield; `vocab_size - 1` unless ids have gaps. Reads all of them."""
        return max(self._backend.get_vocab().values(), default=-1)

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
          add_special_tokens: add the special tokens of the tokenizer's post-processor (usually BOS, or nothing). A text
            that already starts with BOS does not get a second one.
          parse_special: whether control tokens spelled out in the text become control ids, or plain text.

        Raises:
          TokenizerError: the text is not valid Unicode, or the tokenizer fails.
        """
        if not parse_special:
            return self.encode_guarded(self.guard.protect(_valid(text)), add_special_tokens=add_special_tokens)
        ids = self._encode(escape(_valid(text)), add_special_tokens)
        while add_special_tokens and self._adds_bos and ids[:2] == [self.bos_token_id] * 2:
            del ids[0]
        return ids

    def encode_guarded(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text whose untrusted parts were protected by `guard.protect`.

        Raises:
          TokenizerError: the text is not valid Unicode, or a control id appears that the text does not spell.
        """
        # At the start a sentinel protects nothing, and would hide the start from a prefix-space rule.
        text = text.removeprefix(SENTINEL)
        ids = self._encode(_valid(text), add_special_tokens)
        found = sum(i in self.special_ids and i != self._unknown_id for i in ids)
        spelled = self.guard.count(text)
        if add_special_tokens:
            spelled += self._backend.num_special_tokens_to_add(False)
        if found > spelled:
            raise TokenizerError(
                f"the text spells {spelled} control tokens but its ids hold {found}",
                hint="this tokenizer makes control tokens out of plain text; remove them from the text",
            )
        return ids

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if self._prefix and text and not self._begins_with_added.match(text):
            text = self._prefix + text

        def encode() -> Any:
            if len(text) < _LONG:
                return self._backend.encode(text, add_special_tokens=add_special_tokens)
            return self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]

        ids: list[int] = call_backend("the text cannot be encoded", encode).ids
        if self.rows is not None and self.vocab_size > self.rows:
            self._check_rows(ids, self.rows)
        return ids

    @cached_property
    def _begins_with_added(self) -> re.Pattern[str]:
        tokens = sorted(self._backend.get_added_tokens_decoder().values(), key=lambda t: len(t.content), reverse=True)
        return re.compile("|".join(r"\s*" * t.lstrip + re.escape(t.content) for t in tokens) or "(?!)")

    def _check_rows(self, ids: Sequence[int], rows: int) -> None:
        """Raises TokenizerError for a token that the model has no embedding for."""
        if (beyond := next((i for i in ids if i >= rows), None)) is not None:
            raise TokenizerError(
                f"{self.token(beyond)!r} (id {beyond}) was added to the tokenizer; the model has {rows} rows and no "
                "embedding for it",
                hint="use the chat template of the model that this one was made from, or a copy of the model whose "
                "embedding was resized",
            )

    def for_model(self, rows: int) -> Tokenizer:
        """The tokenizer for a model whose embedding has this many rows."""
        made = copy.copy(self)
        made.rows = rows
        return made

    def without_rows(self, rows: int) -> str | None:
        """A sentence about added tokens that an embedding of this many rows lacks; None if it has all."""
        beyond = {i: token for i, token in sorted(self._added.items()) if i >= rows}
        if not beyond:
            return None
        first, token = next(iter(beyond.items()))
        others = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        return (
            f"{token!r} (id {first}){others}: added to the tokenizer, but the model has {rows} rows and no embedding "
            "for it; a text that holds it is refused"
        )

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids.

        Raises:
          TokenizerError: an id is out of range.
        """
        stream = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return "".join([stream.add(i) for i in ids]) + stream.finish()

    def detokenizer(self, *, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """An incremental decoder for tokens that follow `prompt_ids`; it does not repeat their text."""

        def to_bytes(token_id: int, first: bool) -> bytes | None:
            if not first and type(token_id) is int and (known := self._shown.get(token_id)) is not None:
                return known
            token = self.token(token_id)
            if token_id in self.special_ids:
                return None if skip_special_tokens else self._bytes_of(token, first=first)
            data = self._bytes_of(token, first=first)
            if not first and token_id < self.vocab_size:  # others have a text for some models only
                self._shown[int(token_id)] = data
            return data

        stream = Detokenizer(to_bytes, strip_start=self._bytes_of.strip_start)
        stream.skip(prompt_ids)
        return stream

    def token(self, token_id: int) -> str:
        """The vocabulary's spelling of a token; empty for an id that the vocabulary skips, or that only the model has.

        Raises:
          TokenizerError: the id is out of range.
        """
        try:
            index = token_id.__index__()
        except AttributeError:
            index = -1
        size = max(self.vocab_size, self.rows or 0)
        if not 0 <= index < size or isinstance(token_id, bool):
            raise TokenizerError(
                f"token id {token_id!r} is not in the vocabulary of {size}",
                hint=f"ids are integers from 0 to {size - 1}",
            )
        return self._added.get(index) or self._backend.id_to_token(index) or ""

    def bytes_of(self, token_id: int) -> bytes:
        """Bytes that a token adds to a text, except at its start; none for an id outside the vocabulary."""
        return self._bytes_of(self.token(token_id), first=False) if token_id < self.vocab_size else b""

    @cached_property
    def most_bytes(self) -> int:
        """Bytes of the longest token. Reads all of them."""
        return max(len(self.bytes_of(token_id)) for token_id in range(self.vocab_size))

    def token_id(self, token: str) -> int | None:
        """The id of a token in the vocabulary's spelling, or None."""
        return self._backend.token_to_id(_valid(token))


def _valid(text: str) -> str:
    """Refuse invalid Unicode, such as a lone surrogate from a broken JSON escape."""
    if not isinstance(text, str):
        raise TokenizerError(f"text must be a string, got {type(text).__name__}", hint="pass a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text holds a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start}",
            hint="decode the input as UTF-8, or drop that character",
        ) from None
    return text
