"""A chat while it runs: messages in, answers out, and the /commands in between."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from llama_jax.cli.chat_commands import COMMANDS
from llama_jax.cli.chat_conversation import Command, Conversation, parse_input
from llama_jax.cli.chat_partner import Partner, Piece
from llama_jax.cli.chat_screen import Reader, Screen
from llama_jax.cli.terminal import catch_interrupt, meter, print_error, print_json
from llama_jax.errors import LlamaJaxError, RequestError, did_you_mean
from llama_jax.sampling import SamplingParams

NARROW = 70
"""Columns below which the line after an answer is short."""
_METER = 12


@dataclass(frozen=True)
class Answered:
    """Facts about an answer, besides its text.

    Attributes:
      last: its last piece.
      tokens: all of them, as in `Piece`.
      used: tokens of the conversation including the answer.
    """

    last: Piece
    tokens: tuple[Mapping[str, Any], ...]

    @property
    def used(self) -> int:
        return self.last.prompt_tokens + self.last.generation_tokens


@dataclass(eq=False, repr=False)
class Session:
    """A partner, a conversation and a screen.

    Attributes:
      conversation: the current one; an error leaves it unchanged.
      sampling: for the next answer. With a seed, answer i takes seed + i, so that /retry gives another one.
      origin: of the sampling fields that the user did not set.
      answers: number of answers begun.
      answered: the last answer.
    """

    partner: Partner
    screen: Screen
    _: KW_ONLY
    conversation: Conversation
    sampling: SamplingParams
    origin: str
    answers: int = 0
    answered: Answered | None = None
    _counted: tuple[Conversation, int | None] = field(default=(Conversation(), 0), init=False)

    def run(self, read: Reader) -> None:
        """Answers until the input ends or the user leaves.

        Raises:
          LlamaJaxError: something failed in a non-interactive chat, where later messages may depend on it.
        """
        self.screen.status = self._status
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
        """Handles one input; returns whether to continue."""
        entered = parse_input(text)
        if isinstance(entered, Command):
            return self._command(entered)
        if entered is not None:
            self.answer(self.conversation.asked(entered))
        return True

    def tokens_used(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> int | None:
        """Tokens of the context that a conversation takes; None if the partner cannot tell."""
        messages = conversation.all_messages
        return self.partner.prompt(messages, add_generation_prompt=add_generation_prompt).tokens if messages else 0

    def context_text(self, used: int | None) -> str:
        """Use of the context, as text."""
        known = (str(number) if number is not None else "unknown" for number in (used, self.partner.context))
        return " of ".join(known)

    def answer(self, asked: Conversation) -> None:
        """Answers the last message of `asked`, and keeps both if an answer came, finished or not."""
        prompt = self.partner.prompt(asked.all_messages)
        params = self._params(asked, prompt.tokens)
        text, tokens, thinking, last = "", list[Mapping[str, Any]](), False, None
        with (
            catch_interrupt(signals=[signal.SIGINT]) as interrupted,
            self.screen.answer() as write,
            contextlib.closing(self.screen.activity()) as activity,
        ):

            def progress(done: int, total: int) -> None:
                if interrupted():
                    raise KeyboardInterrupt
                activity.read(done, total)

            try:
                self.answers += 1
                for last in self.partner.answer(prompt, params, progress):
                    activity.close()
                    if last.reasoning or (thinking and last.text):
                        self.screen.thought(last.reasoning or "\n\n")
                    thinking = bool(last.reasoning) or (thinking and not last.text)
                    text += last.text
                    tokens += last.tokens
                    write(last.text)
                    if interrupted():
                        break
            except KeyboardInterrupt:
                pass
        if last is None or not (text or last.finish_reason):
            self.screen.note("stopped before the answer began; your message was taken back")
            return
        self.conversation = asked.answered(text)
        self.answered = Answered(last, tuple(tokens))
        self._counted = self.conversation, self.answered.used if last.prompt_tokens else None
        if self.screen.as_json:
            print_json(_answer_object(text, self.answered, params))
        else:
            self.screen.note(self._account(last, params))

    def _status(self) -> str:
        """The status line below the input: use of the context, branch and model."""
        if self._counted[0] != self.conversation:
            used = None
            with contextlib.suppress(LlamaJaxError):
                used = self.tokens_used(self.conversation)
            self._counted = self.conversation, used
        used, context, branches = self._counted[1], self.partner.context, self.conversation.branches
        parts = []
        if used is not None and context is not None:
            parts.append(f"[{meter(used / context, _METER)}] {used} of {context} tokens")
        elif used is not None:
            parts.append(f"{used} tokens")
        if self.answered and self.answered.last.cached_tokens:
            parts.append(f"{self.answered.last.cached_tokens} were cached")
        if len(branches) > 1:
            at = self.conversation.branch
            parts.append(f"within {len(branches)} branches" if at is None else f"branch {at + 1} of {len(branches)}")
        return " " + "  ".join([*parts, self.partner.name])

    def _params(self, asked: Conversation, used: int | None) -> SamplingParams:
        """The sampling parameters of the next answer, which may fill the rest of the context.

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

    def _account(self, last: Piece, params: SamplingParams) -> str:
        """One line about an answer: speed, tokens, context and an unusual end."""
        context = self.partner.context
        used = last.prompt_tokens + last.generation_tokens
        cached = f", {last.cached_tokens} cached" if last.cached_tokens else f", {last.prompt_tps:.0f} tok/s"
        rate = f"{last.generation_tps:.1f} tok/s" if last.generation_tokens > 1 else f"{last.ttft_s:.2f} s"
        end = ""
        if last.finish_reason is None:
            end = "stopped"
        elif last.finish_reason == "error":
            end = "ended: the model's next logits were not finite"
        elif last.finish_reason == "length":
            full = context is not None and used >= context
            end = "context full: /trim or /clear" if full else f"max_tokens={params.max_tokens} reached"
        if self.screen.columns < NARROW:
            parts = [rate, f"{last.prompt_tokens}+{last.generation_tokens}" + (f"/{context}" if context else ""), end]
        else:
            parts = [
                f"{last.generation_tokens} tokens, {rate}",
                f"prompt {last.prompt_tokens} tokens{cached}, first after {last.ttft_s:.2f} s",
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


def _answer_object(text: str, answered: Answered, params: SamplingParams) -> dict[str, Any]:
    last = answered.last
    return {
        "role": "assistant",
        "content": text,
        "finish_reason": last.finish_reason or "interrupted",
        "prompt_tokens": last.prompt_tokens,
        "cached_tokens": last.cached_tokens,
        "generation_tokens": last.generation_tokens,
        "ttft_ms": round(last.ttft_s * 1000, 3),
        "prompt_tps": round(last.prompt_tps, 3),
        "generation_tps": round(last.generation_tps, 3),
    } | ({} if params.logprobs is None else {"logprobs": {"content": list(answered.tokens)}})
