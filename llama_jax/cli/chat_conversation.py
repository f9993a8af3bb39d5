"""What a chat is about, without a terminal: the conversation as a value, its settings, its file, its input syntax."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from llama_jax.cli.inputs import read_messages
from llama_jax.errors import RequestError, StorageError, did_you_mean

if TYPE_CHECKING:
    from llama_jax.sampling import SamplingParams

QUOTES = '"""'
_DEFAULTS = {"temperature": 0.7, "top_p": 0.95}
_FROM_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# One answer at a time, and nothing to show log-probabilities with.
_NOT_HERE = frozenset({"n", "logprobs", "prompt_logprobs"})


@dataclass(frozen=True)
class Conversation:
    """A conversation; every change makes a new one.

    Attributes:
      messages: in order, without the system prompt.
      system: the system prompt, or None.
    """

    messages: tuple[Mapping[str, Any], ...] = ()
    system: str | None = None

    @property
    def all_messages(self) -> list[Mapping[str, Any]]:
        """As a chat template takes them."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *self.messages]

    @property
    def turns(self) -> list[tuple[Mapping[str, Any], ...]]:
        """The messages in groups that each begin with one of the user's."""
        starts = [i for i, message in enumerate(self.messages) if message["role"] == "user" or i == 0]
        return [self.messages[a:b] for a, b in itertools.pairwise([*starts, len(self.messages)])]

    def with_system(self, text: str | None) -> Conversation:
        """With another system prompt, or none."""
        return dataclasses.replace(self, system=text)

    def asked(self, text: str) -> Conversation:
        """With a message of the user at the end."""
        return dataclasses.replace(self, messages=(*self.messages, {"role": "user", "content": text}))

    def answered(self, text: str) -> Conversation:
        """With an answer at the end."""
        return dataclasses.replace(self, messages=(*self.messages, {"role": "assistant", "content": text}))

    def cleared(self) -> Conversation:
        """Without messages; the system prompt stays."""
        return dataclasses.replace(self, messages=())

    def without_last_turn(self) -> Conversation:
        """Without the user's last message and what followed it."""
        return self._of(self.turns[:-1])

    def without_last_answer(self) -> Conversation:
        """With the user's last message at the end.

        Raises:
          RequestError: there is none.
        """
        turns = self.turns
        if not turns or turns[-1][0]["role"] != "user":
            raise RequestError("there is no message to answer again", param="/retry", hint="write one")
        return self._of([*turns[:-1], turns[-1][:1]])

    def without_first_turns(self, count: int) -> Conversation:
        """Without the `count` oldest turns."""
        return self._of(self.turns[count:])

    def _of(self, turns: list[tuple[Mapping[str, Any], ...]]) -> Conversation:
        return dataclasses.replace(self, messages=tuple(message for turn in turns for message in turn))


def save_conversation(conversation: Conversation, path: Path) -> None:
    """Writes the messages as `llama-jax generate --messages` reads them, for the user's eyes only (mode 0600).

    Raises:
      StorageError: the file cannot be written, or it exists and is no conversation.
    """
    if os.path.lexists(path):
        try:
            load_conversation(path)
        except RequestError as error:
            raise StorageError(
                f"{path} exists and is no conversation, so it is not replaced", hint="choose another name"
            ) from error
    text = json.dumps(conversation.all_messages, ensure_ascii=False, indent=1) + "\n"
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
    """Reads a file of messages; a system message at its beginning becomes the system prompt.

    Raises:
      RequestError: it cannot be read, or holds something else than messages of text.
    """
    messages = read_messages(str(path.absolute()))
    for i, message in enumerate(messages):
        if not isinstance(message.get("content"), str):
            raise RequestError(
                f"message {i} of {path} has no text", param="messages", hint="a chat takes content that is a string"
            )
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
    return Conversation(tuple(messages), system)


def default_sampling(generation_config: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[SamplingParams, str]:
    """How a chat samples when nobody says: as the model's makers advise, if they do.

    Args:
      generation_config: contents of the model's generation_config.json.
      given: fields that the user has set; they come first.

    Returns:
      The parameters, and where the fields that the user did not set come from.

    Raises:
      RequestError: a value is out of range.
    """
    from llama_jax.sampling import SamplingParams

    advised = {name: generation_config[name] for name in _FROM_MODEL if generation_config.get(name) is not None}
    if advised.keys() & _DEFAULTS.keys():
        origin = "the model's generation_config.json"
    else:
        advised, origin = dict(_DEFAULTS), "llama-jax chat"
    return _of_chat(SamplingParams(**{"max_tokens": None, **advised, **given})), origin


def setting_names() -> list[str]:
    """Fields of SamplingParams that `/set` takes."""
    from llama_jax.sampling import SamplingParams

    return [f.name for f in dataclasses.fields(SamplingParams) if f.name not in _NOT_HERE]


def with_setting(params: SamplingParams, name: str, text: str) -> SamplingParams:
    """The parameters with one field set from text: JSON, or a plain string for `stop`; "none" is None.

    Raises:
      RequestError: there is no such field, or the value does not fit; `param` names the field.
    """
    names = setting_names()
    if name not in names:
        hint = did_you_mean(name, names) or f"one of {', '.join(names)}"
        raise RequestError(f"there is no setting {name!r} in a chat", param=name, hint=hint)
    value: Any = text
    if text.lower() == "none":
        value = {"stop": (), "stop_token_ids": (), "logit_bias": {}}.get(name)
    else:
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(text)
    if name == "stop" and not isinstance(value, (str, list, tuple)):
        value = text
    if name in ("stop_token_ids", "allowed_token_ids") and not isinstance(value, (list, tuple, NoneType)):
        value = [value]
    if name == "logit_bias":
        try:
            value = {int(token): bias for token, bias in value.items()}
        except (AttributeError, ValueError):
            raise RequestError(
                f"logit_bias cannot be {text}", param=name, hint='an object of token ids and numbers: {"42": -100}'
            ) from None
    return _of_chat(dataclasses.replace(params, **{name: value}))


def _of_chat(params: SamplingParams) -> SamplingParams:
    params.check_generates("an answer")
    return params


@dataclass(frozen=True)
class Command:
    """A line such as "/set seed 7": its first word, without the slash, and the rest."""

    name: str
    argument: str


def is_open(text: str) -> bool:
    '''Whether a block that began with """ still lacks its end.'''
    text = text.strip()
    return text.startswith(QUOTES) and not (text.endswith(QUOTES) and len(text) >= 2 * len(QUOTES))


def parse_input(text: str) -> Command | str | None:
    '''What the user has entered: a command, a message, or None for nothing.

    A line that begins with "/" is a command; "//" begins a message with a slash. A block between """ and """ is a
    message as it stands.
    '''
    stripped = text.strip()
    if stripped.startswith(QUOTES):
        inner = stripped.removeprefix(QUOTES).removesuffix(QUOTES)
        return inner.removeprefix("\n").removesuffix("\n") or None
    if stripped.startswith("//"):
        return stripped[1:]
    if stripped.startswith("/") and "\n" not in stripped:
        name, _, argument = stripped[1:].partition(" ")
        return Command(name, argument.strip())
    return stripped or None
