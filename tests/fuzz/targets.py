"""Targets of the fuzzer: one row of TARGETS a reader.

A row is a folder of sound files, the one among them that is replaced by fuzzed bytes, the function that reads the
folder, and how to make new bytes out of old ones. Readers check what they are promised: `assert` in them is a finding.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import safetensors
from tiny_models import LLAMA, LLAMA4, MIXTRAL, hf_tensors, random_leaves, write_gguf, write_hf
from torch_writer import torch_save

from fuzz.mutate_binary import gguf_mutator, safetensors_mutator
from fuzz.mutate_json import Mutator, damaged, json_mutator
from fuzz.mutate_torch import torch_mutator
from llama_jax.adapters import load_adapter
from llama_jax.checkpoint import open_checkpoint, save
from llama_jax.checkpoint.array_store import _values, _whole, find_arrays
from llama_jax.checkpoint.format import DTYPES, MARKER, PARAMS, read_json
from llama_jax.checkpoint.lock import LOCK_FILE
from llama_jax.checkpoint.read import verify
from llama_jax.checkpoint.source import ModelSource
from llama_jax.cli.chat_conversation import default_sampling
from llama_jax.config import LlamaConfig, config_from_hf, config_to_hf
from llama_jax.convert import convert
from llama_jax.convert.folders import INDEX, SINGLE
from llama_jax.convert.gguf import GgufModel
from llama_jax.convert.hf import HuggingFaceFolder
from llama_jax.convert.meta import MetaFolder
from llama_jax.convert.safetensors_file import SafetensorsFile
from llama_jax.convert.torch_file import TorchFile
from llama_jax.convert.verify import verify_source
from llama_jax.errors import CheckpointError
from llama_jax.model.loaded import Model
from llama_jax.params import count_params, param_specs, unflatten

DATA = Path(__file__).parents[1] / "data"
TINY = LLAMA | {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 12, "head_dim": 4}


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
      folder: writes a folder of sound files.
      file: the one that is fuzzed, relative to the folder.
      read: reads the folder; may raise LlamaJaxError.
      mutator: takes the seeds and gives the function that makes new inputs.
      seeds: more sound contents of `file`, besides the one that `folder` writes.
    """

    name: str
    folder: Callable[[Path], None]
    file: str
    read: Callable[[Path], object]
    mutator: Callable[[list[bytes]], Mutator]
    seeds: Callable[[Path], Iterable[bytes]] = lambda scratch: ()

    def prepare(self, folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
        """Writes the sound files. Returns the function to fuzz and the seeds."""
        folder.mkdir(parents=True, exist_ok=True)
        home, scratch = folder / "input", folder / "scratch"
        scratch.mkdir()
        self.folder(home)
        seeds = [(home / self.file).read_bytes(), *self.seeds(scratch)]

        def run(data: bytes) -> None:
            (home / self.file).write_bytes(data)
            self.read(home)

        return run, seeds


# --- Readers ----------------------------------------------------------------------------------------------------------


def read_safetensors(folder: Path) -> None:
    """Every tensor, compared with the safetensors library: what it refuses or reads otherwise must not pass here."""
    path = folder / SINGLE
    with closing(SafetensorsFile(path)) as file:
        data = {name: np.empty(entry.nbytes, np.uint8) for name, entry in file.entries.items()}
        for name, out in data.items():
            file.read_into(name, out)
        theirs = dict(safetensors.deserialize(path.read_bytes()))
        assert theirs.keys() == data.keys()
        for name, entry in file.entries.items():
            assert (theirs[name]["dtype"], tuple(theirs[name]["shape"])) == (entry.dtype, entry.shape)
            assert bytes(theirs[name]["data"]) == data[name].tobytes()


def read_source(model: ModelSource) -> None:
    """Everything that a conversion reads."""
    check_config(model.config.replace(schemes=()))
    for spec in param_specs(model.config):
        array = model.read(spec)
        assert (array.shape, array.dtype) == (spec.shape, model.dtype(spec))
    for name, content in model.files.items():
        assert ".." not in Path(name).parts
        assert isinstance(content, bytes | str)
    check_generation_config(model.config, model.generation_config)


def read_hf(folder: Path) -> None:
    """With quantised weights as they are stored; where there are any, decoded too."""
    with closing(HuggingFaceFolder(folder, dequantize=False)) as model:
        for file in model._files:
            assert file.path.resolve().is_relative_to(folder.resolve())
        read_source(model)
        quantised = model.config.schemes
    if quantised:
        with closing(HuggingFaceFolder(folder)) as model:
            read_source(model)


def read_gguf(folder: Path) -> None:
    """As `read_hf`."""
    with closing(GgufModel(folder / "model.gguf", dequantize=False)) as model:
        read_source(model)
        quantised = model.config.schemes
    if quantised:
        with closing(GgufModel(folder / "model.gguf")) as model:
            read_source(model)


def read_torch(folder: Path) -> None:
    with closing(TorchFile(folder / "pytorch_model.bin")) as file:
        for name, entry in file.entries.items():
            file.read_into(name, np.empty(entry.nbytes, np.uint8))


def read_meta(folder: Path) -> None:
    with closing(MetaFolder(folder)) as model:
        read_source(model)


def read_config(folder: Path) -> None:
    config = config_from_hf(read_json(folder / "config.json"))
    check_config(config)


def read_checkpoint(folder: Path) -> None:
    """The metadata, and the tensors that it names."""
    opened = open_checkpoint(folder)
    check_config(opened.config)
    check_generation_config(opened.config, opened.generation_config)
    assert all(isinstance(text, str) for text in (opened.source.kind, opened.source.name, opened.tool, opened.dtype))
    assert all(isinstance(text, str | None) for text in (opened.source.revision, opened.source.licence))
    assert opened.dtype in DTYPES
    for name, value in opened.file_digests.items():
        assert isinstance(value, str)
        assert (folder / name).resolve().is_relative_to(folder.resolve()), f"{name!r} leads out of the folder"
    assert opened.nbytes >= 0
    verify(folder)


def read_lock(folder: Path) -> None:
    """All that uses the lock."""
    verify(folder / "out")
    verify_source(folder / "out", folder / "source")


def read_zarr(folder: Path) -> None:
    """The metadata of one array in a store that else is sound, and the rows of what it then describes."""
    values = dict(_values(folder / PARAMS / "state")) | {"embed.weight/zarr.json": (folder / "zarr.json").read_bytes()}
    try:
        array = find_arrays(values)["embed.weight"]
        if array.chunks is not None and math.prod(array.shape) < 1 << 20:
            array.read_rows(0, np.empty(array.shape, np.float32 if array.dtype == "float32" else np.float16))
    except (ValueError, OSError) as error:  # TensorReader makes a CheckpointError of these
        raise CheckpointError(f"{folder}: {error}") from error


def check_config(config: LlamaConfig) -> None:
    """An accepted input can be hashed, counted and written, and reads the same again."""
    hash(config)
    assert config.context_length > 0
    count_params(config)
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config), allow_nan=False))) == config


