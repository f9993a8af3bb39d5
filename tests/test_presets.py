"""Presets against the published sizes of their models."""

from __future__ import annotations

import pytest

from llama_jax.config import PRESETS, config_from_hf, config_to_hf, preset
from llama_jax.errors import ModelNotFound
from llama_jax.params import count_params

# Llama 4's repositories hold the vision encoder and projector too: 871,932,416 parameters, the same in both.
LLAMA4_VISION = 871_932_416

# Totals of the safetensors metadata of the models' repositories on the Hugging Face hub; tied weights count once.
# CodeLlama 70B is derived: Llama 2 70B and the 16 added tokens in embedding and head.
PUBLISHED = {
    "llama-1-7b": 6_738_415_616,
    "llama-1-13b": 13_015_864_320,
    "llama-1-30b": 32_528_943_616,
    "llama-1-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "codellama-7b": 6_738_546_688,
    "codellama-13b": 13_016_028_160,
    "codellama-34b": 33_743_970_304,
    "codellama-70b": 68_976_648_192 + 2 * 16 * 8192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "llama-4-scout": 108_641_793_536 - LLAMA4_VISION,
    "llama-4-maverick": 401_583_781_376 - LLAMA4_VISION,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
}


def test_every_preset_has_a_published_size() -> None:
    assert PRESETS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name: str) -> None:
    assert count_params(preset(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_round_trip(name: str) -> None:
    config = preset(name)
    assert config_from_hf(config_to_hf(config)) == config


def test_names_are_forgiving_about_case_only() -> None:
    assert preset("Llama-2-7B") == preset("llama-2-7b")
    with pytest.raises(ModelNotFound) as error:
        preset("llama-3.1-7b")
    assert "llama-3.1-70b" in error.value.hint
    with pytest.raises(ModelNotFound, match="presets"):
        preset("zzzzz")


def test_shapes_of_generations() -> None:
    assert preset("llama-1-7b").max_position_embeddings == 2048
    assert preset("llama-3-8b").rope.kind == "default"
    assert preset("llama-3.1-8b").rope.kind == "llama3"
    assert [layer.window for layer in preset("mistral-7b-v0.1").layers] == [4096] * 32
    assert preset("mistral-7b-v0.3").layers[0].window is None
    assert [layer.rope for layer in preset("smollm3-3b").layers] == [True, True, True, False] * 9
    maverick = preset("llama-4-maverick")
    assert [isinstance(layer.mlp, int) for layer in maverick.layers] == [True, False] * 24
    assert {layer.qk_norm for layer in maverick.layers} == {"none"}
    assert {layer.qk_norm for layer in preset("llama-4-scout").layers if layer.rope} == {"l2"}
