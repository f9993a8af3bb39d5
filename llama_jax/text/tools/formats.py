"""Formats of tool calls, and detection of a model's format."""

from __future__ import annotations

import functools
import re
import secrets
import string
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llama_jax import plugins
from llama_jax.errors import RequestError, did_you_mean
from llama_jax.plugins import Plugin
from llama_jax.text.tools import calls, grammars, python_calls
from llama_jax.text.tools.deltas import Delta
from llama_jax.text.tools.grammars import ToolGrammar
from llama_jax.text.tools.parser import Mark, ToolParser


class Parser(Protocol):
    """Reads one answer in pieces; its output must not depend on how the text is split into them."""

    def feed(self, text: str) -> Sequence[Delta]:
        """Take more of the text; return what is certain now."""
        ...

    def finish(self) -> Sequence[Delta]:
        """Return the remaining deltas at the end of the text."""
        ...


def openai_id() -> str:
    """Return a new id of a call."""
    return f"call_{secrets.token_hex(12)}"


def short_id() -> str:
    """Return a new id of a call, of nine letters and digits: Mistral's templates refuse any other."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


@dataclass(frozen=True)
class ToolFormat:
    """A format of tool calls.

    Attributes:
      fits: tells from the source of a model's chat template whether the model uses this format.
      parser: makes the parser of one answer from the names of the tools.
      grammar: of texts that consist only of calls.
      control: control tokens of the tokenizer that the parser must see.
      opening: the mark with which every call of the grammar, and nothing else, begins, if there is one.
      call_id: makes the id of a call.
    """

    fits: Callable[[str], bool]
    parser: Callable[[Collection[str]], Parser]
    grammar: ToolGrammar
    control: tuple[str, ...] = ()
    call_id: Callable[[], str] = openai_id
    opening: str = ""


_PYTHONIC = re.compile(r"\[\w+\(\w+=")
"""Matches the example of a call in a template's instructions."""
_LLAMA_MARKS = (
    Mark("<|python_tag|>", python_calls.LlamaTagged),
    Mark("<|python_start|>"),
    Mark("<|python_end|>"),
    Mark("{", calls.NamedObject, kept=True),
    Mark("[", python_calls.PythonCalls, kept=True),
    Mark(";", behind=True),
)
_LLAMA_CONTROL = ("<|python_tag|>", "<|python_start|>", "<|python_end|>")
_TOOL_CALLS_HEAD = re.compile(r"\s*\[\s*|\s*(?P<name>[\w.-]{1,128})(\[CALL_ID\]\w*)?(\[ARGS\])?\s*")
_TOOL_CALLS_MARKS = (
    Mark("[TOOL_CALLS]", functools.partial(calls.Headed, pattern=_TOOL_CALLS_HEAD)),
    Mark("{", calls.NamedObject, kept=True, behind=True),
    Mark(",", behind=True),
    Mark("]", behind=True),
)
_HERMES_MARKS = (
    Mark("<tool_call>", functools.partial(calls.Headed, pattern=re.compile(r"\s*"))),
    Mark("</tool_call>", behind=True),
)

FORMATS: dict[str, ToolFormat] = {
    # Qwen2.5, Qwen3, Hermes, SmolLM3. Others write XML or bare arguments between the same marks.
    "hermes": ToolFormat(
        lambda template: "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template,
        functools.partial(ToolParser, _HERMES_MARKS),
        grammars.hermes,
        ("<tool_call>", "</tool_call>"),
        opening="<tool_call>",
    ),
    "tool_calls": ToolFormat(
        lambda template: "[TOOL_CALLS]" in template and "[ARGS]" not in template,
        functools.partial(ToolParser, _TOOL_CALLS_MARKS),
        grammars.tool_calls,
        ("[TOOL_CALLS]",),
        short_id,
        opening="[TOOL_CALLS]",
    ),
    "tool_calls_args": ToolFormat(
        lambda template: "[TOOL_CALLS]" in template and "[ARGS]" in template,
        functools.partial(ToolParser, _TOOL_CALLS_MARKS),
        grammars.tool_calls_args,
        ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
        short_id,
        opening="[TOOL_CALLS]",
    ),
    # Every Llama sometimes writes either form, so both are read.
    "llama_pythonic": ToolFormat(
        lambda template: _PYTHONIC.search(template) is not None,
        functools.partial(ToolParser, _LLAMA_MARKS),
        grammars.llama_pythonic,
        _LLAMA_CONTROL,
    ),
    "llama_json": ToolFormat(
        lambda template: '"parameters": ' in template and "ipython" in template and not _PYTHONIC.search(template),
        functools.partial(ToolParser, _LLAMA_MARKS),
        grammars.llama_json,
        _LLAMA_CONTROL,
    ),
}
"""Formats by the names that `llama-jax serve --tool-parser` takes."""


def formats() -> dict[str, ToolFormat]:
    """Return all formats, those of other packages last."""
    return FORMATS | {plugin.name: plugin.value for plugin in plugins.sound(plugins.TOOL_PARSERS)}


def format_of(template: str) -> ToolFormat | None:
    """Return the format of a model with this chat template; None if unknown."""
    return next((made for made in formats().values() if made.fits(template)), None)


def format_named(name: str) -> ToolFormat:
    """Return a format by its name.

    Raises:
      RequestError: there is none.
    """
    known = formats()
    if name in known:
        return known[name]
    hint = did_you_mean(name, known) or f"there are {', '.join(known)}"
    raise RequestError(
        f"there is no tool parser {name!r}", param="tool_parser", hint=hint + plugins.reports(plugins.TOOL_PARSERS)
    )


def plugin_problem(plugin: Plugin, earlier: Sequence[Plugin]) -> str:
    """Return the problem with a plugin of the group; "" if none."""
    value: Any = plugin.value
    if not isinstance(value, ToolFormat):
        return f"it is {type(value).__name__}, and not a ToolFormat"
    if plugin.name in FORMATS or any(plugin.name == other.name for other in earlier):
        return f"the tool parser {plugin.name!r} exists already"
    return ""
