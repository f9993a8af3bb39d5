"""The /commands of a chat."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from llama_jax.cli.chat_conversation import Conversation, setting_names, with_setting
from llama_jax.cli.chat_files import load_conversation, save_conversation
from llama_jax.cli.chat_views import branch_lines, logprob_lines, token_lines
from llama_jax.errors import LlamaJaxError, RequestError
from llama_jax.sampling import SamplingParams

if TYPE_CHECKING:
    from llama_jax.cli.chat_session import Session

ALTERNATIVES = 5
"""Number of alternatives that `/logprobs on` lists per token."""


def _help(session: Session, argument: str) -> None:
    lines = [what for what, _ in COMMANDS.values()]
    lines += [
        "/exit                leave (also /bye, Ctrl-D)",
        "",
        'Alt-Enter begins a new line; so does Enter after """. Ctrl-X Ctrl-E opens $EDITOR.',
        "Ctrl-C stops an answer. // begins a message with a slash.",
    ]
    session.screen.reply("\n".join(lines))


def _system(session: Session, argument: str) -> None:
    if not argument:
        session.screen.reply("no system prompt" if session.conversation.system is None else session.conversation.system)
        return
    text = None if argument == '""' else argument
    session.conversation = session.conversation.with_system(text)
    session.screen.note("no system prompt from now on" if text is None else "system prompt set")


def _set(session: Session, argument: str) -> None:
    name, _, value = argument.partition(" ")
    value = value.strip()
    if not value:
        raise RequestError("/set takes a name and a value", param="/set", hint=f"names: {', '.join(settable())}")
    if name in _SWITCHES:
        value = _SWITCHES[name](session, value)
    else:
        session.sampling = with_setting(session.sampling, name, value, tuple(_SWITCHES))
        value = repr(getattr(session.sampling, name))
    session.screen.note(f"{name} = {value}")


def _markdown(session: Session, value: str) -> str:
    if value not in ("on", "off"):
        raise RequestError(f"markdown cannot be {value}", param="markdown", hint="on or off")
    if value == "on" and not session.screen.can_draw:
        raise RequestError(
            "this terminal cannot show markdown",
            param="markdown",
            hint="it takes a terminal with colours, and no --json",
        )
    session.screen.markdown = value == "on"
    return value


_SWITCHES: Mapping[str, Callable[[Session, str], str]] = MappingProxyType({"markdown": _markdown})


def settable() -> list[str]:
    """Names that `/set` takes."""
    return [*setting_names(), *_SWITCHES]


def _show(session: Session, argument: str) -> None:
    partner, conversation = session.partner, session.conversation
    default = SamplingParams(max_tokens=None)
    rows = {
        "model": f"{partner.name} on {partner.about}",
        "system": "none" if conversation.system is None else conversation.system,
        "turns": len(conversation.turns),
        "context": f"{session.context_text(session.tokens_used(conversation))} tokens used",
        "sampling": f"as set here, else from {session.origin}",
    }
    for name in setting_names():
        value = getattr(session.sampling, name)
        if value != getattr(default, name) or name in ("temperature", "top_p", "top_k", "max_tokens", "seed"):
            rows[f"  {name}"] = value
    session.screen.reply("\n".join(f"{name:14}{value}" for name, value in rows.items()))


def _clear(session: Session, argument: str) -> None:
    session.conversation = session.conversation.cleared()
    session.screen.note("a new conversation; the system prompt stays")


def _undo(session: Session, argument: str) -> None:
    if not session.conversation.turns:
        raise RequestError("there is nothing to undo", param="/undo", hint="write a message")
    session.conversation = session.conversation.without_last_turn()
    session.screen.note(f"the last turn is gone; {len(session.conversation.turns)} left")


def _retry(session: Session, argument: str) -> None:
    asked = session.conversation.without_last_answer()
    if session.sampling.greedy:
        session.screen.note("temperature is 0: the answer will be the same")
    session.answer(asked)


def _edit(session: Session, argument: str) -> None:
    """Lets the user edit the last message in an editor, and answers it."""
    import click

    asked = session.conversation.without_last_answer()
    before = str(asked.messages[-1]["content"])
    try:
        text = click.edit(before)
    except click.ClickException as error:
        raise RequestError(f"no editor: {error.message}", param="/edit", hint="set EDITOR") from error
    if text is None or text.strip() in ("", before.strip()):
        session.screen.note("the message stays as it was")
        return
    session.answer(session.conversation.before_last_turn().asked(text.strip()))


def _branch(session: Session, argument: str) -> None:
    """Lists the branches, or switches to another one and shows its end."""
    branches = session.conversation.branches
    if not argument:
        session.screen.reply("\n".join(branch_lines(session.conversation)))
        return
    if not argument.isdecimal() or not 1 <= int(argument) <= len(branches):
        raise RequestError(
            f"there is no branch {argument}",
            param="/branch",
            hint=f"a number from 1 to {len(branches)}; /branch lists them",
        )
    session.conversation = session.conversation.at(branches[int(argument) - 1])
    session.screen.note(f"branch {argument} of {len(branches)}, {len(session.conversation.messages)} messages")
    for message in session.conversation.turns[-1] if session.conversation.turns else ():
        session.screen.message(message)


