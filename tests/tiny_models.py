"""Small random models, written in other programs' formats by those programs' own libraries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from llama_jax.checkpoint import load_params
from llama_jax.config import LlamaConfig, config_from_hf
from llama_jax.convert import convert
from llama_jax.errors import LlamaJaxError
from llama_jax.params import flatten, param_specs

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
LLAMA4 = LLAMA | {
    "model_type": "llama4_text",
    "num_local_experts": 3,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 40,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8,
}


def random_leaves(config: LlamaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Every canonical leaf, dotted name to array in the config's dtype."""
    rng = np.random.default_rng(seed)
    return {s.name: rng.standard_normal(s.shape).astype(DTYPES[config.dtype]) for s in param_specs(config)}


def hf_tensors(config: LlamaConfig, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The leaves as `save_pretrained` of transformers names and stacks them."""
    tensors, done = {}, set()
    for spec in param_specs(config):
        leaf = leaves[spec.name]
        if spec.name in done:
            continue
        if "{e}" in spec.hf:
            tensors |= {spec.hf.format(e=e): leaf[e] for e in range(len(leaf))}
        elif spec.name.endswith("experts.gate_proj.weight"):
            up = spec.name.replace("gate_proj", "up_proj")
            done.add(up)
            fused = np.concatenate([leaf, leaves[up]], axis=1).swapaxes(1, 2)
            tensors[spec.hf.replace("gate_proj", "gate_up_proj")] = np.ascontiguousarray(fused)
        elif spec.name.endswith("experts.down_proj.weight"):
            tensors[spec.hf] = np.ascontiguousarray(leaf.swapaxes(1, 2))
        else:
            tensors[spec.hf] = leaf
    return tensors


def write_hf(
    folder: Path,
    hf: Mapping[str, Any],
    *,
    tensors: Mapping[str, np.ndarray] | None = None,
    shards: int = 1,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Writes a Hugging Face folder and returns the canonical leaves that a conversion must give."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_from_hf(hf)
    leaves = random_leaves(config, seed)
    tensors = dict(hf_tensors(config, leaves) if tensors is None else tensors)
    (folder / "config.json").write_text(json.dumps(hf))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return leaves
    names, index = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return leaves


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def write_gguf(
    path: Path,
    hf: Mapping[str, Any],
    *,
    arch: str = "llama",
    quantisation: gguf.GGMLQuantizationType | None = None,
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    drop: str = "",
    seed: int = 0,
    tensors_a_part: int = 0,
    single_experts: bool = False,
) -> dict[str, np.ndarray]:
    """Writes a GGUF file with llama.cpp's own writer and returns the canonical leaves (before any quantisation).

    `tensors_a_part` splits it into several files, named as by gguf-split; `single_experts` leaves experts unstacked.
    """
    config = config_from_hf(hf)
    leaves = random_leaves(config, seed)
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=tensors_a_part)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(hf.get("intermediate_size_mlp", hf["intermediate_size"]))
    if arch == "llama4":
        writer.add_expert_feed_forward_length(hf["intermediate_size"])
        writer.add_interleave_moe_layer_step(hf["interleave_moe_layer_step"])
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    if "num_local_experts" in hf:
        writer.add_expert_count(hf["num_local_experts"])
        writer.add_expert_used_count(hf["num_experts_per_tok"])
    writer.add_string("general.license", "apache-2.0")
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (extra or {}).items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add.get(type(value), writer.add_array)(key, value)
    for spec in param_specs(config):
        if spec.gguf == drop:
            continue
        array = leaves[spec.name]
        if arch in ("llama", "smollm3") and (".q_proj." in spec.name or ".k_proj." in spec.name):
            array = permute(array, config.num_heads if ".q_proj." in spec.name else config.num_kv_heads)
        if single_experts and "_exps." in spec.gguf:
            for e, expert in enumerate(array):
                writer.add_tensor(spec.gguf.replace("_exps.", f".{e}."), expert)
        elif array.dtype == ml_dtypes.bfloat16:
            writer.add_tensor(spec.gguf, array.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        elif quantisation is not None and array.ndim > 1:
            writer.add_tensor(spec.gguf, gguf.quantize(array, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(spec.gguf, np.ascontiguousarray(array))
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return leaves


def loaded(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint by their dotted names."""
    return {name: np.asarray(leaf) for name, leaf in flatten(load_params(path)).items()}


def assert_equal(path: Path, leaves: Mapping[str, np.ndarray]) -> None:
    """The checkpoint holds just these tensors, bit for bit."""
    found = loaded(path)
    assert found.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert found[name].dtype == leaf.dtype, name
        assert found[name].tobytes() == leaf.tobytes(), name


def refusal(source: Path, kind: type[LlamaJaxError] = LlamaJaxError) -> LlamaJaxError:
    """The error of a conversion that is refused; it is one line, has a hint, and nothing is written."""
    with pytest.raises(kind) as e:
        convert(source, source.parent / "out")
    assert e.value.hint
    assert "\n" not in e.value.message
    assert not list(source.parent.glob("out*"))
    return e.value
