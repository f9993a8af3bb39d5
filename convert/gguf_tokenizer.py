"""The tokenizer inside a GGUF file, as the files that a Hugging Face folder would hold.

A GGUF file stores vocabulary, merges, token types and the ids of named tokens; how text is split before merging it says
only by a name, "tokenizer.ggml.pre" (`gguf_pre_tokenizers`). The rules are llama.cpp's, which these files are made for.
Key names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.convert.gguf_config import NO_ID
from llama_jax.convert.gguf_pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from llama_jax.errors import TokenizerError, UnsupportedModel
from llama_jax.text.tokenizer.byte_level_bpe import around, tokenizer_json
from llama_jax.text.tokenizer.detokenizer import byte_alphabet
from llama_jax.text.tokenizer.sentencepiece_bpe import (
    PieceType,
    added_tokens,
    bpe_tokenizer_json,
    mergeable,
    merges_by_score,
)

NAMED_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
"""Named tokens, and the keys of their ids below "tokenizer.ggml."."""
NO_TOKENIZER = "none"
"""The value of tokenizer.ggml.model in files that hold weights only."""
_DAMAGED = "the GGUF file is damaged; fetch it again"


def tokenizer_files(metadata: Mapping[str, object]) -> dict[str, str]:
    """Make the tokenizer files of a Hugging Face folder out of a GGUF file's metadata.

    Args:
      metadata: GGUF key -> value, as Python values.

    Returns:
      File name -> content: tokenizer.json, tokenizer_config.json and, if there is a template, chat_template.jinja.
      Nothing for a file that says that it has no tokenizer.

    Raises:
      TokenizerError: a key is missing or its value malformed; the message names it.
      UnsupportedModel: the kind of tokenizer or of pre-tokenizer is unknown; the message names it.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise TokenizerError(
            "the GGUF file has no tokenizer (tokenizer.ggml.model is missing)", hint="use a file with a tokenizer"
        )
    if kind == NO_TOKENIZER:
        return {}
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    types = _token_types(metadata, len(tokens))
    if kind == "gpt2":
        tokens, pre = _spell_bytes(tokens, types), _pre_tokenizer(metadata.get("tokenizer.ggml.pre"))
        content, adds_bos = _byte_level(metadata, tokens, types, pre), pre.adds_bos
    elif kind == "llama":
        content, adds_bos = _sentencepiece(metadata, tokens, types), True
    else:
        raise UnsupportedModel(
            f"the GGUF tokenizer {kind!r} (tokenizer.ggml.model) is not supported", hint='"gpt2" and "llama" are'
        )
    ids = _named_ids(metadata, len(tokens))
    config: dict[str, Any] = {name: tokens[i] for name, i in ids.items()}

    def added(name: str, default: bool) -> str | None:
        return config.get(f"{name}_token") if metadata.get(f"tokenizer.ggml.add_{name}_token", default) else None

    named = {tokens[i]: i for i in ids.values()}
    content["post_processor"] = around(added("bos", adds_bos), added("eos", False), named)
    config["clean_up_tokenization_spaces"] = False
    templates = _templates(metadata)
    default = {"chat_template.jinja": templates.pop("")} if "" in templates else {}
    if templates:
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    return {
        "tokenizer.json": json.dumps(content, ensure_ascii=False),
        **default,
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2),
    }


def _named_ids(metadata: Mapping[str, object], size: int) -> dict[str, int]:
    """Ids of named tokens, by the names of tokenizer_config.json."""
    found: dict[str, int] = {}
    for name, key in NAMED_IDS.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}")
        if token_id is None or token_id in NO_ID:
            continue
        if not isinstance(token_id, int) or not 0 <= token_id < size:
            raise TokenizerError(
                f"tokenizer.ggml.{key} is {token_id!r}, the vocabulary has {size} tokens", hint=_DAMAGED
            )
        found[name] = token_id
    return found


