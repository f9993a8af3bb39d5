"""Llama 3's tokenizer.model as the files that a Hugging Face folder would hold.

It is a list of tokens in the format of tiktoken (https://github.com/openai/tiktoken, `load_tiktoken_bpe`): a line for
each, its bytes in base64 and its rank, which is its id. How text is split, and the control tokens, are in Meta's code:
https://github.com/meta-llama/llama-models, models/llama3/tokenizer.py.

tiktoken repeatedly joins the two neighbours whose union has the lowest rank. The equivalent list of merges has every
way to make a token out of two others, in the order of the token's rank.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping

from llama_jax.errors import TokenizerError
from llama_jax.text.tokenizer.byte_level_bpe import (
    CONTRACTIONS,
    PUNCTUATION_AND_SPACE,
    around,
    pre_tokenizer,
    split,
    tokenizer_json,
)
from llama_jax.text.tokenizer.detokenizer import byte_alphabet

LLAMA3_SPLIT = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{PUNCTUATION_AND_SPACE}"
"""Pattern that splits text before merging (`Tokenizer.pat_str`)."""
MAX_BYTES = 8 << 20
"""Llama 3's file has 2 MiB."""
_MAX_TOKEN_BYTES = 256
"""Llama 3's longest token, of spaces, has 128."""
SPECIAL_TOKENS = 256
"""Control tokens, behind the tokens of the file."""

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d{1,7}")
_NAMED: Mapping[bool, dict[int, str]] = {
    False: {6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>"},
    True: {
        4: "<|finetune_right_pad_id|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
    },
}
"""Place among the control tokens to name: of Llama 3, and of Llama 3.1 and later."""


def is_rank_file(data: bytes) -> bool:
    """Returns whether a tokenizer.model is such a list, not a message of SentencePiece."""
    return _LINE.fullmatch(data[: 2 * _MAX_TOKEN_BYTES].split(b"\n", 1)[0].rstrip()) is not None


def read_ranks(data: bytes, *, name: str) -> list[bytes]:
    """The tokens of the file in the order of their ids.

    Args:
      name: what to call the file in errors.

    Raises:
      TokenizerError: a line is malformed, ranks are not 0, 1, 2, ..., or a token or byte is missing or doubled.
    """
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            if not _LINE.fullmatch(line):
                raise ValueError
            token, rank = line.split()
            raw = base64.b64decode(token, validate=True)
            if not 0 < len(raw) <= _MAX_TOKEN_BYTES or int(rank) in tokens:
                raise ValueError
            tokens[int(rank)] = raw
        except (ValueError, binascii.Error) as e:
            raise TokenizerError(f"{name}: line {number} is not a token and its rank", hint=_AGAIN) from e
    ranked = [tokens[rank] for rank in sorted(tokens)]
    if tokens.keys() != set(range(len(tokens))):
        raise TokenizerError(f"{name}: the ranks of its {len(tokens)} tokens have gaps", hint=_AGAIN)
    if len(set(ranked)) != len(ranked) or not {bytes([b]) for b in range(256)} <= set(ranked):
        raise TokenizerError(f"{name}: a token stands twice, or one of the 256 bytes is missing", hint=_AGAIN)
    return ranked


_AGAIN = "the file is damaged; get it again"


def special_tokens(*, llama31: bool) -> list[str]:
    """The control tokens in the order of their ids, by the names of the published tokenizer.json files.

    Args:
      llama31: those of Llama 3.1 and later, not of Llama 3.
    """
    named = {0: "<|begin_of_text|>", 1: "<|end_of_text|>"} | _NAMED[llama31]
    reserved = iter(range(SPECIAL_TOKENS))
    return [named.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(SPECIAL_TOKENS)]


def tokenizer_files(ranked: list[bytes], *, llama31: bool, context: int) -> dict[str, str]:
    """The files of a Hugging Face folder.

    Args:
      ranked: what `read_ranks` gives.
      llama31: whether the control tokens are those of Llama 3.1 and later.
      context: the model's context length in tokens.

    Returns:
      File name to content: tokenizer.json, tokenizer_config.json and special_tokens_map.json. There is no chat
      template, since Meta's own is code; one that lies in the folder is copied like any other file.
    """
    letter = {byte: char for char, byte in byte_alphabet().items()}
    spelled = {token: "".join(letter[byte] for byte in token) for token in ranked}
    special = special_tokens(llama31=llama31)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = tokenizer_json(
        {spelled[token]: i for i, token in enumerate(ranked)},
        [(spelled[left], spelled[right]) for left, right in merges(ranked)],
        added=[{"id": len(ranked) + i, "content": token, **flags} for i, token in enumerate(special)],
        pre_tokenizer=pre_tokenizer(split(LLAMA3_SPLIT)),
        post_processor=around(special[0], None, {special[0]: len(ranked)}),
        # tiktoken looks a piece up as a whole before it merges.
        ignore_merges=True,
    )
    named = {"bos_token": special[0], "eos_token": special[1]}
    config = named | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
    }
    return {
        "tokenizer.json": json.dumps(content, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "special_tokens_map.json": json.dumps(named, indent=2),
    }


def merges(ranked: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Every way to make a token out of two others, in the order of its rank; then by the ranks of the two."""
    rank = {token: i for i, token in enumerate(ranked)}
    found = []
    for token in ranked:
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in rank and token[i:] in rank]
        found += sorted(splits, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return found
