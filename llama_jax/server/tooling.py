"""Tools that a request offers: how the template shows them, constraints on the answer, and its parsing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llama_jax.errors import RequestError
from llama_jax.sampling import Grammar
from llama_jax.server.reading import ChatReader
from llama_jax.server.served import Served
from llama_jax.text.grammar import GrammarMatcher
from llama_jax.text.tools import Place, ReasoningParser, Tool, ToolFormat, tools_of
from llama_jax.text.tools.grammars import OPENING, amid, answered

_RESERVED = frozenset(
    {
        *("tokenizer", "messages", "add_generation_prompt", "tools", "documents", "chat_template", "strftime_now"),
        *("template", "special_tokens"),  # arguments of `render_chat`
    }
)
"""Template variables that `chat_template_kwargs` cannot set."""


type Tools = tuple[Tool, ...]


@dataclass(frozen=True)
class Offer:
    """Tools that a model may or must call.

    Attributes:
      shown: as passed to the template; None for none.
      tools: those that may be called; builtin: names of tools that only the template knows.
      choice: "required" if the answer must be a call of one of `tools`.
      several: whether there may be more than one call.
      strict: whether a tool requires arguments that meet its schema even if no call is required.
    """

    format: ToolFormat | None = None
    shown: list[dict[str, Any]] | None = None
    tools: tuple[Tool, ...] = ()
    builtin: tuple[str, ...] = ()
    choice: Literal["auto", "required"] = "auto"
    several: bool = True
    strict: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tools that can be called."""
        return (*(tool.name for tool in self.tools), *self.builtin)


def offer_of(served: Served, fields: dict[str, Any]) -> Offer:
    """Return a request's offer; removes its fields about tools from `fields`.

    Raises:
      RequestError: a tool or the choice is invalid, or this model cannot call tools.
    """
    given, choice = fields.pop("tools", None) or [], fields.pop("tool_choice", None) or "auto"
    several = fields.pop("parallel_tool_calls", True)
    extras = fields.get("chat_template_kwargs", {}).get("builtin_tools", [])
    builtin = tuple(name for name in extras if isinstance(name, str)) if isinstance(extras, list) else ()
    if len(given) > served.settings.limits.tools:
        raise RequestError(
            f"{len(given)} tools; there may be {served.settings.limits.tools}", param="tools", hint="offer fewer"
        )
    tools = tools_of(given)
    mode, callable = _chosen(choice, tools)
    if mode == "none" or not (tools or builtin):
        return Offer()
    format = served.tool_format
    if format is None or not served.shows_tools:
        raise RequestError(
            "this model's chat template has no calls of tools that are known here",
            param="tools",
            hint="leave them out, use a model that calls tools, or name its format: `llama-jax serve --tool-parser`",
        )
    if mode != "auto":
        return Offer(format, given, callable, choice="required", several=several and mode == "required")
    names = {tool.name for tool in callable}
    strict = any(t["function"].get("strict") is True and t["function"]["name"] in names for t in given)
    return Offer(format, given or None, callable, builtin if choice == "auto" else (), several=several, strict=strict)


def _chosen(choice: Any, tools: tuple[Tool, ...]) -> tuple[Literal["auto", "none", "required", "named"], Tools]:
    """Whether a tool must be called, and which may be. The model is shown all of them in any case."""
    match choice:
        case "auto" | "none":
            return choice, tools
        case "required" if tools:
            return "required", tools
        case {"type": "function", "function": {"name": str(name)}} if found := _named([name], tools):
            return "named", found
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": [*entries]}}:
            names = [_name(entry) for entry in entries]
            found = _named(names, tools)
            if found and len(found) == len({*names}):
                return mode, found
    raise RequestError(
        "tool_choice names no tool of the request, or one that it has not",
        param="tool_choice",
        hint='give "auto", "none", "required", {"type": "function", "function": {"name": ...}} or {"type": '
        '"allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": [...]}}, and the tools',
    )


