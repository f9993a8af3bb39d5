"""For each hint that says "get it again", "damaged" or "upgrade", an input for which that is true.

A case takes a sound model, damages it, and names the place whose hint answers. That the hint is true is shown by doing
what it says: the sound files once more, or a newer program.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hint_locations import Location
from hint_models import (
    BYTES,
    PIECES,
    O,
    Q,
    a_piece_that_is_no_text,
    at_tensor,
    custom,
    cut,
    doubled,
    fewer_tensors,
    gguf_with,
    json_of,
    rope_of_another_type,
    tensors,
    text,
    two_schemes,
)
from test_checkpoint import flip_a_bit, truncate_data
from test_convert_meta import edit_params, edit_shard, ranks
from tiny_models import LLAMA, write_gguf


@dataclass(frozen=True)
class Case:
    """An input for which a hint is true.

    Attributes:
      location: where the hint is given.
      says: a part of it, which tells it from other hints of the same place.
      model: a name of SOUND.
      damage: what makes the input of the sound model.
      older, newer: make the program an older or a newer one, where the hint asks for another: the input that the older
        one refuses is to work with the newer one.
    """

    location: Location
    says: str
    model: str
    damage: Callable[[Path], Any]
    older: Callable[[pytest.MonkeyPatch], None] = lambda patch: None
    newer: Callable[[pytest.MonkeyPatch], None] | None = None


def case(where: str, says: str, model: str, damage: Callable[[Path], Any], **programs: Any) -> Case:
    return Case(Location(*where.split("::")), says, model, damage, **programs)


def older_gguf(patch: pytest.MonkeyPatch) -> None:
    """The gguf package from before a type: it does not know the number of Q8_0."""
    known = gguf.GGMLQuantizationType

    def lookup(number: int) -> gguf.GGMLQuantizationType:
        if number == known.Q8_0:
            raise ValueError(number)
        return known(number)

    patch.setattr(gguf, "GGMLQuantizationType", lookup)


def quantised_gguf(folder: Path) -> None:
    hf = LLAMA | {"hidden_size": 32, "intermediate_size": 32}
    extra = {"tokenizer.ggml.model": "none"}
    write_gguf(folder / "m.gguf", hf, quantisation=gguf.GGMLQuantizationType.Q8_0, extra=extra)


def version_2(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(f"llama_jax.checkpoint.{name}", 2)


SAFE, TOK = "convert/safetensors_file.py::SafetensorsFile", "llama_jax/text/tokenizer/"
FORMAT, READ = "llama_jax/checkpoint/format.py::", "llama_jax/checkpoint/read.py::TensorReader."
NAN = np.full(1, np.nan, np.float32)
NEXT = "model-00002-of-00002.safetensors"

CASES = (
    # Checkpoints.
    case(
        "llama_jax/checkpoint/checkpoint_source.py::CheckpointSource.__init__",
        "config.json is of another model",
        "checkpoint",
        json_of("config.json", vocab_size=50),
    ),
    case(
        f"{FORMAT}open_checkpoint", "the checkpoint is damaged", "checkpoint", json_of("llama_jax.json", dtype="int9")
    ),
    case(f"{FORMAT}_version", "the checkpoint is damaged", "checkpoint", json_of("llama_jax.json", format_version="x")),
    case(
        f"{FORMAT}_version",
        "upgrade llama-jax",
        "checkpoint",
        json_of("llama_jax.json", format_version=2),
        newer=version_2("format.FORMAT_VERSION"),
    ),
    case(f"{FORMAT}_tensor_infos", "the checkpoint is damaged", "checkpoint", custom(lambda m: m.pop("digests"))),
    case(f"{FORMAT}_schemes", "the checkpoint is damaged", "checkpoint", custom(two_schemes)),
    case(
        "llama_jax/checkpoint/lock.py::_parsed",
        "upgrade llama-jax",
        "lock",
        json_of("model.lock.json", lock_version=2),
        newer=version_2("lock.LOCK_VERSION"),
    ),
    case(
        f"{READ}_find",
        "the checkpoint is damaged",
        "checkpoint",
        custom(lambda m: m["tensors"]["embed.weight"].update(dtype="float16")),
    ),
    case(f"{READ}_unreadable", "the checkpoint is damaged", "checkpoint", truncate_data),
    case(f"{READ}check", "the checkpoint is damaged", "checkpoint", flip_a_bit),
    case(
        "llama_jax/checkpoint/source.py::check_dtypes",
        "config and weights do not belong together",
        "scheme",
        custom(lambda m: m["tensors"]["embed.values"].update(dtype="uint8")),
    ),
    case(
        "convert/export/source.py::checked_files", "the checkpoint is damaged", "export", text("tokenizer.json", "{}")
    ),
    # Files of sources in general.
    case(
        "llama_jax/checkpoint/values.py::_unsound",
        "get it again",
        "hf",
        tensors(lambda t: t.update({O: np.full_like(t[O], np.nan)})),
    ),
    case("llama_jax/library/configs.py::find_config", "correct the file", "plan", cut("config.json", 99)),
    case("convert/hf.py::HuggingFaceFolder.__init__", "correct the file", "hf", cut("config.json", 99)),
    case("convert/hf.py::HuggingFaceFolder.generation_config", "correct", "hf", cut("generation_config.json", 9)),
    case("convert/hf.py::HuggingFaceFolder._open", "the folder is damaged", "shards", doubled),
    case("convert/hf_files.py::_indexed", "correct the file", "shards", cut("model.safetensors.index.json", 99)),
    case(
        "convert/hf_files.py::_indexed", "the folder is damaged", "shards", text("model.safetensors.index.json", "{}")
    ),
    case(
        "convert/hf_files.py::check_promised",
        "the folder is damaged",
        "shards",
        tensors(lambda t: t.pop(next(iter(t))), NEXT),
    ),
    case(
        "convert/hf_files.py::inside",
        "the folder is damaged",
        "shards",
        text("model.safetensors.index.json", json.dumps({"weight_map": {"a": "x" * 300}})),
    ),
    # Files of weights.
    case(f"{SAFE}._parse", "get it again", "read", text("model.safetensors", b"\xff" * 200)),
    case("convert/weight_file.py::WeightFile._bad", "get it again", "read", cut("model.safetensors", 9000)),
    case("convert/weight_file.py::read_at", "get it again", "read", text("later", "")),
    case("convert/torch_file.py::TorchFile._parse", "get it again", "bin", text("pytorch_model.bin", b"\xff" * 99)),
    case("convert/torch_zip.py::ZipDirectory._bad", "get it again", "bin", cut("pytorch_model.bin", 9000)),
    case(
        "convert/quantized/scheme.py::Bundle.check_groups",
        "get it again",
        "gptq",
        tensors(lambda t: t.update({f"{Q}.g_idx": np.full_like(t[f"{Q}.g_idx"], 9)})),
    ),
    case(
        "convert/quantized/weight.py::QuantizedWeight._check_scale",
        "get it again",
        "gptq",
        tensors(lambda t: t.update({f"{Q}.scales": np.full_like(t[f"{Q}.scales"], np.inf)})),
    ),
    case(
        "convert/quantized/bitsandbytes.py::Bitsandbytes8.codes",
        "newer bitsandbytes",
        "bnb",
        tensors(lambda t: t.update({f"{Q}.weight_format": np.array(2, np.uint8)})),
    ),
    # GGUF.
    case("convert/gguf.py::GgufModel._check", "the file is damaged", "gguf", fewer_tensors),
    case("convert/gguf.py::_config_dict", "the file is damaged", "gguf", rope_of_another_type),
    case("convert/gguf_file.py::GgufFile._bad", "get it again", "gguf", cut("m.gguf", 9000)),
    case("convert/gguf_file.py::GgufFile._parse", "get it again", "gguf", at_tensor("output.weight", 24, "<Q", 0)),
    case("convert/gguf_file.py::GgufFile._tensor", "get it again", "gguf", cut("m.gguf", 300_000)),
    case(
        "convert/gguf_file.py::GgufFile._unknown_kind",
        "get it again",
        "gguf",
        at_tensor("output.weight", 20, "<I", 1 << 20),
    ),
    case(
        "convert/gguf_file.py::GgufFile._unknown_kind",
        "upgrade the gguf package",
        "gguf",
        quantised_gguf,
        older=older_gguf,
        newer=lambda patch: None,
    ),
    case(
        "convert/gguf_tokenizer.py::_named_ids",
        "the GGUF file is damaged",
        "gguf",
        gguf_with(BYTES, unknown_token_id=4000),
    ),
    case("convert/gguf_tokenizer.py::_strings", "the GGUF file is damaged", "gguf", gguf_with(BYTES, merges=None)),
    case("convert/gguf_tokenizer.py::_token_types", "newer GGUF", "gguf", gguf_with(BYTES, token_type=None)),
    case("convert/gguf_tokenizer.py::_token_types", "is damaged", "gguf", gguf_with(BYTES, token_type=[99] * 3008)),
    case("convert/gguf_tokenizer.py::_merges", "the GGUF file is damaged", "gguf", gguf_with(BYTES, merges=["ab"])),
    case("convert/gguf_tokenizer.py::_sentencepiece", "is damaged", "spm gguf", gguf_with(PIECES, scores=[1.0])),
    # Meta's folders.
    case("convert/meta.py::MetaFolder.__init__", "correct the file", "meta", cut("params.json", 20)),
    case(
        "convert/meta.py::MetaFolder._embedding",
        "do not belong together",
        "meta",
        lambda f: edit_params(f, {"dim": 32}),
    ),
    case(
        "convert/meta.py::MetaFolder._check",
        "do not belong together",
        "meta",
        lambda f: edit_shard(f, 0, lambda t: t.pop("norm.weight")),
    ),
    case(
        "convert/meta.py::_ranked",
        "get them again",
        "rank meta",
        text("tokenizer.model", ranks(lambda lines: [*lines, b"enEwMQ== 384", b"enEwMg== 385"])),
    ),
    case(
        "convert/meta_tokenizer.py::read_ranks",
        "get it again",
        "rank meta",
        text("tokenizer.model", ranks(lambda lines: lines[:200])),
    ),
    # Tokenizers.
    case(f"{TOK}loading.py::_json_object", "fetch the file again", "tokenizer", cut("tokenizer_config.json", 20)),
    case(
        f"{TOK}added.py::add_tokens",
        "fetch them again",
        "tokenizer",
        json_of("tokenizer_config.json", added_tokens_decoder={"7": {"content": "<|im_start|>"}}),
    ),
    case(
        f"{TOK}added.py::_decoder",
        "fetch the file again",
        "tokenizer",
        json_of("tokenizer_config.json", added_tokens_decoder={"x": {}}),
    ),
    case(f"{TOK}added.py::_ids", "fetch the file again", "tokenizer", text("added_tokens.json", b'{"<x>": -1}')),
    case(f"{TOK}loading.py::_templates", "fetch the file again", "tokenizer", text("chat_template.jinja", b"\xff\xff")),
    case(f"{TOK}sentencepiece_bpe.py::_read", "fetch the file again", "pieces", cut("tokenizer.model", 99)),
    case(f"{TOK}sentencepiece_bpe.py::load_model", "fetch the file again", "pieces", a_piece_that_is_no_text),
    case(f"{TOK}tokenizer.py::call_backend", "fetch them again", "tokenizer", cut("tokenizer.json", 999)),
)
