"""Byte-level BPE vocabularies (Radford et al. 2019) as the content of a tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PUNCTUATION_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Parts of the expressions by which many models cut text before merging."""


def pre_tokenizer(pattern: str | None) -> dict[str, Any]:
    """Cuts text where a regular expression says, then spells it in the byte alphabet; None is GPT-2's expression."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if pattern is None:
        return byte_level
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]}


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
      pre_tokenizer: how text is cut before merging.
      post_processor: what is put around the ids, if anything.
      ignore_merges: whether a piece that is a token as a whole is taken as it is.
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
