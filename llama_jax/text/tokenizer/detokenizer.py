"""Incremental detokenization: token ids to text, without ever showing half a character.

Every token represents bytes. The bytes of a token stream pass through one incremental UTF-8 decoder, so the streamed
text equals that of the whole, and each token costs the same however long the text already is. Invalid UTF-8
becomes U+FFFD, one for each maximal ill-formed part (Unicode 17, section 3.9, as in `str.decode(errors="replace")`).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llama_jax.errors import UnsupportedModel

_UNFINISHED = 3
"""The most bytes of a character that is unfinished in UTF-8."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


def byte_alphabet() -> dict[str, int]:
    """The printable character for each byte in a byte-level vocabulary (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}


@dataclass(frozen=True)
class TokenBytes:
    """Conversion of one vocabulary's tokens to bytes.

    Attributes:
      byte_level: token strings spell bytes in GPT-2's alphabet.
      replace: (from, to) pairs applied to every token string.
      byte_fallback: tokens such as "<0x0A>" represent a byte.
      strip_start: number of spaces removed from the start of the whole text.
      first_drops: a character removed from the first token (the Metaspace decoder).
      separator: text between two tokens.
    """

    byte_level: bool = False
    replace: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_start: int = 0
    first_drops: str = ""
    separator: str = ""

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        return byte_alphabet()

    def __call__(self, token: str, *, first: bool) -> bytes:
        """Bytes of one token; `first`: whether it starts the text."""
        if self.byte_level:
            try:
                return bytes([self._alphabet[char] for char in token])
            except KeyError:  # an added token is spelled verbatim
                return token.encode()
        if first and self.first_drops:
            token = token.replace(self.first_drops, "")
        for old, new in self.replace:
            token = token.replace(old, new)
        if self.byte_fallback and (match := _BYTE_TOKEN.match(token)):
            return bytes([int(match[1], 16)])
        return (token if first else self.separator + token).encode()


def token_bytes(decoder: Mapping[str, Any] | None) -> TokenBytes:
    """Read the "decoder" entry of a tokenizer.json.

    Raises:
      UnsupportedModel: for a decoder that no Llama-like tokenizer uses; the message names it.
    """
    if decoder is None:
        return TokenBytes(separator=" ")
    fields: dict[str, Any] = {"replace": ()}
    fused = False
    for step in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
        match step:
            case {"type": "ByteLevel"}:
                fields["byte_level"] = True
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                fields["replace"] += ((old, new),)
            case {"type": "ByteFallback"}:
                fields["byte_fallback"] = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if fused:
                fields["strip_start"] = start
            case {"type": "Metaspace", "replacement": str(mark)}:
                fields["replace"] += ((mark, " "),)
                if step.get("prepend_scheme", "always") != "never":
                    fields["first_drops"] = mark
            case _:
                raise UnsupportedModel(
                    f"the tokenizer's decoder {step.get('type')!r} is not supported",
                    hint="byte-level BPE and SentencePiece-style tokenizers are",
                )
    return TokenBytes(**fields)


class Detokenizer:
    """Turns a stream of token ids into text.

    `"".join(d.add(i) for i in ids) + d.finish()` is the text of `ids`.

    Args:
      to_bytes: bytes of one token id, or None for a token that is not shown.
      strip_start: number of spaces removed from the start of the whole text.
    """

    def __init__(self, to_bytes: Callable[[int, bool], bytes | None], *, strip_start: int = 0):
        self._to_bytes = to_bytes
        self._strip = strip_start
        self._started = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """Adds a token; returns the text it completes, empty while a character is unfinished.

        Raises:
          TokenizerError: the id is out of range.
        """
        data = self._to_bytes(token_id, not self._started)
        if data is None:
            return ""
        self._started = True
        while self._strip and data:
            if not data.startswith(b" "):
                self._strip = 0
                break
            data = data[1:]
            self._strip -= 1
        return self._utf8.decode(data)

    def skip(self, ids: Sequence[int]) -> None:
        """Adds tokens whose text is not asked for. Only the first of them and the last ones can change what follows: a
        character that they leave unfinished has at most three bytes.

        Raises:
          TokenizerError: one of those is out of range.
        """
        count = 0
        while count < len(ids) and (not self._started or self._strip):
            self.add(ids[count])
            count += 1
        first, size = len(ids), 0
        while first > count and size < _UNFINISHED:
            first -= 1
            size += len(self._to_bytes(ids[first], False) or b"")
        if size >= _UNFINISHED:
            self._utf8.reset()
        for token_id in ids[first:]:
            self.add(token_id)

    def finish(self) -> str:
        """The rest of the text at the end: U+FFFD if the last character is incomplete."""
        return self._utf8.decode(b"", final=True)