def _name(entry: Any) -> str | None:
    match entry:
        case {"type": "function", "function": {"name": str(name)}}:
            return name
    return None


def _named(names: Sequence[str | None], tools: Tools) -> Tools:
    return tuple(tool for tool in tools if tool.name in names)


def template_variables(served: Served, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template variables that a request sets.

    Raises:
      RequestError: requests may not set one of them.
    """
    own = _RESERVED | served.tokenizer.special_tokens_map.keys()
    if reserved := next((name for name in given if name in own), None):
        raise RequestError(
            f"{reserved!r} cannot be set by a request", param="chat_template_kwargs", hint="leave it out"
        )
    return dict(given)


def form_of(served: Served, offer: Offer, form: Grammar | None, place: Place) -> tuple[Grammar | None, Place]:
    """Return the required form of the answer, and where in the reasoning it then begins.

    A JSON schema and required calls apply after the reasoning. Other forms apply to the whole text.

    Args:
      form: requested form of the answer's text; place: where the prompt ends.

    Raises:
      RequestError: of `tools`: the grammar cannot be made; of `response_format`: the two cannot be combined.
    """
    answer = ""
    if offer.choice != "required":
        if form is None:
            return _amid(served, offer, place), place
        if form.kind != "json_schema":
            if offer.tools:
                hint = "ask for a JSON schema"
                raise RequestError("a grammar leaves no room for tools", param="response_format", hint=hint)
            return form, "behind"
        if not offer.tools and place == "behind":
            return form, place
        answer = form.text
    calls = offer.format.grammar(offer.tools, offer.several, served.spelled) if offer.format and offer.tools else ""
    reasoning = None if place == "behind" else served.reasoning
    inside = place == "inside"
    made = Grammar.lark(
        answered(calls=calls, answer=answer, reasoning=reasoning, inside=inside, spelled=served.spelled)
    )
    return _compiled(served, made, "tools" if calls else "response_format"), place


def _amid(served: Served, offer: Offer, place: Place) -> Grammar | None:
    """The form of a text that may contain calls, if a tool is strict and the format marks calls."""
    format = offer.format
    if format is None or not offer.strict or not format.opening:
        return None

    def spelled(mark: str) -> str:
        return OPENING if mark == format.opening else served.spelled(mark)

    end = served.spelled(served.reasoning[1]) if served.reasoning and place == "inside" else ""
    calls = format.grammar(offer.tools, offer.several, spelled)
    made = amid(calls, served.spelled(format.opening), several=offer.several, reasoning_end=end)
    return _compiled(served, Grammar.lark(made), "tools")


def _compiled(served: Served, grammar: Grammar, param: str) -> Grammar:
    """A checked grammar; compiled ones are cached."""
    model = served.engine.model
    try:
        GrammarMatcher.of(grammar, served.tokenizer, model.config.vocab_size, model.eos_token_ids)
    except RequestError as error:
        what = {"tools": "parameters of a tool", "response_format": "JSON schema"}[param]
        why = error.message.partition(": ")[2]
        raise RequestError(f"the {what} cannot be used: {why}", param=param, hint=error.hint) from None
    return grammar


def reader_of(served: Served, offer: Offer, place: Place) -> ChatReader:
    """Return the reader of one answer that begins at this place of its reasoning."""
    marks = served.reasoning
    reasoning = ReasoningParser(marks, inside=place == "inside") if marks and place != "behind" else None
    if offer.format is None:
        return ChatReader(reasoning)
    return ChatReader(reasoning, offer.format.parser(offer.names), offer.format.call_id, several=offer.several)


def shows_control(served: Served, offer: Offer) -> bool:
    """Return whether the answer can be read only with its control tokens."""
    marks: Sequence[str] = (*(served.reasoning or ()), *(offer.format.control if offer.format else ()))
    return any(mark in served.tokenizer.special_tokens for mark in marks)
