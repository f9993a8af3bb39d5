"""A chat while it runs: messages in, answers out, and the /commands in between."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llama_jax.cli.chat_conversation import (
    Command,
    Conversation,
    load_conversation,
    parse_input,
    save_conversation,
    setting_names,
    with_setting,
)
from llama_jax.cli.chat_partner import Partner
from llama_jax.cli.chat_screen import Reader, Screen
from llama_jax.cli.terminal import catch_interrupt, print_error, print_json, write_text
from llama_jax.errors import LlamaJaxError, RequestError, did_you_mean
from llama_jax.generation.outputs import StreamOutput
from llama_jax.sampling import SamplingParams

NARROW = 70
"""Columns below which the line after an answer is short."""


@dataclass(eq=False, repr=False)
class Session:
    """A partner, a conversation and a screen.

    Attributes:
      conversation: as far as it has come; an error leaves it as it was before.
      sampling: for the next answer. With a seed, answer i takes seed + i, so that /retry gives another one.
      origin: where the sampling fields that the user did not set come from.
      answers: how many answers were begun.
    """

    partner: Partner
    screen: Screen
    _: KW_ONLY
    conversation: Conversation
    sampling: SamplingParams
    origin: str
    answers: int = 0

    def run(self, read: Reader) -> None:
        """Answers until the input ends or the user leaves.

        Raises:
          LlamaJaxError: something went wrong and nobody sits there to be told: later messages may build on it.
        """
        while (text := read()) is not None:
            try:
                if not self.handle(text):
                    return
            except LlamaJaxError as error:
                if not self.screen.interactive:
                    raise
                print_error(error.message, error.hint)
            except KeyboardInterrupt:
                if not self.screen.interactive:
                    raise
                self.screen.note("interrupted")

    def handle(self, text: str) -> bool:
        """Does what one input asks for; returns whether to go on."""
        entered = parse_input(text)
        if isinstance(entered, Command):
            return self._command(entered)
        if entered is not None:
            self._answer(self.conversation.asked(entered))
        return True

    def tokens_used(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> int | None:
        """Tokens that a conversation takes of the context; None where the partner cannot tell."""
        messages = conversation.all_messages
        return self.partner.prompt(messages, add_generation_prompt=add_generation_prompt).tokens if messages else 0

    def context_text(self, used: int | None) -> str:
        """How much of the context is used."""
        known = (str(number) if number is not None else "unknown" for number in (used, self.partner.context))
        return " of ".join(known)

    def _answer(self, asked: Conversation) -> None:
        """Answers the last message of `asked`, and keeps both if an answer came, finished or not."""
        prompt = self.partner.prompt(asked.all_messages)
        params = self._params(asked, prompt.tokens)
        text, last = "", None
        with catch_interrupt(signals=[signal.SIGINT]) as interrupted, self.screen.reading() as show:

            def progress(done: int, total: int) -> None:
                if interrupted():
                    raise KeyboardInterrupt
                show(done, total)

            try:
                self.answers += 1
                for last in self.partner.answer(prompt, params, progress):
                    show(0, 0)
                    text += last.text
                    if not self.screen.as_json:
                        write_text(last.text)
                    if interrupted():
                        break
            except KeyboardInterrupt:
                pass
        if last is None or not (text or last.finish_reason):
            self.screen.note("stopped before the answer began; your message was taken back")
            return
        self.conversation = asked.answered(text)
        if self.screen.as_json:
            print_json(_answer_object(text, last))
            return
        if not text.endswith("\n"):
            write_text("\n")
        self.screen.note(self._account(last, params))

    def _params(self, asked: Conversation, used: int | None) -> SamplingParams:
        """The sampling parameters of the next answer, which has the rest of the context.

        Raises:
          RequestError: there is no room for an answer.
        """
        p, context = self.sampling, self.partner.context
        seed = None if p.seed is None else (p.seed + self.answers) % 2**64
        if used is None or context is None:
            return dataclasses.replace(p, seed=seed)
        if used >= context:
            alone = self.tokens_used(asked.without_first_turns(len(asked.turns) - 1), add_generation_prompt=True)
            fits = alone is not None and alone < context
            whole = f"the context is full: the conversation has {used} tokens with this message"
            raise RequestError(
                f"{whole if fits else f'the message alone is too long: it takes {alone} tokens'}, the model's context "
                f"is {context}; your message was taken back",
                param="messages",
                hint="/trim drops the oldest turns, /clear all of them" if fits else "send a shorter one",
            )
        room = context - used
        if p.min_tokens > room:
            raise RequestError(
                f"min_tokens is {p.min_tokens}, and the context has room for {room}",
                param="min_tokens",
                hint="/trim drops the oldest turns, /set min_tokens 0 does without",
            )
        limit = room if p.max_tokens is None else min(p.max_tokens, room)
        return dataclasses.replace(p, max_tokens=limit, seed=seed)

    def _account(self, last: StreamOutput, params: SamplingParams) -> str:
        """One line about an answer: speed, tokens, context and an unusual end."""
        context = self.partner.context
        used = last.prompt_tokens + last.generation_tokens
        rate = f"{last.generation_tps:.1f} tok/s" if last.generation_tokens > 1 else f"{last.ttft_s:.2f} s"
        end = ""
        if last.finish_reason is None:
            end = "stopped"
        elif last.finish_reason == "error":
            end = "ended: the model's next logits were no numbers"
        elif last.finish_reason == "length":
            full = context is not None and used >= context
            end = "context full: /trim or /clear" if full else f"max_tokens={params.max_tokens} reached"
        if self.screen.columns < NARROW:
            parts = [rate, f"{last.prompt_tokens}+{last.generation_tokens}" + (f"/{context}" if context else ""), end]
        else:
            parts = [
                f"{last.generation_tokens} tokens, {rate}",
                f"prompt {last.prompt_tokens} tokens, {last.prompt_tps:.0f} tok/s, first after {last.ttft_s:.2f} s",
                f"context {self.context_text(used)}" if context else "",
                end,
            ]
        return "; ".join(part for part in parts if part)

    def _command(self, command: Command) -> bool:
        if command.name in ("exit", "bye", "quit"):
            return False
        if command.name not in COMMANDS:
            near = did_you_mean(command.name, COMMANDS, "/")
            raise RequestError(
                f"there is no command /{command.name}",
                param=f"/{command.name}",
                hint=f"{near} /help lists them; // begins a message with a slash".lstrip(),
            )
        COMMANDS[command.name][1](self, command.argument)
        return True


def _help(session: Session, argument: str) -> None:
    lines = [what for what, _ in COMMANDS.values()]
    lines += [
        "/exit                leave (also /bye, Ctrl-D)",
        "",
        'Alt-Enter begins a new line; so does Enter after """.',
    ]
    lines += ["Ctrl-C stops an answer. // begins a message with a slash."]
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
    if not value.strip():
        raise RequestError("/set takes a name and a value", param="/set", hint=f"names: {', '.join(setting_names())}")
    session.sampling = with_setting(session.sampling, name, value.strip())
    session.screen.note(f"{name} = {getattr(session.sampling, name)!r}")


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
    session.screen.note("the conversation begins anew; the system prompt stays")


