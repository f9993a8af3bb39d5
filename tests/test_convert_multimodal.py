"""Text models in multimodal checkpoints: config, names, layers, tied embeddings, and the numbers of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import LLAMA, assert_equal, hf_tensors, loaded, random_leaves, write_hf

from llama_jax.checkpoint import load_params, open_checkpoint
from llama_jax.config import config_from_hf, config_to_hf
from llama_jax.convert import convert
from llama_jax.errors import CheckpointError, UnsupportedModel
from llama_jax.measure import verification

DATA = Path(__file__).parent / "data" / "multimodal"
CASES = {"mllama": "LlamaForCausalLM", "mistral3": "MistralForCausalLM", "mistral3-tied": "MistralForCausalLM"}


def config_json(case: str) -> dict[str, Any]:
    return json.loads((DATA / case / "config.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    path = convert(DATA / case, tmp_path / "out")
    config = open_checkpoint(path).config
    inputs = verification.read_inputs(DATA / case / "expected.npz")
    computed = verification.compute(load_params(path, dtype=jnp.float32), config, inputs)
    result = verification.compare(computed, inputs, DATA / case / "expected.npz")
    assert result.ok, result.reasons
    assert result.greedy_match
    # What was written is a plain text model.
    written = json.loads((path / "config.json").read_text())
    assert written["architectures"] == [CASES[case]]
    assert "text_config" not in written
    assert "vision_config" not in written


def test_layers_that_look_at_images_are_left_out(tmp_path: Path) -> None:
    source = load_file(DATA / "mllama" / "model.safetensors")
    found = loaded(convert(DATA / "mllama", tmp_path / "out"))
    name = "self_attn.q_proj.weight"
    for ours, theirs in ((0, 0), (1, 2)):
        leaf = found[f"layers.{ours}.attn.q_proj.weight"]
        np.testing.assert_array_equal(leaf, source[f"language_model.model.layers.{theirs}.{name}"])
    assert not any(leaf.startswith("layers.2.") for leaf in found)
    embedding = source["language_model.model.embed_tokens.weight"]
    assert embedding.shape[0] == 96 + 8
    np.testing.assert_array_equal(found["embed.weight"], embedding[:96])


def test_mllama_defaults() -> None:
    """Those of transformers' MllamaTextConfig: Llama-3.2-11B-Vision without a single key."""
    config = config_from_hf({"model_type": "mllama", "text_config": {"model_type": "mllama_text_model"}})
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (32, 4096, 128256)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (32, 8, 128)
    assert config.rope.theta == 500_000.0
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (128000, (128001,), 128004)
    assert not config.tie_word_embeddings
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"cross_attention_layers": [0, 1, 2, 3]}, "cross_attention_layers"),
        ({"cross_attention_layers": "all"}, "cross_attention_layers"),
        ({"cross_attention_layers": [-1]}, "cross_attention_layers"),
        ({"num_hidden_layers": 10**9}, r"text_config\.num_hidden_layers"),
        ({"num_hidden_layers": "4"}, r"text_config\.num_hidden_layers"),
        ({"model_type": "gemma"}, "'gemma' is not supported"),
    ],
)
def test_wrong_values_are_named(keys: dict[str, Any], message: str) -> None:
    hf = config_json("mllama")
    hf["text_config"] |= keys
    with pytest.raises(UnsupportedModel, match=message):
        config_from_hf(hf)


NAMES = {
    "old": ("language_model.model.", "language_model.lm_head."),
    "new": ("model.language_model.", "lm_head."),
}
WRAPPED = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
}


def write_wrapped(
    folder: Path, style: str, model_type: str, top: dict[str, Any], text: dict[str, Any], drop: str = ""
) -> dict[str, np.ndarray]:
    """A multimodal folder around a random text model; returns the leaves of that."""
    hf = {"model_type": model_type, "architectures": [WRAPPED[model_type]], "text_config": text} | top
    config = config_from_hf(hf).replace(tie_word_embeddings=False)
    leaves = random_leaves(config)
    model, head = NAMES[style]
    tensors = {}
    for name, array in hf_tensors(config, leaves).items():
        if name != drop:
            tensors[name.replace("model.", model, 1) if name.startswith("model.") else head + "weight"] = array
    for name in ("vision_tower.patch_conv.weight", "multi_modal_projector.linear_1.weight", "image_newline"):
        tensors[name if style == "old" else f"model.{name}"] = np.zeros(3, np.float32)
    write_hf(folder, hf, tensors=tensors)
    return leaves


@pytest.mark.parametrize("style", NAMES)
@pytest.mark.parametrize("model_type", WRAPPED)
@pytest.mark.parametrize("dtype", ["dtype", "torch_dtype"])
def test_old_and_new_names_and_dtypes(tmp_path: Path, style: str, model_type: str, dtype: str) -> None:
    text = {k: v for k, v in LLAMA.items() if k != "dtype"} | {"model_type": "mistral", "sliding_window": None}
    leaves = write_wrapped(tmp_path / "hf", style, model_type, {dtype: "float32"}, text)
    path = convert(tmp_path / "hf", tmp_path / "out")
    assert_equal(path, leaves)
    assert open_checkpoint(path).config.dtype == "float32"
    inside = {"model_type": model_type, "text_config": text | {dtype: "float16"}}
    assert config_from_hf(inside).dtype == "float16"


@pytest.mark.parametrize("said", [None, True, False])
@pytest.mark.parametrize("head", ["own", "none"])
def test_the_weights_say_whether_embeddings_are_tied(tmp_path: Path, said: bool | None, head: str) -> None:
    """transformers 5 writes false into text_config whatever is tied, and ties nothing that differs."""
    top = {} if said is None else {"tie_word_embeddings": said}
    text = LLAMA | {"tie_word_embeddings": False}
    drop = "lm_head.weight" if head == "none" else ""
    leaves = write_wrapped(tmp_path / "hf", "old", "llava", top, text, drop)
    if head == "none" and said is False:
        with pytest.raises(CheckpointError, match=r"lacks tensor lm_head\.weight"):
            convert(tmp_path / "hf", tmp_path / "out")
        return
    path = convert(tmp_path / "hf", tmp_path / "out")
    assert open_checkpoint(path).config.tie_word_embeddings == (head == "none")
    assert_equal(path, {n: a for n, a in leaves.items() if n != "lm_head.weight" or head == "own"})


def test_a_tokenizer_may_name_images_but_no_more(tmp_path: Path) -> None:
    """The rows behind the vocabulary are there for it: <|image|> is the first of them."""
    folder = Path(shutil.copytree(DATA / "mllama", tmp_path / "hf"))
    for size, fits in ((96 + 8, True), (96 + 9, False)):
        vocabulary = {f"t{i}": i for i in range(size)}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
        if fits:
            convert(folder, tmp_path / "out")
        else:
            with pytest.raises(CheckpointError, match="ids up to 104, the model's vocabulary ends at 103"):
                convert(folder, tmp_path / "out2")


def test_a_cross_attention_layer_that_config_json_does_not_name(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DATA / "mllama", tmp_path / "hf"))
    hf = config_json("mllama")
    hf["text_config"]["cross_attention_layers"] = [1]
    (folder / "config.json").write_text(json.dumps(hf))
    with pytest.raises(CheckpointError, match=r"layers\.2\.(self_attn|cross_attn)"):
        convert(folder, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    save_file({n: a for n, a in tensors.items() if ".layers.2." not in n}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="lacks tensor"):
        convert(folder, tmp_path / "out")