def _strings(metadata: Mapping[str, object], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        raise TokenizerError(f"{key} is missing or empty", hint=_DAMAGED)
    if not all(isinstance(item, str) for item in value):
        raise TokenizerError(f"{key} holds something that is not a string", hint=_DAMAGED)
    return list(value)


def _token_types(metadata: Mapping[str, object], count: int) -> list[int]:
    """The `PieceType` of every token."""
    value = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(value, Sequence) or len(value) != count:
        raise TokenizerError(
            f"tokenizer.ggml.token_type does not say the type of all {count} tokens",
            hint="without it control tokens cannot be told from text; use a newer GGUF file",
        )
    try:
        return [PieceType(item) for item in value]
    except ValueError as error:
        raise TokenizerError(f"tokenizer.ggml.token_type: {error}", hint="the GGUF file is damaged") from error


def _spell_bytes(tokens: Sequence[str], types: Sequence[int]) -> list[str]:
    """Tokens in the byte alphabet: normal ones that are written in other characters are spelled out in it. Tokens that
    are matched whole in a text are spelled as the text is."""
    alphabet = byte_alphabet()
    letter = {byte: char for char, byte in alphabet.items()}
    return [
        "".join(letter[byte] for byte in token.encode())
        if kind == PieceType.NORMAL and not alphabet.keys() >= set(token)
        else token
        for token, kind in zip(tokens, types, strict=True)
    ]


def _merges(metadata: Mapping[str, object]) -> list[tuple[str, str]]:
    pairs = []
    for merge in _strings(metadata, "tokenizer.ggml.merges"):
        left, separator, right = merge.partition(" ")
        if not (left and separator and right) or " " in right:
            raise TokenizerError(
                f"tokenizer.ggml.merges holds {merge!r:.80}, which is not a pair", hint="the GGUF file is damaged"
            )
        pairs.append((left, right))
    return pairs


def _byte_level(
    metadata: Mapping[str, object], tokens: Sequence[str], types: Sequence[int], pre: PreTokenizer
) -> dict[str, Any]:
    """A byte-level BPE (Radford et al. 2019)."""
    vocab = {token: i for i, token in enumerate(tokens)}
    added = [token for token in added_tokens(tokens, types) if types[token["id"]] != PieceType.UNKNOWN]
    return tokenizer_json(
        vocab, _merges(metadata), added=added, pre_tokenizer=pre.content, ignore_merges=pre.ignores_merges
    )


def _pre_tokenizer(name: object) -> PreTokenizer:
    """The pre-tokenizer, which splits text before merging, for a value of tokenizer.ggml.pre."""
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise UnsupportedModel(
            f"the GGUF pre-tokenizer {name!r} (tokenizer.ggml.pre) is not known",
            hint="convert the model's Hugging Face folder instead; its tokenizer.json says how to split text",
        )
    return PRE_TOKENIZERS[name]


def _sentencepiece(metadata: Mapping[str, object], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    """A SentencePiece BPE with byte fallback. llama.cpp puts a space before the text after every added token."""
    vocab = mergeable(tokens, types)
    if "tokenizer.ggml.merges" in metadata:
        merges = [pair for pair in _merges(metadata) if "".join(pair) in vocab]
    else:
        scores = metadata.get("tokenizer.ggml.scores")
        if not isinstance(scores, Sequence) or len(scores) != len(tokens):
            raise TokenizerError(
                f"tokenizer.ggml.scores does not hold a score for all {len(tokens)} tokens", hint=_DAMAGED
            )
        merges = merges_by_score(vocab, dict(zip(tokens, scores, strict=True)))
    return bpe_tokenizer_json(
        tokens,
        types,
        merges,
        unk_token=next((t for t, kind in zip(tokens, types, strict=True) if kind == PieceType.UNKNOWN), None),
        prefix="always" if metadata.get("tokenizer.ggml.add_space_prefix", True) else "never",
    )


def _templates(metadata: Mapping[str, object]) -> dict[str, str]:
    """Chat templates by name; that of the default one is empty."""
    key = "tokenizer.chat_template"
    return {
        name.removeprefix(key).removeprefix("."): value
        for name, value in metadata.items()
        if isinstance(value, str) and (name == key or name.startswith(f"{key}."))
    }
