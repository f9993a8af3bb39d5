"""Translation of bodies into engine requests: sampling parameters and token ids. Slow for long prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_jax.batch_file.openai_endpoints import NO_EFFECT, Chat, Completions
from llama_jax.batch_file.request import sampling_fields
from llama_jax.errors import RequestError
from llama_jax.generation import encode_prompt
from llama_jax.sampling import Grammar, SamplingParams
from llama_jax.server.bodies import ChatBody, CompletionBody, given
from llama_jax.server.conversations import text_messages
from llama_jax.server.errors import Refused
from llama_jax.server.fields import EFFORTS
from llama_jax.server.reading import ChatReader
from llama_jax.server.served import Served
from llama_jax.server.settings import Limits
from llama_jax.server.tooling import Offer, form_of, offer_of, reader_of, shows_control, template_variables
from llama_jax.text.chat import encode_chat, render_chat, select_template
from llama_jax.text.tools import place_of

_TAIL = 16
"""Tokens at a prompt's end that tell whether the answer begins within reasoning."""

_SHRINKING = 4
"""Factor by which normalisation may shorten a text before tokenization: 3 for Unicode's NFC."""


@dataclass(frozen=True)
class Asked:
    """A translated request of a client.

    Attributes:
      endpoint: shape of the choices; prompts: token ids of each.
      reader: makes the reader of a chat's answer.
      streamed: whether the answer is streamed; usage: whether a stream ends with the token counts; continuous: whether
        every chunk has those so far.
      ignored: given fields without effect; a header of the answer names them.
    """

    endpoint: Chat | Completions
    prompts: tuple[list[int], ...]
    params: SamplingParams
    reader: Callable[[], ChatReader] = ChatReader
    streamed: bool = False
    usage: bool = False
    continuous: bool = False
    ignored: tuple[str, ...] = ()


def asked(served: Served, body: ChatBody | CompletionBody) -> Asked:
    """Translate a body.

    Raises:
      RequestError, Refused: a value is out of range, or too long for the model; names the field.
      TemplateError, TokenizerError: the messages or the prompt cannot be encoded.
    """
    fields = given(body)
    streamed, options = fields.pop("stream", False), fields.pop("stream_options", None)
    if options is not None and not streamed:
        raise RequestError("stream_options without stream", param="stream_options", hint='give "stream": true')
    ignored = tuple(name for name in fields if name in NO_EFFECT and name != "model")
    _check_limits(fields, served.settings.limits)
    if (count := len(fields.get("logit_bias", ()))) > (most := served.engine.settings.biases):
        raise _too_many("logit_bias", count, most, "biases")
    limited = not fields.keys().isdisjoint({"max_tokens", "max_completion_tokens"})
    made = _chat(served, fields) if isinstance(body, ChatBody) else _completions(served, fields)
    params = _within(served, max(map(len, made.prompts)), made.params, limited=limited)
    if streamed and params.prompt_logprobs is not None:
        raise RequestError("a stream cannot echo logprobs", param="echo", hint="leave out stream, echo or logprobs")
    usage = options is not None and options.include_usage
    return dataclasses.replace(
        made,
        params=params,
        streamed=streamed,
        usage=usage,
        continuous=usage and options.continuous_usage_stats,
        ignored=(*ignored, *made.ignored),
    )


def chat_ids(served: Served, fields: Mapping[str, Any], offer: Offer, **options: Any) -> list[int]:
    """Return the token ids of a conversation.

    Args:
      fields: of the request: messages, chat_template_kwargs; options: of `encode_chat`.

    Raises:
      RequestError, TemplateError, TokenizerError: they cannot be encoded.
    """
    variables = template_variables(served, fields.get("chat_template_kwargs", {}))
    messages = text_messages(fields["messages"])
    _check_size(served, (text for message in messages if isinstance(text := message.get("content"), str)))
    return encode_chat(served.tokenizer, messages, tools=offer.shown, **variables, **options)


def chat_text(served: Served, fields: Mapping[str, Any], offer: Offer, **options: Any) -> str:
    """Return a conversation rendered by the chat template, for people: control tokens spelled out in a message look
    like the template's own. Arguments and errors are those of `chat_ids`."""
    variables = template_variables(served, fields.get("chat_template_kwargs", {}))
    template = select_template(served.tokenizer.chat_templates, None, has_tools=offer.shown is not None)
    messages, names = text_messages(fields["messages"]), served.tokenizer.special_tokens_map
    return render_chat(messages, template, special_tokens=names, tools=offer.shown, **variables, **options)


