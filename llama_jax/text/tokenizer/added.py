"""Tokens that a model's configuration adds to its vocabulary, with their flags."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.errors import TokenizerError
from llama_jax.text.tokenizer.tokenizer import call_backend

if TYPE_CHECKING:
    import tokenizers

MAX_ADDED_TOKENS = 100_000
"""Many times more than any model adds to its vocabulary; each one slows down every later step."""

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass
class Wanted:
    """A token named in the configuration.

    Attributes:
      flags: as given there.
      token_id, file: its id and the file that gives it; None if no file does.
    """

    flags: dict[str, bool] = field(default_factory=dict)
    token_id: int | None = None
    file: str | None = None


def content(token: object) -> str | None:
    """The string of a token given as a string or an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def check_added(count: int, folder: Path) -> None:
    """Raises TokenizerError if there are more added tokens than any model has."""
    if count > MAX_ADDED_TOKENS:
        raise TokenizerError(
            f"{folder}: the tokenizer adds {count:,} tokens to its vocabulary, {MAX_ADDED_TOKENS:,} at most are read",
            hint="this is not a valid tokenizer; get the model from where it was published",
        )


def wanted_tokens(
    config: Mapping[str, Any], older: Mapping[str, Any], names: Mapping[str, str], folder: Path
) -> dict[str, Wanted]:
    """The tokens of a configuration ordered by id, then those without an id.

    Args:
      config: contents of tokenizer_config.json.
      older: contents of added_tokens.json, token to id, which has no flags: tokens that `config` names are special.
      names: strings of named tokens, which are special.

    Raises:
      TokenizerError: a list is malformed, or there are far too many tokens.
    """
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    others = [token for name, token in config.items() if name.endswith("_token")]
    given = [*names.values(), *(extra.values() if isinstance(extra, dict) else extra), *others]
    special = dict.fromkeys(text for token in given if (text := content(token)) is not None)
    wanted = dict(_decoder(config, folder))
    for token, token_id in _ids(older, folder):
        wanted[token] = Wanted({}, token_id, "added_tokens.json")
    check_added(len(wanted), folder)
    for token in special:
        wanted.setdefault(token, Wanted()).flags["special"] = True
    return {token: found for token, found in wanted.items() if token}


def _decoder(config: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, Wanted]]:
    """The tokens of tokenizer_config.json's added_tokens_decoder, by id, since ids are assigned in order."""
    name, listed = "tokenizer_config.json", config.get("added_tokens_decoder") or {}
    try:
        for token_id, token in sorted(listed.items(), key=lambda item: int(item[0])):
            flags = {flag: bool(token[flag]) for flag in _FLAGS if flag in token}
            yield token["content"], Wanted(flags, int(token_id), name)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"{folder / name}: added_tokens_decoder is malformed: {error!r}", hint="fetch the file again"
        ) from error


def _ids(older: Mapping[str, Any], folder: Path) -> list[tuple[str, int]]:
    """The tokens of added_tokens.json, by id."""
    for token, token_id in older.items():
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise TokenizerError(
                f"{folder / 'added_tokens.json'} gives {token!r} the id {token_id!r:.80}", hint="fetch the file again"
            )
    return sorted(older.items(), key=lambda item: item[1])


def add_tokens(backend: tokenizers.Tokenizer, wanted: Mapping[str, Wanted], *, raw: bool, folder: Path) -> None:
    """Adds tokens, and makes every control token match before normalisation.

    Adding an existing token changes only its flags.

    Args:
      raw: whether all of them match before normalisation, which prepends a space.

    Raises:
      TokenizerError: a token does not get the id that the configuration gives it.
    """
    from tokenizers import AddedToken

    present = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    changed = []
    for text in dict.fromkeys([*present, *wanted]):
        there, stated = present.get(text), wanted[text].flags if text in wanted else {}
        flags = {flag: getattr(there, flag) for flag in _FLAGS} if there else {}
        flags |= stated
        if raw or flags.get("special"):
            flags["normalized"] = False  # so that the sentinel of `guard`, a normaliser, can hide its lookalikes
        if there is None or any(getattr(there, flag) != flags[flag] for flag in flags):
            changed.append(AddedToken(text, **flags))
    if changed:
        call_backend("added tokens are refused", backend.add_tokens, changed)
    for text, token in wanted.items():
        if token.token_id is not None and (actual := backend.token_to_id(text)) != token.token_id:
            raise TokenizerError(
                f"{folder}: {token.file} gives {text!r} the id {token.token_id}, the tokenizer {actual}",
                hint="the files of two models may be mixed; fetch them again",
            )
