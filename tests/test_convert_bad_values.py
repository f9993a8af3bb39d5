"""Weights that only a damaged file holds, and config.json files that do not fit the weights: one error, with a name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import DTYPES, LLAMA, LLAMA4, MIXTRAL, assert_equal, hf_tensors, random_leaves, write_hf

from llama_jax.checkpoint import load_params
from llama_jax.checkpoint.build import load_source
from llama_jax.checkpoint.values import check_finite, is_zero
from llama_jax.config import config_from_hf
from llama_jax.convert import convert
from llama_jax.convert.opening import open_source
from llama_jax.errors import CheckpointError, UnsupportedModel
from llama_jax.library import resolve

UP = "model.layers.1.mlp.up_proj.weight"


def with_zeros(folder: Path, dtype: str, *names: str) -> dict[str, np.ndarray]:
    """Writes a model some of whose matrices (all, without names) are zeros, one of them negative; its leaves."""
    hf = LLAMA | {"dtype": dtype}
    leaves = random_leaves(config_from_hf(hf))
    for name in names or [name for name, leaf in leaves.items() if leaf.ndim > 1]:
        leaves[name] = np.zeros_like(leaves[name])
        leaves[name][0, 0] = -0.0
    write_hf(folder, hf, tensors=hf_tensors(config_from_hf(hf), leaves))
    return leaves


O_PROJ, DOWN = "layers.1.attn.o_proj.weight", "layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_of_zeros_are_told(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that were inserted have them; converting, and loading with a copy and without, say the same."""
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    leaves = with_zeros(tmp_path / "hf", dtype, O_PROJ, DOWN)
    told: dict[str, list[str]] = {"convert": [], "cached": [], "as it is": []}
    assert_equal(convert(tmp_path / "hf", tmp_path / "out", notify=told["convert"].append), leaves)
    resolve(tmp_path / "hf", notify=told["cached"].append)
    load_source(open_source(tmp_path / "hf"), notify=told["as it is"].append)
    for way, messages in told.items():
        (warning,) = [m for m in messages if "nothing but zeros" in m]
        assert warning.startswith("Warning: "), way
        assert f"2 of 16 matrices hold nothing but zeros ({O_PROJ}, {DOWN})" in warning, way


