"""Chat templates: from messages to the text and token ids in the format a model was trained on.

Templates are Jinja programs that come with a model. They run in jinja2's sandbox, in the environment that transformers
gives them, so they render the same text. That text mixes what the template wrote with what the messages say; only the
template may write control tokens, so `encode_chat` protects every string of the messages before rendering.
"""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_jax.errors import RequestError, TemplateError
from llama_jax.text.sandbox import MAX_OUTPUT, compile_template, template_literals
from llama_jax.text.tokenizer.guard import SENTINEL, ControlGuard, strip_sentinels

if TYPE_CHECKING:
    from llama_jax.text.tokenizer import Tokenizer

Message = Mapping[str, Any]

EXAMPLE = 'a conversation is a list such as [{"role": "user", "content": "…"}]'
"""Hint for values that are not a conversation."""
ROLES = frozenset(
    {"system", "user", "assistant", "tool", "function", "developer", "ipython", "model", "environment", "context"}
)
"""Roles allowed in a conversation of unknown origin."""
_MAX_DEPTH = 64
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
_RESERVED = frozenset({"messages", "tokenize", "raise_exception", "strftime_now", "namespace", "dict", "range"})


def render_chat(
    messages: Sequence[Message],
    template: str,
    *,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    **kwargs: Any,
) -> str:
    """Render messages as `transformers.apply_chat_template(tokenize=False)` does.

    Args:
      messages: objects with "role" and "content" (and others the template reads). Keys whose value is None count as
        missing, and "thinking", "reasoning" and "reasoning_content" are names for the same thing.
      template: the Jinja source.
      add_generation_prompt: end with the header of the assistant's answer.
      special_tokens: values of "bos_token", "eos_token" and so on.
      tools: JSON schemas of the tools that the model may call.
      documents: objects with "title" and "text", for retrieval templates.
      kwargs: other variables of the template, such as date_string or enable_thinking.

    Raises:
      TemplateError: the template is malformed, refused the messages, or wrote far more than they contain.
      RequestError: messages, tools or a variable are not valid template inputs.
    """
    values = _template_values(messages, tools, documents, kwargs)
    return _render(template, special_tokens or {}, add_generation_prompt, values, datetime.datetime.now())


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    chat_template: str | None = None,
    **template_kwargs: Any,
) -> list[int]:
    """Encode a conversation as token ids, in the format the model was trained on.

    The ids are those of `transformers.apply_chat_template`, except that control tokens spelled out in the messages,
    tools, documents or template variables become plain text. Nothing is added to the template's text: BOS is
    present only if the template writes it.

    Args:
      chat_template: Jinja source, or the name of one of the model's templates. By default the model's "tool_use"
        template if there are tools and it has one, otherwise its default.

    Raises:
      TemplateError: the template is missing, malformed, refused the messages, or handles control tokens in the messages
        in a way that cannot be made safe.
      RequestError: as `render_chat`.
      TokenizerError: the text cannot be encoded.
    """
    template = select_template(tokenizer.chat_templates, chat_template, has_tools=tools is not None)
    values = _template_values(messages, tools, documents, template_kwargs)
    names = tokenizer.special_tokens_map
    now = datetime.datetime.now()
    literals = template_literals(template)
    protected = _map_strings(values, lambda text: _protect(text, tokenizer.guard, literals))
    rendered = _render(template, names, add_generation_prompt, protected, now)
    if protected != values:
        plain = _render(template, names, add_generation_prompt, values, now)
        if strip_sentinels(rendered) != plain:
            raise TemplateError(
                "the chat template changes or inspects text of the messages that looks like control tokens",
                hint="remove control tokens from the messages",
            )
    return tokenizer.encode_guarded(rendered)


