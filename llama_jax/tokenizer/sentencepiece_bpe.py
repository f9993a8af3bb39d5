"""SentencePiece BPE vocabularies (tokenizer.model, and "llama" in GGUF files) as the content of a tokenizer.json.

One encoder then serves every model, and its ids are those of transformers, which converts these files the same way. A
SentencePiece BPE joins, again and again, the two neighbours whose union has the best score; a list of merges ordered by
that score says the same (Kudo and Richardson 2018, arXiv:1808.06226).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any

from llama_jax.errors import TokenizerError, UnsupportedModel

SPACE = "▁"  # U+2581, SentencePiece's spelling of a space


class PieceType(IntEnum):
    """Kinds of pieces, numbered as in sentencepiece_model.proto; GGUF's token_type uses the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def merges_by_score(vocab: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to build a piece from two others, best score first.

    Args:
      vocab: piece -> id, of the pieces that plain text may yield.
      scores: piece -> score of its log probability.
    """
    merges = []
    for piece in vocab:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
        splits.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(scores[piece], len(left), len(right), left, right) for left, right in splits]
    # Ties go to longer parts first and then keep their order (a stable sort), as in transformers' conversion.
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in merges]


def bpe_tokenizer_json(
    pieces: Sequence[str],
    types: Sequence[int],
    merges: Sequence[tuple[str, str]],
    *,
    unk_token: str | None,
    add_prefix_space: bool,
) -> dict[str, Any]:
    """A tokenizer.json for a SentencePiece BPE vocabulary with byte fallback.

    Args:
      pieces: the vocabulary in the order of its ids.
      types: the `PieceType` of each.
      merges: in the order of their priority.
    """
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if add_prefix_space else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(pieces, types),
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": SPACE,
            "prepend_scheme": "first" if add_prefix_space else "never",
            "split": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": unk_token,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [list(merge) for merge in merges],
        },
    }


def added_tokens(pieces: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    """The tokens matched whole in a text: control tokens, the unknown token and user-defined ones."""
    kinds = {PieceType.CONTROL: True, PieceType.UNKNOWN: True, PieceType.USER_DEFINED: False}
    return [
        {
            "id": i,
            "content": piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kinds[PieceType(kind)],
        }
        for i, (piece, kind) in enumerate(zip(pieces, types, strict=True))
        if kind in kinds
    ]


def mergeable(pieces: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """The pieces that plain text may be merged into: a control token never is one, whatever its score."""
    allowed = (PieceType.NORMAL, PieceType.USER_DEFINED)
    return {piece: i for i, (piece, kind) in enumerate(zip(pieces, types, strict=True)) if kind in allowed}


def tokenizer_json_of_model(data: bytes, *, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert a tokenizer.model.

    Args:
      data: the file, a ModelProto of sentencepiece_model.proto.
      name: what to call it in errors.

    Returns:
      The content of a tokenizer.json, and configuration that tokenizer_config.json overrides.

    Raises:
      TokenizerError: the file is damaged.
      UnsupportedModel: it is no BPE, or normalises text in a way that no Llama-like model does.
    """
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for field, value in _fields(data):
            if field == 1:
                piece = dict(_fields(value))
                pieces.append(piece[1].decode())
                scores.append(struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0])
                types.append(PieceType(piece.get(3, PieceType.NORMAL)))
            elif field == 2:
                trainer = dict(_fields(value))
            elif field == 3:
                normalizer = dict(_fields(value))
    except (KeyError, ValueError, AttributeError, TypeError, IndexError, struct.error) as error:
        raise TokenizerError(f"{name} is damaged: {error!r}", hint="fetch the file again") from error
    if not pieces:
        raise TokenizerError(f"{name} holds no vocabulary", hint="fetch the file again")
    if (kind := trainer.get(3, 1)) != 2:
        label = {1: "unigram", 3: "word", 4: "char"}.get(kind, str(kind))
        raise UnsupportedModel(f"{name} is a SentencePiece {label} model", hint="only BPE models are supported")
    if normalizer.get(2) or normalizer.get(4, 1):
        raise UnsupportedModel(
            f"{name} normalises text with {normalizer.get(1, b'').decode(errors='replace')!r}",
            hint='only the normaliser "identity" without removal of white space is supported',
        )
    vocab = mergeable(pieces, types)
    content = bpe_tokenizer_json(
        pieces,
        types,
        merges_by_score(vocab, dict(zip(pieces, scores, strict=True))),
        unk_token=next((p for p, kind in zip(pieces, types, strict=True) if kind == PieceType.UNKNOWN), None),
        add_prefix_space=bool(normalizer.get(3, 1)),
    )
    ids = {"unk_token": trainer.get(40, 0), "bos_token": trainer.get(41, 1), "eos_token": trainer.get(42, 2)}
    defaults: dict[str, Any] = {key: pieces[i] for key, i in ids.items() if i < len(pieces)}
    return content, {**defaults, "add_bos_token": "bos_token" in defaults, "add_eos_token": False}


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a protobuf message: int for varints, bytes for everything else.

    Raises:
      ValueError: the message is cut short or uses a wire type that protobuf does not have.
    """
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            if position >= len(data) or shift > 63:
                raise ValueError("cut short")
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(data):
        key = varint()
        match key & 7:
            case 0:
                yield key >> 3, varint()
                continue
            case 1:
                size = 8
            case 2:
                size = varint()
            case 5:
                size = 4
            case wire_type:
                raise ValueError(f"wire type {wire_type}")
        if size > len(data) - position:
            raise ValueError("cut short")
        yield key >> 3, data[position : position + size]
        position += size
