"""The default model against Hugging Face transformers, which read the dequantised weights of the same GGUF file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.generation import batch_generate
from llama_jax.generation.llm import LLM
from llama_jax.model import forward
from llama_jax.model.loaded import Model
from llama_jax.model.quantization import dequantize_params, quantize
from llama_jax.params import flatten
from llama_jax.sampling import SamplingParams
from llama_jax.text.chat import encode_chat, render_chat
from llama_jax.text.tokenizer import Tokenizer

Loaded = tuple[Model, Tokenizer]
ENTRIES = json.loads((Path(__file__).parent / "data" / "goldens" / "smollm2-135m-instruct.json").read_text())
NAMES = [entry.get("prompt") or entry["messages"][-1]["content"] for entry in ENTRIES]
PADDED = 48  # one shape for all prompts
SIZES: Any = {"rows": len(ENTRIES), "decode_rows": (len(ENTRIES),), "context": 256}
"""Of engines with this model, which thus have the same programs."""

_forward = jax.jit(forward, static_argnames="config")


def padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions int32 [prompts, PADDED]."""
    tokens = np.zeros((len(prompts), PADDED), np.int32)
    positions = np.full_like(tokens, -1)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
        positions[row, : len(ids)] = np.arange(len(ids))
    return tokens, positions


def ids_of(loaded: Loaded, prompts: list[Any], params: list[SamplingParams]) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in batch_generate(*loaded, prompts, params)]


@pytest.mark.parametrize("entry", ENTRIES, ids=NAMES)
def test_token_ids_and_chat_text(smollm2: Loaded, entry: dict[str, Any]) -> None:
    _, tokenizer = smollm2
    if "prompt" in entry:
        assert tokenizer.encode(entry["prompt"]) == entry["ids"]
        assert tokenizer.decode(entry["ids"]) == entry["prompt"]
    else:
        template, names = tokenizer.chat_templates["default"], tokenizer.special_tokens_map
        assert render_chat(entry["messages"], template, special_tokens=names) == entry["text"]
        assert encode_chat(tokenizer, entry["messages"]) == entry["ids"]
        assert tokenizer.encode(entry["text"]) == entry["ids"]
    assert tokenizer.decode(entry["greedy"], skip_special_tokens=False) == entry["greedy_text"]


@pytest.fixture(scope="module")
def logits(smollm2: Loaded) -> np.ndarray:
    """float32 [entries, PADDED, vocab], of all prompts in one right-padded batch."""
    model, _ = smollm2
    out, _ = _forward(model.params, model.config, *padded([entry["ids"] for entry in ENTRIES]))
    return np.asarray(out)


@pytest.mark.parametrize("row", range(len(ENTRIES)), ids=NAMES)
def test_logits_and_likelihood(logits: np.ndarray, row: int) -> None:
    entry = ENTRIES[row]
    ids = np.asarray(entry["ids"])
    own = logits[row, : len(ids)]
    best = np.argsort(-own[-1], kind="stable")[:20]
    assert best.tolist() == entry["top_ids"]
    np.testing.assert_allclose(own[-1][best], entry["top_logits"], atol=1e-3)
    logprobs = np.asarray(jax.nn.log_softmax(own[:-1].astype(np.float32)))
    assert -logprobs[np.arange(len(ids) - 1), ids[1:]].mean() == pytest.approx(entry["nll"], abs=1e-4)


@pytest.mark.slow
def test_greedy_tokens(smollm2: Loaded) -> None:
    """All prompts as one batch, with the cache: token for token; the first one as a stream, too."""
    llm = LLM(*smollm2, **SIZES)
    outputs = llm.generate([entry["ids"] for entry in ENTRIES], SamplingParams(temperature=0.0, max_tokens=48))
    for entry, output in zip(ENTRIES, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == entry["greedy"]
        assert output.text == entry["greedy_text"].removesuffix("<|im_end|>")
        assert output.outputs[0].finish_reason == ("length" if len(entry["greedy"]) == 48 else "stop")
    entry, params = ENTRIES[0], SamplingParams(temperature=0.0, max_tokens=48)
    steps = list(llm.stream(entry["prompt"], params))
    assert [step.token for step in steps] == entry["greedy"]
    assert "".join(step.text for step in steps) == entry["greedy_text"].removesuffix("<|im_end|>")
    (cut,) = llm.generate([entry["prompt"]], dataclasses.replace(params, stop=["\n"]))
    assert cut.text == " Paris."


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_batch(smollm2: Loaded) -> None:
    """The same rows in batches of 2 and 7, permuted: identical ids."""
    prompts = [*(entry["ids"] for entry in ENTRIES), "日本の首都は", "x = [", "🙂"]
    params = [SamplingParams(seed=i, temperature=0.9, top_p=0.95, max_tokens=10) for i in range(8)]
    params[3] = dataclasses.replace(params[3], temperature=0.0)
    rng = np.random.default_rng(1)
    whole = ids_of(smollm2, prompts, params)
    assert len(set(whole)) == 8
    for size in (2, 7):
        rows = rng.permutation(8)[:size].tolist()
        got = ids_of(smollm2, [prompts[i] for i in rows], [params[i] for i in rows])
        assert got == [whole[i] for i in rows], rows


@pytest.mark.slow
def test_bfloat16(smollm2: Loaded) -> None:
    """Not the same numbers, but the same answer."""
    model, tokenizer = smollm2
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    text = list(ENTRIES[0]["ids"])
    for _ in range(2):
        logits, _ = _forward(params, model.config, *padded([text]))
        text.append(int(logits[0, len(text) - 1].argmax()))
    assert tokenizer.decode(text[-2:]) == " Paris."


@pytest.mark.slow
def test_rounded_to_its_own_grid(smollm2: Loaded) -> None:
    """The file is in Q4_1 and Q8_0: int4 in groups of 32 with minima, and int8 in such groups, are exactly it."""
    model, _ = smollm2
    small = quantize(model, "int4", group=32, lm_head="int8_g32")
    decoded, _ = dequantize_params(small.params, small.config, jnp.float32)
    for name, leaf in flatten(decoded).items():
        np.testing.assert_array_equal(leaf, flatten(model.params)[name], err_msg=name)
    other = quantize(model, "int4", group=64)
    decoded, _ = dequantize_params(other.params, other.config, jnp.float32)
    assert (
        flatten(decoded)["layers.0.mlp.down_proj.weight"] != flatten(model.params)["layers.0.mlp.down_proj.weight"]
    ).any()