def check_generation_config(config: LlamaConfig, values: Mapping[str, Any]) -> None:
    """The questions of chat and generate."""
    ids = Model({}, config, generation_config=values).eos_token_ids
    assert all(type(i) is int for i in ids)
    default_sampling(values, {})


# --- Sound files ------------------------------------------------------------------------------------------------------


def hf_folder(hf: Mapping[str, Any] = TINY, *, shards: int = 1) -> Callable[[Path], None]:
    return lambda folder: _discard(write_hf(folder, hf, shards=shards))


def gguf_folder(
    hf: Mapping[str, Any], tokenizer: str, extra: Mapping[str, Any] | None = None, **options: Any
) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        metadata = _tokenizer(tokenizer, hf["vocab_size"]) | dict(extra or {})
        write_gguf(folder / "model.gguf", hf, extra=metadata, **options)

    return write


def bin_folder(folder: Path) -> None:
    write_hf(folder, TINY)
    (folder / SINGLE).unlink()
    config = config_from_hf(TINY)
    torch_save(hf_tensors(config, random_leaves(config)), folder / "pytorch_model.bin")


def meta_folder(case: str, shards: int, tokenizer: Path) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        shutil.copytree(DATA / "meta" / case / str(shards), folder)
        shutil.copy(DATA / "meta" / case / "params.json", folder)
        shutil.copy(tokenizer, folder / "tokenizer.model")

    return write


