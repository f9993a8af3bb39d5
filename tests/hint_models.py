"""Sound models, one of each kind that a hint speaks of, and ways to damage them."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from test_checkpoint import METADATA, edit_json
from test_convert_meta import FEW_PIECES, write_meta, write_tiny
from test_convert_quantized import DATA as QUANTIZED
from test_schemes import stored
from tiny_chat_model import write_chat_model
from tiny_models import LLAMA, random_leaves, write_gguf, write_hf
from torch_writer import torch_save

from llama_jax.checkpoint import load_params
from llama_jax.checkpoint.checkpoint_source import CheckpointSource
from llama_jax.checkpoint.lock import read_lock
from llama_jax.config import config_from_hf
from llama_jax.convert import convert, export_hf
from llama_jax.convert.opening import open_source
from llama_jax.library.configs import find_config
from llama_jax.params import param_specs
from llama_jax.text.tokenizer import load_tokenizer

TOKENIZER_DATA = Path(__file__).parent / "data" / "tokenizer"
RANKS = Path(__file__).parent / "data" / "meta" / "tokenizer.model"


# --- Sound models, and how they are used ------------------------------------------------------------------------------


def read_all(folder: Path) -> None:
    """Opens a source and reads all of it. A file called `later` in the folder cuts the weights while they are open."""
    source = open_source(folder)
    try:
        if (folder / "later").exists():
            os.truncate(folder / "model.safetensors", 3000)
        _ = source.files, source.generation_config
        for spec in param_specs(source.config):
            source.read(spec)
    finally:
        source.close()


def convert_it(folder: Path) -> None:
    convert(folder, folder.with_name("out"), overwrite=True)


def load_it(folder: Path) -> None:
    load_params(folder)


def write_bin(folder: Path) -> None:
    write_hf(folder, LLAMA)
    torch_save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def write_rank_meta(folder: Path) -> None:
    config = config_from_hf(LLAMA | {"vocab_size": 640, "head_dim": 4})
    write_meta(folder, config, random_leaves(config), RANKS, embed_axis=0)


def write_checkpoint(folder: Path) -> None:
    shutil.move(convert(write_chat_model(folder.with_name("source")), folder.with_name("made")), folder)


def gguf_with(name: str, **changes: Any) -> Callable[[Path], None]:
    """A GGUF file with a tokenizer, of which some keys (below tokenizer.ggml) are changed."""

    def write(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        metadata = json.loads((TOKENIZER_DATA / name).read_text())
        hf = LLAMA | {"vocab_size": len(metadata["tokenizer.ggml.tokens"])}
        metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        ours = ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id")
        write_gguf(folder / "m.gguf", hf, extra={k: v for k, v in metadata.items() if k not in ours and v is not None})

    return write


BYTES, PIECES = "byte_level_gguf.json", "sentencepiece_gguf.json"
SOUND: dict[str, tuple[Callable[[Path], Any], Callable[[Path], None]]] = {
    "hf": (lambda f: write_hf(f, LLAMA), convert_it),
    "read": (lambda f: write_hf(f, LLAMA), read_all),
    "shards": (lambda f: write_hf(f, LLAMA, shards=2), read_all),
    "plan": (lambda f: write_hf(f, LLAMA), lambda f: [None, find_config(str(f))][0]),
    "bin": (write_bin, read_all),
    "gguf": (gguf_with(BYTES), read_all),
    "spm gguf": (gguf_with(PIECES), read_all),
    "meta": (lambda f: write_tiny(f, FEW_PIECES, shards=2), read_all),
    "rank meta": (write_rank_meta, read_all),
    "gptq": (lambda f: shutil.copytree(QUANTIZED / "gptq-int4", f), read_all),
    "bnb": (lambda f: shutil.copytree(QUANTIZED / "bnb-int8", f), read_all),
    "checkpoint": (write_checkpoint, load_it),
    "scheme": (lambda f: shutil.move(stored(f.parent)[0], f), lambda f: [None, CheckpointSource(f)][0]),
    "lock": (write_checkpoint, lambda f: [None, read_lock(f)][0]),
    "export": (write_checkpoint, lambda f: [None, export_hf(f, f.with_name("exported"), overwrite=True)][0]),
    "tokenizer": (write_chat_model, lambda f: [None, load_tokenizer(f)][0]),
    "pieces": (lambda f: write_tiny(f, TOKENIZER_DATA / "sentencepiece.model"), lambda f: [None, load_tokenizer(f)][0]),
}
"""Name to what writes a sound folder, and what uses it."""


# --- Damages ----------------------------------------------------------------------------------------------------------


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Replaces a file."""
    return lambda f: [None, (f / name).write_bytes(content if isinstance(content, bytes) else content.encode())][0]


def cut(name: str, nbytes: int) -> Callable[[Path], None]:
    return lambda f: os.truncate(f / name, nbytes)


def tensors(change: Callable[[dict[str, np.ndarray]], Any], name: str = "model.safetensors") -> Callable[[Path], None]:
    """Changes the tensors of a safetensors file."""

    def rewrite(folder: Path) -> None:
        found = load_file(folder / name)
        change(found)
        save_file(found, folder / name)

    return rewrite


def json_of(name: str, **values: Any) -> Callable[[Path], None]:
    return edit_json(name, lambda found: found.update(values))


def custom(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Changes our metadata in a checkpoint."""
    return edit_json(METADATA, lambda found: change(found["custom_metadata"]))


def two_schemes(found: dict[str, Any]) -> None:
    for member, scheme in (("a", "one"), ("b", "other")):
        found["digests"][f"x.{member}"] = "xxh3_128:0"
        found["tensors"][f"x.{member}"] = {"shape": [1], "dtype": "int8", "scheme": scheme}


def at_tensor(name: str, skip: int, fmt: str, value: int) -> Callable[[Path], None]:
    """Writes a number behind a tensor's name in the header of a GGUF file: dimensions, shape, type, offset."""

    def write(folder: Path) -> None:
        data = bytearray((folder / "m.gguf").read_bytes())
        at = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + skip
        data[at : at + struct.calcsize(fmt)] = struct.pack(fmt, value)
        (folder / "m.gguf").write_bytes(data)

    return write


def doubled(folder: Path) -> None:
    """A tensor of the first part is in the second as well."""
    one, two = (folder / f"model-{n:05}-of-00002.safetensors" for n in (1, 2))
    save_file(load_file(two) | dict([next(iter(load_file(one).items()))]), two)


def fewer_tensors(folder: Path) -> None:
    hf = LLAMA | {"vocab_size": 3008}
    write_gguf(folder / "m.gguf", hf, drop="output_norm.weight")


def rope_of_another_type(folder: Path) -> None:
    extra = {"llama.rope.scaling.original_context_length": "many"}
    write_gguf(folder / "m.gguf", LLAMA, extra=extra, tensors={"rope_freqs.weight": np.ones(4, np.float32)})


def a_piece_that_is_no_text(folder: Path) -> None:
    """A byte of a piece in tokenizer.model is changed."""
    data = (folder / "tokenizer.model").read_bytes()
    assert "\u2581the".encode() in data
    (folder / "tokenizer.model").write_bytes(data.replace("\u2581the".encode(), b"\xff\xff\xffthe", 1))


Q, O = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj.weight"  # noqa: E741