def _undo(session: Session, argument: str) -> None:
    if not session.conversation.turns:
        raise RequestError("there is nothing to undo", param="/undo", hint="write a message")
    session.conversation = session.conversation.without_last_turn()
    session.screen.note(f"the last turn is gone; {len(session.conversation.turns)} left")


def _retry(session: Session, argument: str) -> None:
    asked = session.conversation.without_last_answer()
    if session.sampling.greedy:
        session.screen.note("temperature is 0: the answer will be the same")
    session._answer(asked)


def _edit(session: Session, argument: str) -> None:
    """Has the last message written anew in the user's editor, and answered."""
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
    session._answer(session.conversation.without_last_turn().asked(text.strip()))


def _model(session: Session, argument: str) -> None:
    if argument:
        session.partner.choose(argument)
    session.screen.note(f"{session.partner.name} on {session.partner.about}")


def _trim(session: Session, argument: str) -> None:
    """Drops the oldest turns: as many as said, or until half of the context is free."""
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
    session.screen.note(f"{count} turns dropped, {turns - count} left{known}")


def _save(session: Session, argument: str) -> None:
    if not session.conversation.all_messages:
        raise RequestError("there is nothing to save", param="/save", hint="write a message")
    path = _path(argument, "/save")
    save_conversation(session.conversation, path)
    session.screen.note(f"{len(session.conversation.all_messages)} messages saved in {path}")


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
        "set": ("/set NAME VALUE      set a sampling field, such as temperature 0.5", _set),
        "show": ("/show                the model, the settings, what the context holds", _show),
        "clear": ("/clear               forget the conversation", _clear),
        "undo": ("/undo                take the last turn back", _undo),
        "retry": ("/retry               answer the last message again", _retry),
        "edit": ("/edit                write the last message anew in $EDITOR", _edit),
        "model": ("/model [NAME]        show the model, or change to another of the server's", _model),
        "trim": ("/trim [N]            drop the N oldest turns, or half of the context", _trim),
        "save": ("/save FILE           write the conversation as JSON", _save),
        "load": ("/load FILE           go on with a saved conversation", _load),
    }
)
"""Name, line of help, and what it does."""


def _answer_object(text: str, last: StreamOutput) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": text,
        "finish_reason": last.finish_reason or "interrupted",
        "prompt_tokens": last.prompt_tokens,
        "generation_tokens": last.generation_tokens,
        "ttft_ms": round(last.ttft_s * 1000, 3),
        "prompt_tps": round(last.prompt_tps, 3),
        "generation_tps": round(last.generation_tps, 3),
    }