def stored_folder(name: str) -> Callable[[Path], None]:
    return lambda folder: _discard(shutil.copytree(DATA / name, folder))


def checkpoint_folder(folder: Path) -> None:
    config = config_from_hf(TINY)
    files = {"tokenizer.json": "{}", "tokenizer_config.json": "{}"}
    generation = {"eos_token_id": [2, 3], "temperature": 0.5, "top_p": 0.9, "top_k": 4, "do_sample": True}
    save(folder, unflatten(random_leaves(config)), config, generation_config=generation, files=files)


def converted_folder(folder: Path) -> None:
    write_hf(folder / "source", TINY)
    convert(folder / "source", folder / "out")


def zarr_folder(folder: Path) -> None:
    checkpoint_folder(folder)
    metadata = dict(_values(folder / PARAMS / "state"))["embed.weight/zarr.json"]
    (folder / "zarr.json").write_bytes(metadata if isinstance(metadata, bytes) else _whole(metadata))


def _discard(value: object) -> None:
    """For functions that are called for what they write."""


def _tokenizer(kind: str, size: int) -> dict[str, Any]:
    """GGUF metadata of a vocabulary of `size` tokens; lists become arrays."""
    common = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * (size - 3),
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"[: size - 4], "ab"],
    }
    if kind == "llama":
        return common | {"tokenizer.ggml.scores": [0.0] * 3 + [-float(i) for i in range(size - 3)]}
    return common | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.merges": ["a b"]}


