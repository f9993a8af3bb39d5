"""Model of a chat, without a terminal: the conversation as a value, its settings, its input syntax."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any

from llama_jax.cli.inputs import valid
from llama_jax.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from llama_jax.sampling import SamplingParams

QUOTES = '"""'
_DEFAULTS = {"temperature": 0.7, "top_p": 0.95}
_FROM_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# One answer at a time, and only of answers is it shown how likely they were.
_NOT_HERE = frozenset({"n", "prompt_logprobs"})


Messages = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Conversation:
    """A conversation as an immutable tree, of which one path is shown; every change makes a new one.

    Attributes:
      messages: the path that is shown, in order, without the system prompt.
      system: the system prompt, or None.
      branches: the paths to all leaves of the tree. Edited or re-answered messages stay in their own branch.
    """

    messages: Messages = ()
    system: str | None = None
    branches: tuple[Messages, ...] = ()

    def __post_init__(self) -> None:
        """Replaces the paths that the shown one continues by it, or adds it."""
        found = list[Messages]()
        for path in (*self.branches, self.messages):
            if not any(_begins(path, other) for other in found):
                begun = next((i for i, other in enumerate(found) if _begins(other, path)), len(found))
                found[begun : begun + 1] = [path]
        object.__setattr__(self, "branches", tuple(found))

    @property
    def all_messages(self) -> list[Mapping[str, Any]]:
        """All messages, as a chat template takes them."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *self.messages]

    @property
    def turns(self) -> list[Messages]:
        """The messages in groups that each begin with a user message."""
        starts = [i for i, message in enumerate(self.messages) if message["role"] == "user" or i == 0]
        return [self.messages[a:b] for a, b in itertools.pairwise([*starts, len(self.messages)])]

    @property
    def branch(self) -> int | None:
        """Index of the branch whose end is shown; None if the shown path ends within branches."""
        return self.branches.index(self.messages) if self.messages in self.branches else None

    def with_system(self, text: str | None) -> Conversation:
        """With another system prompt, or none."""
        return dataclasses.replace(self, system=text)

    def at(self, messages: Messages) -> Conversation:
        """With another path shown."""
        return dataclasses.replace(self, messages=messages)

    def asked(self, text: str) -> Conversation:
        """With a message of the user at the end."""
        return self.at((*self.messages, {"role": "user", "content": text}))

    def answered(self, text: str) -> Conversation:
        """With an answer at the end."""
        return self.at((*self.messages, {"role": "assistant", "content": text}))

    def cleared(self) -> Conversation:
        """Without messages; the system prompt stays."""
        return Conversation(system=self.system)

    def before_last_turn(self) -> Conversation:
        """Without the user's last message and its answer, which stay in their branches."""
        return self.at(_joined(self.turns[:-1]))

    def without_last_turn(self) -> Conversation:
        """Without the user's last message and everything that ever followed it."""
        gone = _joined([*self.turns[:-1], self.turns[-1][:1]]) if self.turns else ()
        kept = tuple(path for path in self.branches if not (gone and _begins(gone, path)))
        return Conversation(_joined(self.turns[:-1]), self.system, kept)

    def without_last_answer(self) -> Conversation:
        """With the user's last message at the end; its answers stay in their branches.

        Raises:
          RequestError: there is none.
        """
        turns = self.turns
        if not turns or turns[-1][0]["role"] != "user":
            raise RequestError("there is no message to answer again", param="/retry", hint="write one")
        return self.at(_joined([*turns[:-1], turns[-1][:1]]))

    def without_first_turns(self, count: int) -> Conversation:
        """Without the `count` oldest turns, in all branches that begin with them."""
        gone = _joined(self.turns[:count])
        kept = tuple(path[len(gone) :] if _begins(gone, path) else path for path in self.branches)
        return Conversation(self.messages[len(gone) :], self.system, kept)


def _joined(turns: Sequence[Messages]) -> Messages:
    return tuple(message for turn in turns for message in turn)


def _begins(path: Messages, other: Messages) -> bool:
    return other[: len(path)] == path


def default_sampling(generation_config: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[SamplingParams, str]:
    """Default sampling parameters of a chat: those recommended by the model's makers, if any.

    Args:
      generation_config: contents of the model's generation_config.json.
      given: fields that the user has set; they take precedence.

    Returns:
      The parameters, and the origin of the fields that the user did not set.

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


def with_setting(params: SamplingParams, name: str, text: str, others: Sequence[str] = ()) -> SamplingParams:
    """The parameters with one field set from text: JSON, or a plain string for `stop`; "none" is None.

    Args:
      others: other settable names, for hints.

    Raises:
      RequestError: there is no such field, or the value does not fit; `param` names the field.
    """
    names = setting_names()
    if name not in names:
        hint = did_you_mean(name, [*names, *others]) or f"one of {', '.join([*names, *others])}"
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
    '''Parses the user's input: a command, a message, or None for nothing.

    A line that begins with "/" is a command; "//" begins a message with a slash. A block between """ and """ is a
    verbatim message.

    Raises:
      RequestError: it is not valid Unicode.
    '''
    stripped = valid(text, "the message", param="messages").strip()
    if stripped.startswith(QUOTES):
        inner = stripped.removeprefix(QUOTES).removesuffix(QUOTES)
        return inner.removeprefix("\n").removesuffix("\n") or None
    if stripped.startswith("//"):
        return stripped[1:]
    if stripped.startswith("/") and "\n" not in stripped:
        name, _, argument = stripped[1:].partition(" ")
        return Command(name, argument.strip())
    return stripped or None