def _chat(served: Served, fields: dict[str, Any]) -> Asked:
    offer, effort = offer_of(served, fields), fields.pop("reasoning_effort", None)
    conversation: dict[str, Any] = {
        name: fields.pop(name) for name in ("messages", "chat_template_kwargs") if name in fields
    }
    loose = list[str]()
    if effort is not None:
        conversation["chat_template_kwargs"] = _thinking(effort) | conversation.get("chat_template_kwargs", {})
        loose += [] if served.switches_reasoning else ["reasoning_effort"]
    endpoint, ours = Chat.of(fields)
    params = SamplingParams(**{"max_tokens": None} | sampling_fields(ours))
    params.check_generates("an answer")
    prompt = chat_ids(served, conversation, offer)
    place = place_of(served.reasoning, served.tokenizer.decode(prompt[-_TAIL:], skip_special_tokens=False))
    assert params.response_format is None or isinstance(params.response_format, Grammar)
    form, place = form_of(served, offer, params.response_format, place)
    shown = params.skip_special_tokens and not shows_control(served, offer)
    params = dataclasses.replace(params, response_format=form, skip_special_tokens=shown)
    loose += ["tools.function.strict"] if offer.strict and form is None else []
    return Asked(endpoint, (prompt,), params, lambda: reader_of(served, offer, place), ignored=tuple(loose))


def _thinking(effort: Any) -> dict[str, bool]:
    """Template variables for an effort: models reason or do not, but not more or less."""
    if effort not in EFFORTS:
        hint = f"one of {', '.join(EFFORTS)}"
        raise RequestError(f"there is no reasoning effort {effort!r:.100}", param="reasoning_effort", hint=hint)
    return {"enable_thinking": effort != "none"}


def _completions(served: Served, fields: dict[str, Any]) -> Asked:
    if fields.pop("best_of", None) not in (None, fields.get("n", 1)):
        raise RequestError("best_of differs from n", param="best_of", hint="leave it out")
    endpoint, ours = Completions.of(fields)
    params = SamplingParams(**sampling_fields(ours))
    if not endpoint.echo:
        params.check_generates("an answer")
    prompts = endpoint.prompts(ours, params)
    assert isinstance(prompts, Sequence)
    if len(prompts) > served.settings.limits.prompts:
        raise _too_many("prompt", len(prompts), served.settings.limits.prompts, "prompts")
    for prompt in prompts:
        if isinstance(prompt, str):
            _check_size(served, [prompt])
    return Asked(endpoint, tuple(encode_prompt(served.tokenizer, prompt) for prompt in prompts), params)


def _check_limits(fields: Mapping[str, Any], limits: Limits) -> None:
    if fields.get("n", 1) > limits.n:
        raise _too_many("n", fields["n"], limits.n, "continuations")
    if (temperature := fields.get("temperature", 0)) > limits.temperature:
        raise RequestError(f"temperature is {temperature}", param="temperature", hint=f"at most {limits.temperature}")
    stop = fields.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if len(stops) > limits.stops:
        raise _too_many("stop", len(stops), limits.stops, "stop strings")
    if any(len(text) > limits.stop_chars for text in stops):
        raise RequestError(
            f"a stop string of more than {limits.stop_chars} characters", param="stop", hint="shorten it"
        )


def _check_size(served: Served, texts: Iterable[str]) -> None:
    """Refuses a prompt with too many characters: encoding megabytes takes seconds."""
    size = sum(map(len, texts))
    if size <= _SHRINKING * served.capacity:
        return
    least = size // (_SHRINKING * served.tokenizer.most_bytes)
    if least > served.capacity:
        raise Refused(
            400,
            f"at least {least} tokens of the prompt; with new ones they may be {served.capacity}",
            code="context_length_exceeded",
            param="prompt",
            hint="shorten the prompt",
        )


def _too_many(param: str, count: int, most: int, what: str) -> RequestError:
    return RequestError(f"{count} {what}; there may be {most}", param=param, hint="send several requests")


def _within(served: Served, longest: int, params: SamplingParams, *, limited: bool) -> SamplingParams:
    """The parameters with a limit that fits after the longest prompt."""
    room = served.capacity - longest
    wanted = params.max_tokens or 0 if limited or params.max_tokens == 0 else 1
    if wanted > room:
        raise Refused(
            400,
            f"{longest} tokens of the prompt and {wanted} new ones; together they may be {served.capacity}",
            code="context_length_exceeded",
            param="max_tokens" if limited and room > 0 else "prompt",
            hint="shorten the prompt, or ask for fewer tokens",
        )
    if limited or params.max_tokens == 0:
        return params
    return dataclasses.replace(params, max_tokens=min(room, params.max_tokens or room))
