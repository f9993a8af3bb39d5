"""Lark grammars of texts that consist only of tool calls (https://github.com/guidance-ai/llguidance)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama_jax.errors import RequestError
from llama_jax.text.tools.tool import Tool

Spelled = Callable[[str], str]
"""Maps a mark to its spelling in a grammar: as a token if it is a control token, else as text."""
ToolGrammar = Callable[[Sequence[Tool], bool, Spelled], str]
"""Makes a Lark grammar from the callable tools, whether several calls are allowed, and the spelling of marks."""

_GUIDANCE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as models have learnt it, and as json.dumps writes it."""
_ANYTHING = r"ANYTHING: /(.|\n)+/"
_SPACES = r"SPACES: /[ \n]{0,4}/"  # some models may write whitespace for ever
OPENING = "opening"
"""The rule that `amid` adds to a grammar of calls."""
_DEFINITIONS = ("$defs", "definitions")
_KEYWORD = re.compile(r"[^\s=,()\[\]{}\"']+")


def hermes(tools: Sequence[Tool], several: bool, spelled: Spelled) -> str:
    """Return the grammar of calls between <tool_call> and </tool_call>."""
    begin, end = spelled("<tool_call>"), spelled("</tool_call>")
    more = ' ("\\n" call)*' if several else ""
    return f'start: call{more}\ncall: {begin} "\\n" object "\\n" {end}\n{_objects(tools, "arguments")}'


def tool_calls(tools: Sequence[Tool], several: bool, spelled: Spelled) -> str:
    """Return the grammar of [TOOL_CALLS] with an array of calls."""
    more = ' (", " object)*' if several else ""
    return f'start: {spelled("[TOOL_CALLS]")} " "? "[" object{more} "]"\n{_objects(tools, "arguments")}'


def tool_calls_args(tools: Sequence[Tool], several: bool, spelled: Spelled) -> str:
    """Return the grammar of [TOOL_CALLS]name[ARGS]{...}."""
    mark, args = spelled("[TOOL_CALLS]"), spelled("[ARGS]")
    calls = [f"{mark} {json.dumps(tool.name)} {args} arguments_{i}" for i, tool in enumerate(tools)]
    rules = [f"arguments_{i}: %json {_json({'type': 'object', **tool.parameters}, {})}" for i, tool in enumerate(tools)]
    return "\n".join([f"start: call{'+' if several else ''}", f"call: {' | '.join(calls)}", *rules]) + "\n"


def llama_json(tools: Sequence[Tool], several: bool, spelled: Spelled) -> str:
    """Return the grammar of one object with name and parameters: Llama 3's templates take one call in an answer."""
    return f"start: object\n{_objects(tools, 'parameters')}"


def llama_pythonic(tools: Sequence[Tool], several: bool, spelled: Spelled) -> str:
    """Return the grammar of [f(a=1), g()], with JSON's values."""
    rules = [f'start: "[" call{' (", " call)*' if several else ""} "]"']
    rules.append(f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}")
    for i, tool in enumerate(tools):
        rules += _python_call(tool, f"call_{i}")
    return "\n".join(rules) + "\n"


def answered(
    *, calls: str = "", answer: str = "", reasoning: tuple[str, str] | None = None, inside: bool, spelled: Spelled
) -> str:
    """Return the grammar of an answer that may begin with reasoning.

    Args:
      calls: the grammar of calls; answer: a JSON schema. The answer is either.
      reasoning: marks around the reasoning, if there may be any; inside: whether the answer begins within it.
    """
    body = " | ".join(name for name, given in (("calls", calls), ("answer", answer)) if given)
    rules = [calls.replace("start:", "calls:", 1)] if calls else []
    if answer:
        schema = json.loads(answer)
        dense = {"x-guidance": {"whitespace_flexible": False}, **schema} if isinstance(schema, dict) else schema
        rules.append(f"answer: %json {json.dumps(dense, ensure_ascii=False)}")
    first = ""
    if reasoning is not None:
        begin, end = map(spelled, reasoning)
        first = "reasoning SPACES " if inside else f"({begin} reasoning SPACES)? "
        rules += [_up_to("reasoning", end), _SPACES]
    return "\n".join([f"start: {first}({body})", *rules, _ANYTHING]) + "\n"


