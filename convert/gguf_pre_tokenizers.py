"""Pre-tokenizers, which split text before merging, by their names in GGUF files (tokenizer.ggml.pre).

The expressions are those of each family's own tokenizer.json; which name means which, and what else a name implies, is
that of llama.cpp (https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp), whose expressions for
"tekken" and "gpt-4o" tell upper from lower case in ASCII alone. A name that is missing here is of no Llama-like model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama_jax.convert.meta_tokenizer import LLAMA3_SPLIT
from llama_jax.text.tokenizer.byte_level_bpe import CONTRACTIONS, DIGITS, PUNCTUATION_AND_SPACE, pre_tokenizer, split


@dataclass(frozen=True)
class PreTokenizer:
    """The meaning of a pre-tokenizer's name.

    Attributes:
      content: the "pre_tokenizer" of a tokenizer.json.
      ignores_merges: whether a piece of text that is a token as a whole is taken as it is.
      adds_bos: whether BOS goes before a text where the file does not say (tokenizer.ggml.add_bos_token).
    """

    content: Mapping[str, Any]
    ignores_merges: bool = False
    adds_bos: bool = False


_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}"
_PUNCTUATION_AND_SLASH = PUNCTUATION_AND_SPACE.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"

_GPT2 = PreTokenizer(pre_tokenizer(gpt2=True))
_DIGITS_APART = PreTokenizer(pre_tokenizer(DIGITS, gpt2=True))
_LLAMA3 = pre_tokenizer(split(LLAMA3_SPLIT))
_QWEN2 = PreTokenizer(pre_tokenizer(split(rf"{CONTRACTIONS}|{_WORDS}|\p{{N}}|{PUNCTUATION_AND_SPACE}")))
_QWEN35 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|" + PUNCTUATION_AND_SPACE.replace(
    r"\p{L}", r"\p{L}\p{M}"
)
_SEED_CODER = rf"{CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_CASED.replace('{0}', '')}|\p{{N}}|{_PUNCTUATION_AND_SLASH}"
_GPT_4O = rf"{_CASED.replace('{0}', CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{_PUNCTUATION_AND_SLASH}"
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def _named(value: PreTokenizer, *names: str) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names, value)


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    **_named(_GPT2, "gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "mpt", "olmo", "jais", "trillion", "exaone4"),
    **_named(_DIGITS_APART, "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    **_named(_DIGITS_APART, "mellum2"),
    **_named(PreTokenizer(_LLAMA3, True, True), "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"),
    **_named(PreTokenizer(_LLAMA3, True, True), "midm-2.0", "lfm2"),
    **_named(PreTokenizer(_LLAMA3), "smaug-bpe", "dbrx"),
    **_named(_QWEN2, "qwen2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2", "stablelm2", "hunyuan", "solar-open"),
    **_named(PreTokenizer(pre_tokenizer(split(_QWEN35))), "qwen35"),
    **_named(PreTokenizer(pre_tokenizer(split(_SEED_CODER))), "seed-coder"),
    **_named(PreTokenizer(pre_tokenizer(split(_TEKKEN)), True, True), "tekken"),
    **_named(PreTokenizer(pre_tokenizer(split(_GPT_4O))), "llama4", "gpt-4o", "kanana2", "talkie", "minimax-m2"),
    **_named(PreTokenizer(pre_tokenizer(*map(split, _DEEPSEEK_CODER), DIGITS)), "deepseek-coder"),
    **_named(PreTokenizer(pre_tokenizer(*map(split, _DEEPSEEK_V3))), "deepseek-v3"),
}
"""By name. Of several names for one thing the first is written by an export."""


def pre_tokenizer_name(content: Mapping[str, Any] | None, *, ignores_merges: bool) -> str | None:
    """The name that stands for a tokenizer.json's "pre_tokenizer"; None if there is none. Of names that differ in
    nothing but `ignores_merges`, the one that agrees."""
    wanted = _without_offsets(content)
    found = {n: pre for n, pre in PRE_TOKENIZERS.items() if _without_offsets(pre.content) == wanted}
    return next((n for n, pre in found.items() if pre.ignores_merges == ignores_merges), next(iter(found), None))


def _without_offsets(content: Any) -> Any:
    """Drops keys that only say which characters a token covers."""
    if isinstance(content, Mapping):
        return {key: _without_offsets(value) for key, value in content.items() if key != "trim_offsets"}
    return [_without_offsets(item) for item in content] if isinstance(content, list) else content
