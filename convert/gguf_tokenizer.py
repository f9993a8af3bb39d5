"""The tokenizer inside a GGUF file, as the files that a Hugging Face folder would hold.

A GGUF file stores vocabulary, merges, token types and the ids of named tokens; how text is split before merging it says
only by a name, "tokenizer.ggml.pre". The splits below are those of transformers' own GGUF reader, so that the ids equal
its ids. Key names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.convert.gguf_config import NO_ID
from llama_jax.convert.meta_tokenizer import LLAMA3_SPLIT
from llama_jax.errors import TokenizerError, UnsupportedModel
from llama_jax.text.tokenizer.byte_level_bpe import (
    CONTRACTIONS,
    PUNCTUATION_AND_SPACE,
    pre_tokenizer,
    tokenizer_json,
)
from llama_jax.text.tokenizer.detokenizer import byte_alphabet
from llama_jax.text.tokenizer.sentencepiece_bpe import (
    PieceType,
    added_tokens,
    bpe_tokenizer_json,
    mergeable,
    merges_by_score,
)

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}"

_QWEN2 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{PUNCTUATION_AND_SPACE}"
_PUNCTUATION_AND_SLASH = PUNCTUATION_AND_SPACE.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_TEKKEN = rf"{_CASED.replace('{0}', '')}|\p{{N}}|{_PUNCTUATION_AND_SLASH}"
_LLAMA4 = rf"{_CASED.replace('{0}', CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{_PUNCTUATION_AND_SLASH}"

_SPLITS: Mapping[str, str | None] = {
    # None is GPT-2's split. SmolLM's own tokenizer also sets every digit apart; transformers' GGUF reader does not,
    # which shows where two or more spaces stand before a digit, and beside digits beyond 0 to 9.
    "gpt-2": None,
    "smollm": None,
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "falcon3", "pixtral", "dbrx"), LLAMA3_SPLIT),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("llama4", "gpt-4o"), _LLAMA4),
}
_DIGITS_APART = ("starcoder", "refact", "command-r")
"""GPT-2's split after setting every digit apart, as these models' own tokenizer.json does."""

NAMED_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
"""Named tokens, and where their ids stand below "tokenizer.ggml."."""
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
        tokens = _spell_bytes(tokens)
        content = _byte_level(metadata, tokens, types)
    elif kind == "llama":
        content = _sentencepiece(metadata, tokens, types)
    else:
        raise UnsupportedModel(
            f"the GGUF tokenizer {kind!r} (tokenizer.ggml.model) is not supported", hint='"gpt2" and "llama" are'
        )
    config: dict[str, Any] = {}
    for name, key in NAMED_IDS.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}")
        if token_id is not None and token_id not in NO_ID:
            if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
                raise TokenizerError(
                    f"tokenizer.ggml.{key} is {token_id!r}, the vocabulary has {len(tokens)} tokens", hint=_DAMAGED
                )
            config[name] = tokens[token_id]
    # llama.cpp adds BOS to a SentencePiece vocabulary that does not say otherwise.
    config["add_bos_token"] = bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"))
    config["add_eos_token"] = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
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


def _strings(metadata: Mapping[str, object], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        raise TokenizerError(f"{key} is missing or empty", hint=_DAMAGED)
    if not all(isinstance(item, str) for item in value):
        raise TokenizerError(f"{key} holds something that is no string", hint=_DAMAGED)
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


def _spell_bytes(tokens: Sequence[str]) -> list[str]:
    """Tokens in the byte alphabet; those written in other characters (added by converters) are spelled out in it."""
    alphabet = byte_alphabet()
    letter = {byte: char for char, byte in alphabet.items()}
    return [
        token if alphabet.keys() >= set(token) else "".join(letter[byte] for byte in token.encode()) for token in tokens
    ]


def _merges(metadata: Mapping[str, object]) -> list[tuple[str, str]]:
    pairs = []
    for merge in _strings(metadata, "tokenizer.ggml.merges"):
        left, separator, right = merge.partition(" ")
        if not (left and separator and right) or " " in right:
            raise TokenizerError(
                f"tokenizer.ggml.merges holds {merge!r:.80}, which is no pair", hint="the GGUF file is damaged"
            )
        pairs.append((left, right))
    return pairs


def _byte_level(metadata: Mapping[str, object], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    """A byte-level BPE (Radford et al. 2019)."""
    vocab = {token: i for i, token in enumerate(tokens)}
    original = _strings(metadata, "tokenizer.ggml.tokens")
    # A control token, or a user's, that had to be respelled never matches text; transformers leaves such tokens out.
    added = [
        token
        for token in added_tokens(tokens, types)
        if types[token["id"]] != PieceType.UNKNOWN and original[token["id"]] == token["content"]
    ]
    return tokenizer_json(
        vocab, _merges(metadata), added=added, pre_tokenizer=_pre_tokenizer(metadata.get("tokenizer.ggml.pre"))
    )


def _pre_tokenizer(name: object) -> dict[str, Any]:
    """How text is split before merging, for a value of tokenizer.ggml.pre."""
    if name in _DIGITS_APART:
        digits = {"type": "Digits", "individual_digits": True}
        return {"type": "Sequence", "pretokenizers": [digits, pre_tokenizer(None)]}
    if not isinstance(name, str) or name not in _SPLITS:
        raise UnsupportedModel(
            f"the GGUF pre-tokenizer {name!r} (tokenizer.ggml.pre) is not known",
            hint="convert the model's Hugging Face folder instead; its tokenizer.json says how to split text",
        )
    return pre_tokenizer(_SPLITS[name])


def pre_tokenizer_name(content: Mapping[str, Any] | None) -> str | None:
    """The value of tokenizer.ggml.pre that stands for a tokenizer.json's "pre_tokenizer"; None if there is none."""
    wanted = _without_offsets(content)
    names = (*_SPLITS, *_DIGITS_APART)
    return next((name for name in names if _without_offsets(_pre_tokenizer(name)) == wanted), None)


def _without_offsets(content: Any) -> Any:
    """Drops what says only which characters a token counts as its own."""
    if isinstance(content, Mapping):
        return {key: _without_offsets(value) for key, value in content.items() if key != "trim_offsets"}
    return [_without_offsets(item) for item in content] if isinstance(content, list) else content


def _sentencepiece(metadata: Mapping[str, object], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    """A SentencePiece BPE with byte fallback."""
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
        add_prefix_space=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
    )


def _templates(metadata: Mapping[str, object]) -> dict[str, str]:
    """Chat templates by name; that of the default one is empty."""
    key = "tokenizer.chat_template"
    return {
        name.removeprefix(key).removeprefix("."): value
        for name, value in metadata.items()
        if isinstance(value, str) and (name == key or name.startswith(f"{key}."))
    }