def amid(calls: str, opening: str, *, several: bool, reasoning_end: str = "") -> str:
    """Return the grammar of any text in which only a call follows the opening mark of calls.

    Args:
      calls: a grammar of calls, in which `OPENING` is the rule for the mark.
      opening: the mark; reasoning_end: the end mark of the reasoning in which the text begins. Both already spelled.
    """
    first = "reasoning SPACES " if reasoning_end else ""
    rules = [f"start: {first}calls{'*' if several else '?'} ANYTHING?", calls.replace("start:", "calls:", 1)]
    rules += [_up_to(OPENING, opening), _ANYTHING]
    if reasoning_end:
        rules += [_up_to("reasoning", reasoning_end), _SPACES]
    return "\n".join(rules) + "\n"


def _up_to(rule: str, mark: str) -> str:
    """The rule of any text that ends with the first mark."""
    if mark.startswith("<["):  # a control token, which no text contains
        return f"{rule}: ANYTHING? {mark}"
    return f"{rule}[suffix={mark}]: /(.|\\n)*/"


def _objects(tools: Sequence[Tool], key: str) -> str:
    """The rule `object`: the name of a tool and, under `key`, its arguments."""
    rules = [f"object: {' | '.join(f'object_{i}' for i in range(len(tools)))}"]
    for i, tool in enumerate(tools):
        properties = {"name": {"const": tool.name}, key: {"type": "object", **_own(tool.parameters)}}
        schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
        rules.append(f"object_{i}: %json {_json(schema, tool.parameters)}")
    return "\n".join(rules) + "\n"


def _python_call(tool: Tool, rule: str) -> list[str]:
    """Rules of one call: required arguments come first, with a comma before each but the first."""
    properties, needed = tool.parameters.get("properties") or {}, tool.parameters.get("required") or []
    if not isinstance(properties, Mapping) or not isinstance(needed, list):
        raise RequestError(
            f"the parameters of {tool.name!r} are no JSON schema",
            param="tools",
            hint='"properties" is an object, "required" a list of its names',
        )
    required = [name for name in properties if name in needed]
    optional = [name for name in properties if name not in required]
    if odd := next((name for name in properties if not _KEYWORD.fullmatch(name)), None):
        raise RequestError(f"{odd!r:.100} cannot name an argument of a call", param="tools", hint="use letters and _")
    number = {name: f"{rule}_{i}" for i, name in enumerate(properties)}
    values = {name: _json(_schema(schema), tool.parameters) for name, schema in properties.items()}
    rules = [f"{number[name]}: {json.dumps(name + '=')} %json {value}" for name, value in values.items()]
    tails = ""
    for name in reversed(optional):  # each may follow any of those before it
        tails = f'(", " {number[name]})? {tails}'
    if required:
        inside = ' ", " '.join(number[name] for name in required) + " " + tails
    else:  # any of them may be the first
        first = []
        for at, name in enumerate(optional):
            first.append(" ".join([number[name], *(f'(", " {number[other]})?' for other in optional[at + 1 :])]))
        inside = f"({' | '.join(first)})?" if first else ""
    return [f'{rule}: {json.dumps(tool.name + "(")} {inside} ")"', *rules]


def _schema(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _own(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key not in _DEFINITIONS}


def _json(schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """A schema for llguidance, with the definitions of the enclosing schema, which "#/$defs/..." refers to."""
    definitions = {key: root[key] for key in _DEFINITIONS if key in root}
    try:
        return json.dumps({"x-guidance": _GUIDANCE, **schema, **definitions}, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"a tool's parameters are not JSON: {error}", param="tools", hint="give a schema") from None
