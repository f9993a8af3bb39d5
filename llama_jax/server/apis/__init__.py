"""The supported APIs, each translated into OpenAI's chats and completions and back."""

from __future__ import annotations

from typing import Any

from llama_jax.server.answers import ChatAnswer, CompletionAnswer
from llama_jax.server.apis.anthropic import Messages
from llama_jax.server.apis.dialect import Dialect
from llama_jax.server.apis.openai import OpenAI
from llama_jax.server.apis.responses import Responses
from llama_jax.server.bodies import ChatBody, CompletionBody

DIALECTS: dict[str, Dialect[Any]] = {
    "/v1/chat/completions": OpenAI(ChatBody, ChatAnswer, "Answer a conversation"),
    "/v1/completions": OpenAI(CompletionBody, CompletionAnswer, "Continue texts"),
    "/v1/messages": Messages(),
    "/v1/responses": Responses(),
}
"""The APIs by route."""

__all__ = ["DIALECTS", "Dialect"]
