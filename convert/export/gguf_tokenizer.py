"""A model's tokenizer as the metadata of a GGUF file; the inverse of `convert.gguf_tokenizer`.

llama.cpp has two kinds that Llama-like models use: "gpt2", a byte-level BPE whose split of the text it knows by name,
and "llama", a SentencePiece BPE that joins by score. The result is read back and compared on a probe text, so that
a tokenizer that GGUF cannot express is refused instead of giving other ids.
"""

from __future__ import annotations

import json
import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.convert.export.gguf_writer import Value
from llama_jax.convert.gguf_config import EOS_KEYS
from llama_jax.convert.gguf_pre_tokenizers import pre_tokenizer_name
from llama_jax.convert.gguf_tokenizer import NAMED_IDS, NO_TOKENIZER, tokenizer_files
from llama_jax.errors import CheckpointError, UnsupportedModel
from llama_jax.text.tokenizer.loading import Described, read_tokenizer
from llama_jax.text.tokenizer.sentencepiece_bpe import PROBE, SPACE, PieceType
from llama_jax.text.tokenizer.tokenizer import call_backend

if TYPE_CHECKING:
    import tokenizers

_HINT = "export it with --to hf, which copies the tokenizer's files"
_KEY = "tokenizer.ggml"
_TEMPLATE = "tokenizer.chat_template"


def no_tokenizer(bos: int | None, eos: Sequence[int], pad: int | None) -> dict[str, Value]:
    """The keys of a file without a tokenizer, with the token ids that config.json names."""
    return {f"{_KEY}.model": NO_TOKENIZER} | _ids({"bos_token_id": bos, "padding_token_id": pad}, eos)


def tokenizer_metadata(folder: Path, vocab_size: int, eos: Sequence[int]) -> tuple[dict[str, Value], list[str]]:
    """The keys "tokenizer.*" of a model's tokenizer and chat templates.

    Args:
      folder: the checkpoint.
      vocab_size: rows of the embedding; ids without a token get a placeholder, as in llama.cpp's converter.
      eos: all ids that end a text, by config.json and generation_config.json.

    Returns:
      The keys, and notes about what llama.cpp does differently.

    Raises:
      TokenizerError: the tokenizer's files are damaged.
      UnsupportedModel: GGUF cannot express the tokenizer; says why.
      CheckpointError: there are more tokens than the embedding has rows.
    """
    read = read_tokenizer(folder)
    backend, names = read.backend, read.names
    content = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise UnsupportedModel(f"{folder}: GGUF export knows no {model['type']} tokenizer", hint=_HINT)
    tokens = _vocabulary(backend, read.model.whole if read.model else (), vocab_size, folder)
    notes: list[str] = []
    keys = (
        _sentencepiece(content, tokens, _adds_space(read, content, notes, folder))
        if model["byte_fallback"]
        else _byte_level(content, tokens, notes, folder)
    )
    ids = {key: backend.token_to_id(names[name]) for name, key in NAMED_IDS.items() if name in names}
    first = ids.pop("eos_token_id", None)
    ends = list(dict.fromkeys([*([] if first is None else [first]), *eos]))
    keys |= _ids(ids, ends)
    if len(ends) > len(EOS_KEYS):
        notes.append(f"GGUF names {len(EOS_KEYS)} ids that end a text, this model has {len(ends)}")
    encoded = call_backend("the tokenizer cannot encode", backend.encode, "a").ids
    keys[f"{_KEY}.add_bos_token"] = bool(encoded) and encoded[0] == ids.get("bos_token_id", -1)
    keys[f"{_KEY}.add_eos_token"] = bool(encoded) and encoded[-1] == (-1 if first is None else first)
    keys |= _templates(read.templates)
    _check(keys, read, folder)
    return keys, notes


def _vocabulary(
    backend: tokenizers.Tokenizer, whole: Sequence[str], size: int, folder: Path
) -> dict[int, tuple[str, PieceType]]:
    """Every id's token; those that no token has are unused, as in llama.cpp's converter."""
    found = {
        i: (token, PieceType.USER_DEFINED if token in whole else PieceType.NORMAL)
        for token, i in backend.get_vocab(with_added_tokens=False).items()
    }
    for i, token in backend.get_added_tokens_decoder().items():
        found[i] = (token.content, PieceType.CONTROL if token.special else PieceType.USER_DEFINED)
    if (last := max(found)) >= size:
        raise CheckpointError(
            f"{folder}: the tokenizer has the id {last}, the embedding only {size} rows",
            hint="the tokenizer's files may be those of another model",
        )
    return {i: found.get(i, (f"[PAD{i}]", PieceType.UNUSED)) for i in range(size)}


