"""A device model, a kernel backend, a model family, a logits processor, a tool parser and a route of the server from
outside of llama_jax."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from llama_jax.config.families import Family
from llama_jax.kernels.dispatch import Backend
from llama_jax.sampling import SamplingParams, token_mask
from llama_jax.server.operations import Operation, asked_model, read
from llama_jax.server.responses import json_response
from llama_jax.server.state import ServerState
from llama_jax.targets import Rates, Target
from llama_jax.text.tools import Arguments, Call, Delta, Text, Tool, ToolFormat

TARGET = Target(
    name="example-gpu",
    label="Example GPU",
    vendor="amd",
    arch="gfx942",
    compute_units=100,
    wave_size=64,
    lds_bytes=64 << 10,
    memory=64 << 30,
    bandwidth=2e12,
    rates=Rates(bf16=200e12),
)


def _add_rms_norm(x: jax.Array, delta: jax.Array, weight: jax.Array, *, eps: float) -> tuple[jax.Array, jax.Array]:
    """See `llama_jax.kernels.norm.add_rms_norm`."""
    total = x + delta
    wide = total.astype(jnp.float32)
    scale = jnp.sqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return total, (wide / scale).astype(x.dtype) * weight


def _unsupported(target: Target, x: Any, *args: Any, **kwargs: Any) -> str | None:
    return None if x.ndim > 1 else "it needs rows"


KERNELS = {"add_rms_norm": Backend(_add_rms_norm, _unsupported)}

# Llama's architecture with other defaults, and with other names in the files of weights.
FAMILY = Family(
    architecture="ExampleForCausalLM",
    defaults={"rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64},
    theta=10_000.0,
    tensor_names={
        "model.embed_tokens": "transformer.wte",
        "model.layers.{n}.input_layernorm": "transformer.h.{n}.norm_1",
        "model.layers.{n}.self_attn.q_proj": "transformer.h.{n}.attn.q",
        "model.layers.{n}.self_attn.k_proj": "transformer.h.{n}.attn.k",
        "model.layers.{n}.self_attn.v_proj": "transformer.h.{n}.attn.v",
        "model.layers.{n}.self_attn.o_proj": "transformer.h.{n}.attn.out",
        "model.layers.{n}.post_attention_layernorm": "transformer.h.{n}.norm_2",
        "model.norm": "transformer.norm",
    },
)


class NoRepeats:
    """A logits processor: no token may follow itself, at the start that of the prompt's end."""

    ended = False
    error = None

    def __init__(self, tokenizer: Any, prompt: Sequence[int], params: SamplingParams):
        self._last = prompt[-1]

    def mask(self, out: np.ndarray) -> None:
        token_mask.forbid(out, self._last)

    def accept(self, token: int) -> None:
        self._last = token


class NameAndBraces:
    """A tool parser: an answer that is @name{...} as a whole is a call."""

    def __init__(self, names: Collection[str]):
        self._names, self._text = names, ""

    def feed(self, text: str) -> list[Delta]:
        self._text += text
        return []

    def finish(self) -> list[Delta]:
        found = re.fullmatch(r"@(\w+)(\{.*\})", self._text, re.DOTALL)
        if found and found[1] in self._names:
            return [Call(found[1]), Arguments(found[2])]
        return [Text(self._text)]


def _grammar(tools: Sequence[Tool], several: bool, spelled: Any) -> str:
    names = " | ".join(f'"@{tool.name}"' for tool in tools)
    return f'start: ({names}) arguments\narguments: %json {{"type": "object"}}\n'


TOOLS = ToolFormat(lambda template: "@name{" in template, NameAndBraces, _grammar)


class LengthBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /example/length."""

    text: str
    model: str | None = None


class LengthAnswer(msgspec.Struct):
    """Its answer."""

    characters: int
    tokens: int


async def _length(server: ServerState, request: Request) -> Response:
    body = await read(server, request, LengthBody)
    async with asked_model(server, request, body.model) as served:
        count = len(served.tokenizer.encode(body.text))
    return json_response(LengthAnswer(len(body.text), count))


LENGTH = Operation("POST", "/example/length", "The length of a text", _length, LengthBody, LengthAnswer)
