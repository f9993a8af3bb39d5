"""SentencePiece BPE vocabularies (tokenizer.model, and "llama" in GGUF files) as the content of a tokenizer.json.

One encoder then serves every model, and its ids equal those of the sentencepiece library. A SentencePiece BPE
repeatedly joins the two neighbours whose union has the best score; a list of merges ordered by score is equivalent
(Kudo and Richardson 2018, arXiv:1808.06226).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

from llama_jax.errors import TokenizerError, UnsupportedModel
from llama_jax.text.tokenizer.byte_level_bpe import split
from llama_jax.text.tokenizer.tokenizer import call_backend

if TYPE_CHECKING:
    import tokenizers

SPACE = "▁"  # U+2581, SentencePiece's spelling of a space

# Nothing looks like a control token, since the library never finds them in text.
PROBE = """\
  The quick brown fox jumps over the lazy dog; isn't it 3.14159 or 1,234,567?
def f(x_y):\n    return  x_y ** 2   # two  and   three spaces\t\ttabs

Ünïcödé façade, Ελληνικά, Кириллица, עברית, العربية, हिन्दी, ไทย, 日本語と中文, 한국어
emoji 👍🏽 👩\u200d💻 and math ∑∀∂ ½ e\u0301, "quotes" «guillemets» — dash…\r\n
"""


class PieceType(IntEnum):
    """Kinds of pieces, numbered as in sentencepiece_model.proto; GGUF's token_type uses the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def merges_by_score(vocab: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """All merges that build a piece from two others, best score first.

    Args:
      vocab: piece -> id, of the pieces that plain text may yield.
      scores: piece -> score of its log probability.
    """
    merges = []
    for piece in vocab:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
        splits.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(scores[piece], len(left), len(right), left, right) for left, right in splits]
    # Ties: longer parts first, then in their order (a stable sort), as in transformers' conversion.
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in merges]


Prefix = Literal["always", "first", "never"]
"""Where a space is added: before every stretch of text between added tokens, before the text only, or nowhere."""


def bpe_tokenizer_json(
    pieces: Sequence[str],
    types: Sequence[int],
    merges: Sequence[tuple[str, str]],
    *,
    unk_token: str | None,
    prefix: Prefix,
    byte_fallback: bool = True,
    whole: Sequence[str] = (),
    normalizers: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """A tokenizer.json for a SentencePiece BPE vocabulary.

    A tokenizer.json cannot express "first" for texts that begin with a space themselves: it then means that the caller
    prepends a space (`Tokenizer`), and the tokenizer.json removes one again.

    Args:
      pieces: the vocabulary in the order of its ids.
      types: the `PieceType` of each.
      merges: in the order of their priority.
      unk_token: token for text outside the vocabulary.
      byte_fallback: spell characters outside the vocabulary by its 256 pieces for bytes.
      whole: pieces that are matched whole anywhere in the text, including the prefix.
      normalizers: applied to a text before the prefix.
    """
    strip = [] if prefix == "never" else [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    prepend = [{"type": "Prepend", "prepend": SPACE}] if prefix == "always" else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    pattern = "|".join(re.escape(piece) for piece in sorted(whole, key=len, reverse=True))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(pieces, types),
        "normalizer": {"type": "Sequence", "normalizers": [*normalizers, *prepend, replace]},
        "pre_tokenizer": split(pattern) if whole else None,
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
            "byte_fallback": byte_fallback,
            "ignore_merges": bool(whole),
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [list(merge) for merge in merges],
        },
    }


def added_tokens(pieces: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    """Tokens matched whole in a text: control tokens, the unknown token and user-defined ones."""
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
    """The pieces that plain text may be merged into; never a control token, whatever its score."""
    allowed = (PieceType.NORMAL, PieceType.USER_DEFINED)
    return {piece: i for i, (piece, kind) in enumerate(zip(pieces, types, strict=True)) if kind in allowed}


@dataclass(frozen=True)
class SentencePieceModel:
    """A parsed tokenizer.model.

    Attributes:
      backend: encodes with its vocabulary.
      defaults: configuration that tokenizer_config.json overrides.
      prefix: where it adds a space; "first" is left to the caller.
      whole: its user-defined symbols, which are matched whole anywhere in a text.
    """

    backend: tokenizers.Tokenizer
    defaults: Mapping[str, Any]
    prefix: Prefix
    whole: tuple[str, ...]


def load_model(data: bytes, *, name: str, legacy: bool = False, add_prefix_space: bool = True) -> SentencePieceModel:
    """Load a tokenizer.model.

    The sentencepiece library reads and validates the file. Its vocabulary then moves to the encoder of all other
    models, which supports added tokens; each load checks that both encode `PROBE` identically.

    Args:
      data: the file, a serialised ModelProto of sentencepiece_model.proto.
      name: its name in errors.
      legacy: whether text after an added token gets a space too ("legacy" of tokenizer_config.json).
      add_prefix_space: False for no space at all, whatever the file says.

    Raises:
      TokenizerError: the file is damaged, or the two encoders disagree.
      UnsupportedModel: it is not a BPE, or marks spaces in a way that no Llama-like model does.
    """
    from tokenizers import Tokenizer as Backend

    processor, model = _read(data, name)
    _check_supported(model, name)
    pieces = [piece.piece for piece in model.pieces]
    if broken := [piece for piece in pieces if not isinstance(piece, str)]:  # protobuf leaves those as bytes
        raise TokenizerError(f"{name} is damaged: the piece {broken[0]} is not UTF-8", hint="fetch the file again")
    types = [PieceType(piece.type) for piece in model.pieces]
    whole = [piece for piece, kind in zip(pieces, types, strict=True) if kind == PieceType.USER_DEFINED]
    # Unlike added tokens, they are matched after normalisation, not before; nothing merges into one.
    types = [PieceType.UNUSED if kind == PieceType.USER_DEFINED else kind for kind in types]
    scores = {piece.piece: piece.score for piece in model.pieces}
    ids = {"unk_token": processor.unk_id(), "bos_token": processor.bos_id(), "eos_token": processor.eos_id()}
    defaults: dict[str, Any] = {key: pieces[i] for key, i in ids.items() if i >= 0}  # -1: there is none

    def made(prefix: Prefix) -> tokenizers.Tokenizer:
        content = bpe_tokenizer_json(
            pieces,
            types,
            merges_by_score(mergeable(pieces, types), scores),
            unk_token=defaults.get("unk_token"),
            prefix=prefix,
            byte_fallback=model.trainer_spec.byte_fallback,
            whole=whole,
            normalizers=_normalizers(model.normalizer_spec, prefix),
        )
        return call_backend(f"{name} cannot be read", Backend.from_str, json.dumps(content))

    dummy: Prefix = "always" if model.normalizer_spec.add_dummy_prefix else "never"
    backend = made(dummy)
    _check_agreement(processor, backend, name)
    prefix: Prefix = dummy if add_prefix_space else "never"
    if prefix == "always" and not legacy:
        prefix = "first"
    defaults |= {"add_bos_token": "bos_token" in defaults, "add_eos_token": False}
    return SentencePieceModel(backend if prefix == dummy else made(prefix), defaults, prefix, tuple(whole))


def _normalizers(spec: Any, prefix: Prefix) -> list[dict[str, Any]]:
    """The normalisation of a NormalizerSpec, applied before the prefix, or after one that the caller has added. Leaves
    white space other than spaces alone."""
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        start = rf"\A{SPACE} +\z|(?<=\A{SPACE}) +" if prefix == "first" else r"\A +"
        for pattern, content in ((rf"{start}| +\z", ""), (" {2,}", " ")):
            steps.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": content})
    return steps


def _read(data: bytes, name: str) -> tuple[Any, Any]:
    """The library's processor, and the ModelProto for data that the processor does not expose.

    Raises:
      TokenizerError: the file is damaged, or the protobuf package does not fit the sentencepiece package.
    """
    try:
        from sentencepiece import SentencePieceProcessor
        from sentencepiece import sentencepiece_model_pb2 as messages
    except Exception as error:  # an older protobuf raises its own VersionError, a second copy of the messages TypeError
        raise TokenizerError(
            f"{name} cannot be read: the sentencepiece package does not import: {error}",
            hint="install matching versions: pip install -U sentencepiece protobuf",
        ) from error
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
    except RuntimeError as error:  # the library reports any damage as one
        raise TokenizerError(f"{name} is damaged: {error}", hint="fetch the file again") from error
    # The class is made when the module is imported, where mypy does not see it.
    return processor, messages.ModelProto.FromString(processor.serialized_model_proto())  # type: ignore[attr-defined]


def _check_supported(model: Any, name: str) -> None:
    """Refuse a ModelProto with settings that the encoder does not support.

    Raises:
      UnsupportedModel: see the message.
    """
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != trainer.BPE:
        label = trainer.ModelType.Name(trainer.model_type).lower()
        raise UnsupportedModel(f"{name} is a SentencePiece {label} model", hint="only BPE models are supported")
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise UnsupportedModel(
            f"{name} marks spaces in another way than by {SPACE!r} before a word",
            hint="only treat_whitespace_as_suffix=false with escape_whitespaces=true is supported",
        )


def _check_agreement(processor: Any, backend: tokenizers.Tokenizer, name: str) -> None:
    """Compare the library with the encoder made from its vocabulary.

    Raises:
      TokenizerError: they give `PROBE` different ids.
    """
    expected = processor.encode(PROBE)
    actual = call_backend(f"{name} cannot encode", backend.encode, PROBE, add_special_tokens=False).ids
    if actual == expected:
        return
    shared = next((i for i, (a, b) in enumerate(zip(actual, expected, strict=False)) if a != b), len(actual))
    theirs, ours = (
        [processor.id_to_piece(i) for i in ids[max(shared - 2, 0) : shared + 4]] for ids in (expected, actual)
    )
    raise TokenizerError(
        f"{name}: the sentencepiece library splits a text as …{theirs}…, the encoder made from it as …{ours}…",
        hint="the file uses a feature of SentencePiece that is not supported; use the model's tokenizer.json instead",
    )