def _byte_level(
    content: Mapping[str, Any], tokens: Mapping[int, tuple[str, PieceType]], notes: list[str], folder: Path
) -> dict[str, Value]:
    pre = pre_tokenizer_name(content["pre_tokenizer"], ignores_merges=bool(content["model"]["ignore_merges"]))
    normalizer = (content["normalizer"] or {}).get("type")
    if pre is None:
        raise UnsupportedModel(f"{folder}: GGUF has no name for how this tokenizer splits a text", hint=_HINT)
    if normalizer not in (None, "NFC"):
        raise UnsupportedModel(f"{folder}: GGUF cannot express the tokenizer's normaliser {normalizer}", hint=_HINT)
    if normalizer:
        notes.append("the tokenizer composes characters (NFC) before encoding, which llama.cpp does not")
    return {
        f"{_KEY}.model": "gpt2",
        f"{_KEY}.pre": pre,
        f"{_KEY}.tokens": [token for token, _ in tokens.values()],
        f"{_KEY}.token_type": [int(kind) for _, kind in tokens.values()],
        f"{_KEY}.merges": [" ".join(pair) for pair in content["model"]["merges"]],
    }


def _sentencepiece(
    content: Mapping[str, Any], tokens: Mapping[int, tuple[str, PieceType]], adds_space: bool
) -> dict[str, Value]:
    """llama.cpp joins the two neighbours whose union scores best: the order of the merges, said per union."""
    rank: dict[str, int] = {}
    for left, right in content["model"]["merges"]:
        rank.setdefault(left + right, len(rank))
    unknown = content["model"]["unk_token"]
    texts, types, scores = [], [], []
    for i, (token, kind) in tokens.items():
        if token == unknown:
            kind = PieceType.UNKNOWN
        elif kind == PieceType.NORMAL and len(token) == 6 and token.startswith("<0x"):
            kind = PieceType.BYTE
        elif kind == PieceType.NORMAL and len(token) > 1 and token not in rank:
            kind = PieceType.UNUSED  # no text becomes it
        texts.append(token)
        types.append(int(kind))
        scores.append(float(-rank.get(token, len(rank) + i)))
    return {
        f"{_KEY}.model": "llama",
        f"{_KEY}.pre": "default",
        f"{_KEY}.tokens": texts,
        f"{_KEY}.scores": scores,
        f"{_KEY}.token_type": types,
        f"{_KEY}.add_space_prefix": adds_space,
    }


def _adds_space(read: Described, content: Mapping[str, Any], notes: list[str], folder: Path) -> bool:
    """Returns whether a space goes before a text; refuses whatever else the tokenizer does before it encodes."""
    pre, normalizer = content["pre_tokenizer"], content["normalizer"]
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    known = [replace] in (steps, steps[1:]) and (len(steps) == 1 or steps[0] == {"type": "Prepend", "prepend": SPACE})
    if read.model is not None and known:
        scheme = read.model.prefix
    elif pre is None and known:
        scheme = "always" if len(steps) > 1 else "never"
    elif normalizer is None and pre and pre["type"] == "Metaspace" and not pre.get("split", True):
        scheme = pre["prepend_scheme"]
        if scheme != "never":
            notes.append(
                "llama.cpp puts a space also before a text that begins with one, which this tokenizer does not"
            )
    else:
        raise UnsupportedModel(f"{folder}: GGUF cannot express how this tokenizer treats spaces", hint=_HINT)
    if scheme == "first" or (read.model and read.model.whole and scheme == "always"):
        notes.append("llama.cpp puts a space also before the text after an added token, which this tokenizer does not")
    return scheme != "never"


def _ids(ids: Mapping[str, int | None], eos: Sequence[int]) -> dict[str, Value]:
    keys: dict[str, Value] = {f"{_KEY}.{key}": i for key, i in ids.items() if i is not None}
    return keys | {f"{_KEY}.{key}_token_id": i for key, i in zip(EOS_KEYS, eos, strict=False)}


def _templates(templates: Mapping[str, str]) -> dict[str, Value]:
    named = {name: text for name, text in templates.items() if name != "default"}
    keys: dict[str, Value] = {f"{_TEMPLATE}.{name}": text for name, text in named.items()}
    if named:
        keys["tokenizer.chat_templates"] = sorted(named)
    if "default" in templates:
        keys[_TEMPLATE] = templates["default"]
    return keys


def _check(keys: Mapping[str, Value], original: Described, folder: Path) -> None:
    """Refuses keys from which another tokenizer is read."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, text in tokenizer_files(keys).items():
            if name.startswith("tokenizer"):
                (Path(scratch) / name).write_text(text, encoding="utf-8")
        read = read_tokenizer(scratch)
    probe = unicodedata.normalize("NFC", PROBE).lstrip(" ")
    expected, found = (_encode(each, probe) for each in (original, read))
    if expected != found:
        at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), -1)
        raise UnsupportedModel(
            f"{folder}: a GGUF file would encode text differently from this tokenizer (at token {at} of a probe)",
            hint=_HINT,
        )


def _encode(read: Described, text: str) -> list[int]:
    encoding = call_backend("the tokenizer cannot encode", read.backend.encode, read.prefix + text)
    return encoding.ids