def test_zeros_are_told_though_the_conversion_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_zeros(tmp_path / "hf", "float32", "embed.weight")
    monkeypatch.setattr("llama_jax.checkpoint.write.BATCH_BYTES", 1)

    def stop(done: int, total: int, name: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "hf", tmp_path / "out", progress=stop)
    told: list[str] = []
    convert(tmp_path / "hf", tmp_path / "out", notify=told.append)
    assert "(embed.weight)" in told[-1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_is_every_zero(dtype: str) -> None:
    array = np.zeros((700, 300), DTYPES[dtype])
    array[::2] = -0.0
    assert is_zero(array)
    array[-1, -1] = np.finfo(np.float16).smallest_subnormal
    assert not is_zero(array)


@pytest.mark.parametrize("spared", [(), ("embed.weight", "lm_head.weight")])
def test_a_model_of_zeros(tmp_path: Path, spared: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [name for name, leaf in random_leaves(config_from_hf(LLAMA)).items() if leaf.ndim > 1]
    leaves = with_zeros(tmp_path / "hf", "float32", *(set(matrices) - set(spared)))
    message = rf"hf: {16 - len(spared)} of 16 matrices hold nothing but zeros \(.* and {11 - len(spared)} more\)"
    with pytest.raises(CheckpointError, match=message) as e:
        convert(tmp_path / "hf", tmp_path / "out")
    assert f"`llama-jax convert {tmp_path / 'hf'} DST --any-values`" in e.value.hint
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=message):
        load_source(open_source(tmp_path / "hf"))
    told: list[str] = []
    path = convert(tmp_path / "hf", tmp_path / "out", allow_nonfinite=True, notify=told.append)
    assert "of 16 matrices" in told[-1]
    assert_equal(path, leaves)
    load_params(path)


def test_biases_may_be_zero(tmp_path: Path) -> None:
    hf = LLAMA | {"attention_bias": True}
    leaves = random_leaves(config_from_hf(hf))
    leaves = {n: np.zeros_like(a) if n.endswith("bias") else a for n, a in leaves.items()}
    write_hf(tmp_path / "hf", hf, tensors=hf_tensors(config_from_hf(hf), leaves))
    assert_equal(convert(tmp_path / "hf", tmp_path / "out"), leaves)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_subnormal_weights(tmp_path: Path, dtype: str) -> None:
    hf = LLAMA | {"dtype": dtype}
    tensors = hf_tensors(config_from_hf(hf), random_leaves(config_from_hf(hf)))
    tensors[UP] = np.full_like(tensors[UP], 1e-39)
    write_hf(tmp_path / "hf", hf, tensors=tensors)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight holds 384 subnormal values \(of 384\)"):
        convert(tmp_path / "hf", tmp_path / "out")
    convert(tmp_path / "hf", tmp_path / "out", allow_nonfinite=True)


@given(st.integers(0, 100), st.sampled_from(sorted(DTYPES)))
def test_some_small_values_are_fine(share: int, dtype: str) -> None:
    """Every weight of a float16 model may be subnormal; elsewhere half of them, which no model comes near."""
    array = np.full(100_000, 1e-39 if dtype != "float16" else 1e-7, np.float32)
    array[np.random.default_rng(share).permutation(array.size)[: array.size * (100 - share) // 100]] = 0.5
    array = array.astype(DTYPES[dtype]).reshape(100, 1000)
    if dtype == "float16" or share < 48:
        check_finite("x", array, Path("f"))
    elif share > 52:
        with pytest.raises(CheckpointError, match=f"holds {array.size * share // 100} subnormal values"):
            check_finite("x", array, Path("f"))


def test_a_large_tensor_is_counted_in_full() -> None:
    array = np.full((5, 1 << 20), ml_dtypes.bfloat16(1e-39))
    array[0, 0] = 1.0
    with pytest.raises(CheckpointError, match=f"holds {array.size - 1} subnormal values"):
        check_finite("x", array, Path("f"))


DISAGREE: dict[str, tuple[dict[str, Any], str]] = {
    "more kv heads": ({"num_key_value_heads": 4}, r"k_proj\.weight has shape \[16, 16\].*asks for \[32, 16\]"),
    "another head size": ({"head_dim": 16}, r"proj\.weight has shape .*config\.json asks for"),
    "more layers": ({"num_hidden_layers": 3}, r"lacks tensor model\.layers\.2\..* and \d+ more"),
    "fewer layers": ({"num_hidden_layers": 1}, r"holds tensor model\.layers\.1\."),
    "other vocabulary": ({"vocab_size": 50}, r"embed_tokens\.weight has shape \[48, 16\]"),
    "tied": ({"tie_word_embeddings": True}, r"lm_head\.weight differs from model\.embed_tokens\.weight"),
    "biases": ({"attention_bias": True}, r"lacks tensor .*bias"),
    "unknown rope": ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
    "another family": ({"model_type": "qwen3"}, r"lacks tensor .*q_norm"),
    "experts": (MIXTRAL, r"lacks tensor .*block_sparse_moe"),
    "fused experts": (LLAMA4, r"lacks tensor .*feed_forward"),
    "huge integer": ({"hidden_size": 10**30}, "hidden_size must be an integer"),
    "negative": ({"num_attention_heads": -4}, "num_attention_heads must be an integer"),
    "string": ({"intermediate_size": "24"}, "intermediate_size must be an integer"),
    "unknown type": ({"model_type": "qwen3_moe"}, "model type 'qwen3_moe' is not supported"),
    "unknown architecture": ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
}


@pytest.mark.parametrize("case", DISAGREE)
def test_config_and_weights_disagree(tmp_path: Path, case: str) -> None:
    keys, message = DISAGREE[case]
    write_hf(tmp_path / "hf", LLAMA)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(LLAMA | keys))
    with pytest.raises((CheckpointError, UnsupportedModel), match=message) as e:
        convert(tmp_path / "hf", tmp_path / "out")
    assert "\n" not in e.value.message
    assert e.value.hint
    assert not (tmp_path / "out").exists()


def test_sizes_that_no_memory_holds(tmp_path: Path) -> None:
    """The shapes are compared before anything is allocated."""
    write_hf(tmp_path / "hf", LLAMA)
    huge = LLAMA | {"hidden_size": 2**31 - 1, "vocab_size": 2**31 - 1, "head_dim": 2**31 - 2}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(huge))
    with pytest.raises(CheckpointError, match=r"has shape"):
        convert(tmp_path / "hf", tmp_path / "out")


def test_code_of_the_model_is_never_run(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    leaves = write_hf(tmp_path / "hf", LLAMA | {"auto_map": auto_map})
    for name in ("configuration_evil", "modeling_evil"):
        (tmp_path / "hf" / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    path = convert(tmp_path / "hf", tmp_path / "out")
    assert_equal(path, leaves)
    assert not (tmp_path / "ran").exists()
    assert not [m for m in sys.modules if "evil" in m]
    assert "auto_map" not in (path / "config.json").read_text()
    assert not list(path.glob("*.py"))


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_a_tokenizer_of_another_model(tmp_path: Path, kind: str) -> None:
    write_hf(tmp_path / "hf", LLAMA)
    vocabulary: Any = {f"t{i}": i for i in range(49)} if kind == "BPE" else [[f"t{i}", -1.0] for i in range(49)]
    added = [{"id": 60, "content": "<image>"}]  # tokens that were added may stand behind the model's rows
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": added}))
    with pytest.raises(CheckpointError, match="ids up to 48, the model's vocabulary ends at 47"):
        convert(tmp_path / "hf", tmp_path / "out")
    smaller = {k: v for k, v in vocabulary.items() if v < 48} if isinstance(vocabulary, dict) else vocabulary[:48]
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": smaller}, "added_tokens": added}))
    convert(tmp_path / "hf", tmp_path / "out")


def test_both_names_of_mixtral(tmp_path: Path) -> None:
    """transformers 5 calls `block_sparse_moe` `mlp`, and may save it so."""
    leaves = random_leaves(config_from_hf(MIXTRAL))
    tensors = hf_tensors(config_from_hf(MIXTRAL), leaves)
    write_hf(tmp_path / "old", MIXTRAL, tensors=tensors)
    assert_equal(convert(tmp_path / "old", tmp_path / "out1"), leaves)
    renamed = {n.replace(".block_sparse_moe.", ".mlp."): a for n, a in tensors.items()}
    write_hf(tmp_path / "new", MIXTRAL, tensors=renamed)
    assert_equal(convert(tmp_path / "new", tmp_path / "out2"), leaves)


def test_single_experts_of_llama4(tmp_path: Path) -> None:
    """Quantisers split the stacks of Llama 4 into layers of their own."""
    leaves = random_leaves(config_from_hf(LLAMA4))
    tensors = {n: a for n, a in hf_tensors(config_from_hf(LLAMA4), leaves).items() if ".experts." not in n}
    for short in ("gate", "up", "down"):
        stack = leaves[f"layers.1.moe.experts.{short}_proj.weight"]
        for e, expert in enumerate(stack):
            tensors[f"model.layers.1.feed_forward.experts.{e}.{short}_proj.weight"] = expert
    write_hf(tmp_path / "hf", LLAMA4, tensors=tensors)
    assert_equal(convert(tmp_path / "hf", tmp_path / "out"), leaves)