def _gguf_seeds(scratch: Path) -> Iterable[bytes]:
    wide = TINY | {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    scaled = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    factors = {"rope_freqs.weight": np.ones(TINY["head_dim"] // 2, np.float32)}
    mixtral = TINY | {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
    for i, write in enumerate(
        (
            gguf_folder(TINY, "llama", tensors=factors),
            gguf_folder(mixtral, "gpt2"),
            gguf_folder(wide, "gpt2", quantisation=gguf.GGMLQuantizationType.Q8_0),
            gguf_folder(TINY, "llama", extra=scaled | {"llama.rope.scaling.original_context_length": 32}),
            gguf_folder(TINY | {"model_type": "qwen2"}, "gpt2", arch="qwen2"),
        )
    ):
        write(scratch / str(i))
        yield (scratch / str(i) / "model.gguf").read_bytes()


def _safetensors_seeds(scratch: Path) -> Iterable[bytes]:
    from safetensors.numpy import save as to_bytes

    yield to_bytes({})
    yield to_bytes({"a": np.zeros((2, 3), np.float16), "b": np.zeros(0, np.int64), "c": np.zeros((), np.bool_)})
    yield to_bytes({"x": np.ones(3, ml_dtypes.bfloat16), "y": np.ones((1, 1, 2), np.uint8)}, {"format": "pt"})


def _config_seeds(scratch: Path) -> Iterable[bytes]:
    for hf in (LLAMA, MIXTRAL, LLAMA4):
        yield json.dumps(hf).encode()
    for file in sorted((DATA / "goldens").glob("*/config.json")):
        yield file.read_bytes()
    for case in json.loads((DATA / "hf_configs.json").read_text()):
        yield json.dumps(case["given"]).encode()


def _fitting_config_seeds(scratch: Path) -> Iterable[bytes]:
    """Configs that fit the tensors of TINY."""
    yield json.dumps({k: v for k, v in TINY.items() if k != "rope_parameters"} | {"rope_theta": 1e4}).encode()
    for kind in ("mistral", "mixtral", "qwen2", "llama4_text"):
        yield json.dumps(LLAMA4 | MIXTRAL | TINY | {"model_type": kind}).encode()


def _torch_seeds(scratch: Path) -> Iterable[bytes]:
    for file in sorted((DATA / "torch").glob("*.bin")):
        yield file.read_bytes()


def _params_seeds(scratch: Path) -> Iterable[bytes]:
    for file in sorted((DATA / "meta").glob("*/params.json")):
        yield file.read_bytes()


def _bytes_mutator(seeds: list[bytes]) -> Mutator:
    """For texts without a structure of their own."""
    return damaged


def _generation_seeds(scratch: Path) -> Iterable[bytes]:
    yield b'{"eos_token_id": 2, "repetition_penalty": 1.1, "min_p": 0.05, "max_new_tokens": 10, "num_beams": 1}'


def adapter_folder(folder: Path) -> None:
    """An adapter with magnitudes and patterns, of every layer of its base."""
    shutil.copytree(DATA / "lora" / "dora-llama", folder)


def read_adapter(folder: Path) -> None:
    """Reads it with the config of its base, and digests every array."""
    adapter = load_adapter(folder, _ADAPTED)
    assert adapter.digest
    assert len(adapter.about.scales) == len(adapter.leaves)


def _adapter_seeds(scratch: Path) -> Iterable[bytes]:
    about = json.loads((DATA / "lora" / "dora-llama" / "adapter_config.json").read_text())
    yield json.dumps(about | {"target_modules": "all-linear", "rank_pattern": {"q_proj": 4}}).encode()
    pattern = r".*\.(self_attn|mlp)\.[a-z]+_proj"
    yield json.dumps(about | {"target_modules": pattern, "layers_to_transform": [0, 1, 2], "use_rslora": True}).encode()


_ADAPTED = config_from_hf(json.loads((DATA / "goldens" / "llama3.1-rope" / "config.json").read_text()))

RANKS = DATA / "meta" / "tokenizer.model"
PIECES = DATA / "tokenizer" / "few_pieces.model"
QUANTIZED = ("awq", "bnb-nf4-nested", "bnb-int8", "ct-two-groups", "fp8-block", "gptq-int4-act-order")

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("safetensors", hf_folder(), SINGLE, read_safetensors, safetensors_mutator, _safetensors_seeds),
        Target("hf_weights", hf_folder(), SINGLE, read_hf, safetensors_mutator),
        Target("hf_index", hf_folder(shards=2), INDEX, read_hf, json_mutator),
        Target("hf_config", hf_folder(), "config.json", read_hf, json_mutator, _fitting_config_seeds),
        Target("hf_generation", hf_folder(), "generation_config.json", read_hf, json_mutator, _generation_seeds),
        Target("config", hf_folder(), "config.json", read_config, json_mutator, _config_seeds),
        Target("gguf", gguf_folder(TINY, "gpt2"), "model.gguf", read_gguf, gguf_mutator, _gguf_seeds),
        Target("torch", bin_folder, "pytorch_model.bin", read_torch, torch_mutator, _torch_seeds),
        Target("hf_bin", bin_folder, "pytorch_model.bin", read_hf, torch_mutator),
        Target("meta_params", meta_folder("llama3.1", 2, RANKS), "params.json", read_meta, json_mutator, _params_seeds),
        Target("meta_tokenizer", meta_folder("llama3.1", 2, RANKS), "tokenizer.model", read_meta, _bytes_mutator),
        Target("meta_weights", meta_folder("llama2", 2, PIECES), "consolidated.01.pth", read_meta, torch_mutator),
        *(
            Target(f"quantized_{case}", stored_folder(f"quantized/{case}"), "config.json", read_hf, json_mutator)
            for case in QUANTIZED
        ),
        *(
            Target(
                f"quantized_weights_{case}", stored_folder(f"quantized/{case}"), SINGLE, read_hf, safetensors_mutator
            )
            for case in ("gptq-int4-act-order", "bnb-nf4-nested")
        ),
        Target("adapter_config", adapter_folder, "adapter_config.json", read_adapter, json_mutator, _adapter_seeds),
        Target("adapter_weights", adapter_folder, "adapter_model.safetensors", read_adapter, safetensors_mutator),
        Target("checkpoint_lock", converted_folder, f"out/{LOCK_FILE}", read_lock, json_mutator),
        Target("checkpoint_zarr", zarr_folder, "zarr.json", read_zarr, json_mutator),
        Target("checkpoint_marker", checkpoint_folder, MARKER, read_checkpoint, json_mutator),
        Target(
            "checkpoint_tensors", checkpoint_folder, f"{PARAMS}/_CHECKPOINT_METADATA", read_checkpoint, json_mutator
        ),
    )
}