def check_messages(messages: Any) -> None:
    """Refuses values from a file that are not a conversation, before any template sees them.

    Most templates write any role, and the model answers even if it was never trained on it. For a template with its own
    roles use `render_chat` or `encode_chat`, which accept any role.

    Raises:
      RequestError: it is not a list of messages, or a message has no role or an unknown one.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError("this is not a list of messages, or an empty one", param="messages", hint=EXAMPLE)
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(role, str):
            raise RequestError(f"message {i} has no role", param="messages", hint=EXAMPLE)
        if role not in ROLES:
            near = difflib.get_close_matches(role, ROLES, n=1)
            known = f"one of {', '.join(sorted(ROLES))}"
            raise RequestError(
                f"message {i} has the unknown role {role!r:.100}",
                param="messages",
                hint=f"did you mean {near[0]!r}?" if near else known,
            )


def select_template(templates: Mapping[str, str], chosen: str | None, *, has_tools: bool) -> str:
    """The template to use: the given source or name, else "tool_use" if there are tools, else "default".

    Raises:
      TemplateError: the model has no suitable one.
    """
    if chosen is not None:
        return templates.get(chosen, chosen)
    for name in ("tool_use", "default") if has_tools else ("default",):
        if name in templates:
            return templates[name]
    if templates:
        raise TemplateError(
            f"the model has chat templates {sorted(templates)} and none is the default", hint="name one of them"
        )
    raise TemplateError(
        "the model has no chat template", hint="use a plain prompt, or an instruction-tuned model, or pass a template"
    )


def _protect(text: str, guard: ControlGuard, literals: Sequence[str]) -> str:
    """Protects a string of the messages, so that neither it nor its surroundings can form a control token.

    Some templates build tokens, as in '<|' + role + '|>'. A string that would complete one there is broken up too,
    unless it is the name of a role.
    """
    protected = guard.protect(text)
    core = text.strip()
    if not core or core in ROLES:
        return protected
    for token in guard.controls:
        start = token.find(core)
        while start >= 0:
            before, after = token[:start], token[start + len(core) :]
            if (
                before
                and after
                and any(literal.endswith(before) for literal in literals)
                and any(literal.startswith(after) for literal in literals)
            ):
                return SENTINEL + protected
            start = token.find(core, start + 1)
    return protected


def _template_values(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """All template inputs except the model's own tokens, as a fresh tree of plain JSON values."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise RequestError(
            "messages must be a list with at least one message",
            param="messages",
            hint='[{"role": "user", "content": …}]',
        )
    chat = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(
                f"message {i} is {type(message).__name__}, not an object",
                param=f"messages[{i}]",
                hint="role and content",
            )
        plain = _plain({k: v for k, v in message.items() if v is not None}, f"messages[{i}]")
        reasoning = next((plain[name] for name in _REASONING_NAMES if plain.get(name) is not None), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        chat.append(plain)
    for param, items in (("tools", tools), ("documents", documents)):
        if items is not None and not (isinstance(items, Sequence) and all(isinstance(item, Mapping) for item in items)):
            raise RequestError(f"{param} must be a list of objects", param=param, hint="pass JSON objects")
    for name in kwargs:
        if name in _RESERVED:
            raise RequestError(f"{name!r} cannot be set by the caller", param=name, hint="choose another name")
    return {
        **{name: _plain(value, name) for name, value in kwargs.items()},
        "messages": chat,
        "tools": _plain(tools, "tools"),
        "documents": _plain(documents, "documents"),
    }


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made only of plain JSON types, since the sandbox does not know the methods of other objects.

    Raises:
      RequestError: a value is of another type, or nested too deeply.
    """
    if depth > _MAX_DEPTH:
        raise RequestError(
            f"{where[:80]}… is nested more than {_MAX_DEPTH} deep", param=where.partition("[")[0], hint="flatten it"
        )
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # a plain string even from a subclass, such as an enum
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {_plain(k, where): _plain(v, f"{where}.{k}", depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise RequestError(
        f"{where} holds {type(value).__name__}, which is not a JSON value", param=where, hint="pass JSON"
    )


def _map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """A copy of a JSON tree with a function applied to every string, including keys."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {_map_strings(k, function): _map_strings(v, function) for k, v in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, function) for item in value]
    return value


def _size(value: Any) -> int:
    """Total number of characters in the strings of a JSON tree."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_size(k) + _size(v) for k, v in value.items())
    return sum(map(_size, value)) if isinstance(value, list) else 0


def _render(
    template: str,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool,
    values: Mapping[str, Any],
    now: datetime.datetime,
) -> str:
    """Run a template and limit its output."""
    import jinja2

    compiled = compile_template(template)
    limit = MAX_OUTPUT + 4 * _size(dict(values))
    variables = {
        **special_tokens,
        "add_generation_prompt": add_generation_prompt,
        "strftime_now": now.strftime,
        **values,
    }
    parts, written = [], 0
    try:
        for part in compiled.generate(variables):
            parts.append(part)
            written += len(part)
            if written > limit:
                raise TemplateError(
                    f"the chat template wrote more than {limit} characters",
                    hint="the template may be broken or hostile",
                )
    except TemplateError:
        raise
    except jinja2.exceptions.UndefinedError as error:
        raise TemplateError(
            f"the chat template needs something that the messages lack: {error}", hint="check the messages' fields"
        ) from error
    except jinja2.exceptions.SecurityError as error:
        raise TemplateError(f"the chat template was stopped: {error}", hint="do not use this template") from error
    except jinja2.exceptions.TemplateError as error:
        raise TemplateError(
            f"the chat template refused the messages: {error}", hint="check the order and the roles of the messages"
        ) from error
    except Exception as error:
        raise TemplateError(
            f"the chat template failed with {type(error).__name__}: {error}", hint="check the messages' fields"
        ) from error
    return "".join(parts)
