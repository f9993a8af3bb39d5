"""Operations of the tokenizer and the chat template, which need no engine."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llama_jax.errors import RequestError
from llama_jax.generation import encode_prompt
from llama_jax.server.answers import CountAnswer, TextAnswer, TokenizerAnswer, TokensAnswer
from llama_jax.server.apis.anthropic import CountBody, chat_of
from llama_jax.server.asking import chat_ids, chat_text
from llama_jax.server.bodies import ChatBody, DetokenizeBody, TemplateBody, TokenizeBody, given
from llama_jax.server.operations import Operation, asked_model, read
from llama_jax.server.responses import json_response
from llama_jax.server.served import Served
from llama_jax.server.state import ServerState
from llama_jax.server.tooling import Offer, offer_of


async def _tokenize(server: ServerState, request: Request) -> Response:
    body = await read(server, request, TokenizeBody)
    async with asked_model(server, request, body.model) as served:
        ids = await asyncio.to_thread(_ids, served, body)
        return json_response(TokensAnswer(ids, len(ids), served.capacity))


def _ids(served: Served, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give one of prompt and messages", param="prompt", hint='e.g. {"prompt": "Hello"}')
    if body.messages is not None:
        fields, offer = _told(served, body)
        return chat_ids(served, fields, offer, add_generation_prompt=body.add_generation_prompt)
    if body.prompt and body.add_special_tokens:
        return encode_prompt(served.tokenizer, body.prompt)
    return served.tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)


async def _detokenize(server: ServerState, request: Request) -> Response:
    body = await read(server, request, DetokenizeBody)
    async with asked_model(server, request, body.model) as served:
        text = await asyncio.to_thread(served.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return json_response(TextAnswer(text))


async def _apply_template(server: ServerState, request: Request) -> Response:
    body = await read(server, request, TemplateBody)

    def text(served: Served) -> str:
        fields, offer = _told(served, body)
        return chat_text(served, fields, offer, add_generation_prompt=body.add_generation_prompt)

    async with asked_model(server, request, body.model) as served:
        return json_response(TextAnswer(await asyncio.to_thread(text, served)))


async def _count(server: ServerState, request: Request) -> Response:
    body = await read(server, request, CountBody)
    async with asked_model(server, request, body.model) as served:
        ids = await asyncio.to_thread(lambda: chat_ids(served, *_told(served, chat_of(body))))
    return json_response(CountAnswer(len(ids)))


async def _info(server: ServerState, request: Request) -> Response:
    async with asked_model(server, request, request.query_params.get("model")) as served:
        tokenizer, capacity = served.tokenizer, served.capacity
    named = {
        name: tokenizer.special_tokens_map.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
    return json_response(
        TokenizerAnswer(
            tokenizer_class=type(tokenizer).__name__,
            vocab_size=tokenizer.vocab_size,
            model_max_length=capacity,
            chat_template=tokenizer.chat_template,
            chat_templates=tokenizer.chat_templates,
            **named,
        )
    )


def _told(served: Served, body: ChatBody | TokenizeBody | TemplateBody) -> tuple[dict[str, Any], Offer]:
    """The fields passed to a chat template, and the tools among them."""
    fields = given(body)
    return fields, offer_of(served, fields)


OPERATIONS = (
    Operation("POST", "/v1/messages/count_tokens", "Count the tokens of messages", _count, CountBody, CountAnswer),
    Operation("POST", "/tokenize", "Text or messages to token ids", _tokenize, TokenizeBody, TokensAnswer),
    Operation("POST", "/detokenize", "Token ids to text", _detokenize, DetokenizeBody, TextAnswer),
    Operation("POST", "/apply-template", "Messages to the prompt's text", _apply_template, TemplateBody, TextAnswer),
    Operation("GET", "/tokenizer_info", "Control tokens and chat templates", _info, answer=TokenizerAnswer),
)
