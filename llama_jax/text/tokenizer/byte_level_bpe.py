"""Byte-level BPE vocabularies (Radford et al. 2019) as the content of a tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PUNCTUATION_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Parts of the pre-tokenization expressions of many models."""


DIGITS: Mapping[str, Any] = {"type": "Digits", "individual_digits": True}
"""Isolates every digit (Unicode's category N)."""


def split(pattern: str) -> dict[str, Any]:
    """Splits text into the matches of a regular expression and the text between them."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def pre_tokenizer(*steps: Mapping[str, Any], gpt2: bool = False) -> dict[str, Any]:
    """Splits text step by step, then, if `gpt2`, by GPT-2's expression, and spells it in the byte alphabet."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": gpt2}
    return {"type": "Sequence", "pretokenizers": [*steps, byte_level]} if steps else byte_level


def around(bos: str | None, eos: str | None, ids: Mapping[str, int]) -> dict[str, Any] | None:
    """The "post_processor" that adds tokens around a text; None if there are none.

    Args:
      bos, eos: the tokens before and after; None for none.
      ids: their ids.
    """
    if bos is None and eos is None:
        return None

    def side(name: str, type_id: int) -> list[dict[str, Any]]:
        def token(text: str | None) -> list[dict[str, Any]]:
            return [] if text is None else [{"SpecialToken": {"id": text, "type_id": type_id}}]

        return [*token(bos), {"Sequence": {"id": name, "type_id": type_id}}, *token(eos)]

    used = [token for token in dict.fromkeys((bos, eos)) if token is not None]
    return {
        "type": "TemplateProcessing",
        "single": side("A", 0),
        "pair": [*side("A", 0), *side("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in used},
    }


def tokenizer_json(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    added: Sequence[Mapping[str, Any]],
    pre_tokenizer: Mapping[str, Any],
    post_processor: Mapping[str, Any] | None = None,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """A tokenizer.json.

    Args:
      vocab: token in the byte alphabet -> id.
      merges: pairs of such tokens, the first to be joined first.
      added: tokens that are matched whole in a text (`sentencepiece_bpe.added_tokens`).
      pre_tokenizer: splits text before merging.
      post_processor: adds tokens around the ids, if any.
      ignore_merges: whether a piece that is itself a token is used without merging.
    """
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added),
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    }
