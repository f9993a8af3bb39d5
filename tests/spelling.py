"""A tiny random model that spells: its tokens are printable characters, a few bytes, and a few longer pieces."""

from __future__ import annotations

import functools

import tokenizers
from engines import small_settings
from helpers import random_params, tiny_config

from llama_jax.generation.llm import LLM
from llama_jax.model.loaded import Model
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tokenizer.detokenizer import byte_alphabet

BOS, EOS, END = 0, 1, 2
"""Ids; both of the latter end a text."""

_PIECES = ["ab", "tr", "ue", "true", '":', '{"', "fa", "se", "lse", "false", "00", "é", ',"']


@functools.cache
def spelling_tokenizer() -> Tokenizer:
    """Byte-level, 114 tokens."""
    char_of = {byte: char for char, byte in byte_alphabet().items()}

    def spelt(text: str) -> str:
        return "".join(char_of[byte] for byte in text.encode())

    characters = [spelt(chr(code)) for code in range(32, 127)] + [*spelt("é"), spelt("\n")]
    pieces = [spelt(piece) for piece in _PIECES]
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<end>", *characters, *pieces])}
    merges = [
        next((piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab)
        for piece in pieces
    ]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<end>"])
    return Tokenizer(backend, special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"})


@functools.cache
def spelling_model(seed: int = 0) -> Model:
    """With more rows than the tokenizer has tokens, as many models have."""
    config = tiny_config(vocab_size=120, max_position_embeddings=256, eos_token_ids=(EOS, END))
    return Model(random_params(config, seed), config, name=f"spelling {seed}")


def spelling_llm(**changes: object) -> LLM:
    """Four rows of up to 256 tokens."""
    sizes = {"rows": 4, "decode_rows": (1, 4), "context": 256, "pages": 64}
    return LLM(spelling_model(), spelling_tokenizer(), settings=small_settings(**sizes | changes))