def _tokens(session: Session, argument: str) -> None:
    """Counts the tokens that each message adds to the conversation."""
    messages = session.conversation.all_messages
    counts = []
    for end in range(1, len(messages) + 1):
        try:
            counts.append(session.partner.prompt(messages[:end], add_generation_prompt=False).tokens)
        except LlamaJaxError:  # some templates refuse conversations that do not end with an answer
            counts.append(None)
    lines = token_lines(messages, counts, session.partner.context)
    if session.answered:
        last = session.answered.last
        lines.append(f"the last prompt had {last.prompt_tokens} tokens, of which {last.cached_tokens} were cached")
    session.screen.reply("\n".join(lines))


def _logprobs(session: Session, argument: str) -> None:
    """Turns log-probabilities on or off, or lists those of the last answer."""
    if argument:
        count = {"on": str(ALTERNATIVES), "off": "none"}.get(argument, argument)
        session.sampling = with_setting(session.sampling, "logprobs", count)
        session.screen.note(f"logprobs = {session.sampling.logprobs!r}")
    elif session.answered and session.answered.tokens:
        session.screen.reply("\n".join(logprob_lines(session.answered.tokens, session.screen.columns)))
    else:
        raise RequestError(
            "the last answer has no probabilities",
            param="/logprobs",
            hint="/logprobs on asks for those of the next ones",
        )


def _model(session: Session, argument: str) -> None:
    if argument:
        session.partner.choose(argument)
    session.screen.note(f"{session.partner.name} on {session.partner.about}")


def _trim(session: Session, argument: str) -> None:
    """Drops the oldest turns: the given number, or until half of the context is free."""
    turns = len(session.conversation.turns)
    if argument:
        if not argument.isdecimal() or not 1 <= int(argument) <= turns:
            raise RequestError(
                f"/trim cannot drop {argument} turns", param="/trim", hint=f"a number from 1 to {turns}, or nothing"
            )
        count = int(argument)
    else:
        context, count = session.partner.context, 0
        while (used := session.tokens_used(session.conversation.without_first_turns(count))) is not None:
            if context is None or count == turns or used <= context // 2:
                break
            count += 1
        if context is None or used is None:
            raise RequestError(
                f"{session.partner.about} does not tell how full the context is",
                param="/trim",
                hint="/trim N drops N turns",
            )
    session.conversation = session.conversation.without_first_turns(count)
    used = session.tokens_used(session.conversation)
    known = "" if used is None else f": {used} tokens"
    session.screen.note(f"{count} turn{'s' * (count != 1)} dropped, {turns - count} left{known}")


def _save(session: Session, argument: str) -> None:
    if session.conversation == Conversation():
        raise RequestError("there is nothing to save", param="/save", hint="write a message")
    path = _path(argument, "/save")
    save_conversation(session.conversation, path)
    branches = len(session.conversation.branches)
    tree = f" and {branches} branches, as the server's page reads them," * (branches > 1)
    session.screen.note(f"{len(session.conversation.all_messages)} messages{tree} saved in {path}")


def _load(session: Session, argument: str) -> None:
    path = _path(argument, "/load")
    session.conversation = load_conversation(path)
    session.screen.note(f"{len(session.conversation.all_messages)} messages loaded from {path}")


def _path(argument: str, command: str) -> Path:
    if not argument or "\0" in argument:
        raise RequestError(f"{command} takes the name of a file", param=command, hint=f"{command} talk.json")
    return Path(os.path.expanduser(argument))


COMMANDS: Mapping[str, tuple[str, Callable[[Session, str], None]]] = MappingProxyType(
    {
        "help": ("/help                this list", _help),
        "system": ('/system [TEXT]       show or set the system prompt; "" is none', _system),
        "set": ("/set NAME VALUE      set a sampling field, such as temperature 0.5, or markdown off", _set),
        "show": ("/show                the model, the settings, what the context holds", _show),
        "clear": ("/clear               forget the conversation", _clear),
        "undo": ("/undo                undo the last turn", _undo),
        "retry": ("/retry               answer the last message again", _retry),
        "edit": ("/edit                rewrite the last message in $EDITOR", _edit),
        "branch": ("/branch [N]          list the branches that /edit and /retry have left, or go to one", _branch),
        "tokens": ("/tokens              count the tokens of each message", _tokens),
        "logprobs": ("/logprobs [on|off]   list the last answer's tokens: how likely, and what else", _logprobs),
        "model": ("/model [NAME]        show the model, or change to another of the server's", _model),
        "trim": ("/trim [N]            drop the N oldest turns, or half of the context", _trim),
        "save": ("/save FILE           write the conversation as JSON", _save),
        "load": ("/load FILE           resume a saved conversation", _load),
    }
)
"""Name, help line, and function of each command."""
