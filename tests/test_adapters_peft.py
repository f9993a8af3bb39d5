"""Folders of peft against what peft 0.21.2 computed with them (`data/lora`, on the goldens that they name)."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, TOLERANCE, error, load_golden, random_params, random_tokens, run
from safetensors.numpy import load_file, save_file

from llama_jax.adapters import Adapter, LoraConfig, attach, load_adapter, merge, new_adapter, save_adapter, unmerge
from llama_jax.adapters.lora_config import parse_config
from llama_jax.adapters.targets import targeted
from llama_jax.errors import CheckpointError, LlamaJaxError, RequestError, UnsupportedModel
from llama_jax.measure.verification import Computed, Inputs, compute
from llama_jax.model.fuse import fuse_params, split_layer
from llama_jax.model.quantization import dequantize_params, quantize_params
from llama_jax.params import Params, flatten
from llama_jax.recipe import recipe

LORA = Path(__file__).parent / "data" / "lora"
CASES = tuple(sorted(path.name for path in LORA.iterdir()))
FAST = ("dora-llama", "experts-mixtral")


def base_of(case: str) -> Any:
    return load_golden(json.loads((LORA / case / "adapter_config.json").read_text())["base_model_name_or_path"])


def expected_of(case: str) -> tuple[Inputs, dict[str, np.ndarray]]:
    with np.load(LORA / case / "expected.npz") as file:
        expected = dict(file)
    greedy = expected["greedy"].shape[1]
    return Inputs(expected["input_ids"], expected["attention_mask"] > 0, greedy), expected


def check(computed: Computed, inputs: Inputs, expected: dict[str, np.ndarray]) -> None:
    """The last six places of each row, and the tokens after them."""
    last = expected["logits"].shape[1]
    assert error(computed.logits[:, -last:], expected["logits"], inputs.mask[:, -last:]) < TOLERANCE
    np.testing.assert_array_equal(computed.greedy, expected["greedy"])


@pytest.mark.parametrize("case", [pytest.param(case, marks=[] if case in FAST else pytest.mark.slow) for case in CASES])
def test_attached_adapters_compute_what_peft_does(case: str) -> None:
    """On fused weights, as `load` makes them: adapters of parts of joint projections."""
    golden = base_of(case)
    inputs, expected = expected_of(case)
    params, config = attach(
        fuse_params(golden.params, golden.config), golden.config, load_adapter(LORA / case, golden.config)
    )
    check(compute(params, config, inputs), inputs, expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_merged_adapters_compute_what_peft_does(case: str) -> None:
    golden = base_of(case)
    inputs, expected = expected_of(case)
    adapter = load_adapter(LORA / case, golden.config)
    params, config = merge(fuse_params(golden.params, golden.config), golden.config, adapter)
    assert "adapter" not in params
    check(compute(params, config, inputs), inputs, expected)


def test_unmerging_gives_the_base_back() -> None:
    golden = base_of("plain-llama")
    adapter = load_adapter(LORA / "plain-llama", golden.config)
    merged, _ = merge(golden.params, golden.config, adapter)
    back = flatten(unmerge(merged, golden.config, adapter))
    for name, x in flatten(golden.params).items():
        np.testing.assert_allclose(back[name], x, atol=1e-6)
    changed = {name for name, x in flatten(merged).items() if not np.array_equal(x, flatten(golden.params)[name])}
    assert changed == {f"{leaf}.weight" for leaf in adapter.leaves}
    for lost in ("dora-llama", "lm-head-llama"):
        with pytest.raises(RequestError, match="not in the merged weights"):
            unmerge(merged, golden.config, load_adapter(LORA / lost, golden.config))


@pytest.mark.parametrize("case", CASES)
def test_saved_adapters_are_those_that_were_loaded(case: str, tmp_path: Path) -> None:
    """Names, shapes, dtypes and values are peft's own, and so are the settings."""
    config = base_of(case).config
    save_adapter(tmp_path / "saved", load_adapter(LORA / case, config), config)
    wanted, found = (load_file(folder / "adapter_model.safetensors") for folder in (LORA / case, tmp_path / "saved"))
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x)
    asked, kept = (json.loads((f / "adapter_config.json").read_text()) for f in (LORA / case, tmp_path / "saved"))
    assert {name: value for name, value in asked.items() if value} == {n: v for n, v in kept.items() if v}
    load_adapter(tmp_path / "saved", config)


# --- What an adapter targets

PLAIN = load_golden("llama3.1-rope").config


@pytest.mark.parametrize(
    ("lora", "count"),
    [
        ({"target_modules": ["v_proj", "q_proj"]}, 6),
        ({"target_modules": "all-linear"}, 21),
        ({"target_modules": r".*\.(q_proj|down_proj)"}, 6),
        ({"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, 5),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.v_proj"]}, 5),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.[01]\..*"}, 2),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, 2),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}, 1),
        ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}, 3),
    ],
)
def test_targets(lora: dict[str, Any], count: int) -> None:
    assert len(targeted(PLAIN, parse_config({"peft_type": "LORA", **lora}))) == count


def test_the_first_pattern_that_matches_the_end_of_a_name_holds() -> None:
    about = json.loads((LORA / "patterns-llama" / "adapter_config.json").read_text())
    scales = dict(load_adapter(LORA / "patterns-llama", PLAIN).about.scales)
    own = {
        "layers.0.attn.q_proj": 1.0,
        "layers.1.mlp.down_proj": 4.0,
        "layers.0.attn.v_proj": 8.0,
        "layers.2.attn.o_proj": 0.25,
        "layers.1.attn.o_proj": 2.0,
        "layers.2.mlp.down_proj": 2.0,
    }
    assert {leaf: scales[leaf] for leaf in own} == own
    several = about | {"rank_pattern": {"layers.1.*.q_proj": 2, "q_proj": 8}}
    lora = parse_config(several)
    assert [lora.rank_of(f"model.layers.{i}.self_attn.q_proj") for i in (0, 1)] == [8, 2]
    assert lora.rank_of("model.layers.0.self_attn.my_q_proj") == lora.rank
    root = dataclasses.replace(lora, rslora=True)
    assert root.scale_of("model.layers.0.mlp.up_proj") == lora.alpha / lora.rank**0.5


# --- Folders that cannot be used


def spoiled(folder: Path, case: str = "plain-llama", *, tensors: Any = None, **about: Any) -> Path:
    """A copy of an adapter with settings changed, and a function applied to its tensors."""
    shutil.copytree(LORA / case, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | about))
    if tensors is not None:
        save_file(tensors(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("kind", "says", "options"),
    [
        (UnsupportedModel, "peft_type is 'IA3'", {"peft_type": "IA3"}),
        (UnsupportedModel, "use_qalora is not computed", {"use_qalora": True}),
        (UnsupportedModel, "something_new is not computed", {"something_new": {"a": 1}}),
        (UnsupportedModel, "trainable_token_indices", {"trainable_token_indices": [3]}),
        (UnsupportedModel, "layer_replication", {"layer_replication": [[0, 2]]}),
        (UnsupportedModel, "ensure_weight_tying", {"ensure_weight_tying": True}),
        (UnsupportedModel, "init_lora_weights='pissa'", {"init_lora_weights": "pissa"}),
        (UnsupportedModel, "task_type is 'SEQ_CLS'", {"task_type": "SEQ_CLS"}),
        (UnsupportedModel, "bias is 'some'", {"bias": "some"}),
        (UnsupportedModel, "which the model has none", {"target_modules": ["c_attn"]}),
        (CheckpointError, "r is 0", {"r": 0}),
        (CheckpointError, "r is 'four'", {"r": "four"}),
        (CheckpointError, "lora_alpha 10000", {"lora_alpha": 10**400}),
        (CheckpointError, "rank_pattern gives q_proj 2.5", {"rank_pattern": {"q_proj": 2.5}}),
        (CheckpointError, "rank_pattern gives q_proj 0.5", {"rank_pattern": {"q_proj": 0.5}}),
        (CheckpointError, "alpha_pattern gives q_proj inf", {"alpha_pattern": {"q_proj": math.inf}}),
        (CheckpointError, "not a regular expression", {"target_modules": "(q_proj"}),
        (CheckpointError, "no list of names", {"target_modules": [1]}),
        (CheckpointError, r"a \[8, 64\]", {"r": 8}),
        (CheckpointError, "lacks the low-rank weights of model.layers.0.mlp", {"target_modules": "all-linear"}),
        (CheckpointError, "not a module of this model that", {"target_modules": ["q_proj", "k_proj", "v_proj"]}),
        (CheckpointError, "lacks lm_head", {"modules_to_save": ["lm_head"]}),
        (CheckpointError, "NaN or infinite", {"tensors": lambda t: t | {Q: np.full_like(t[Q], np.nan)}}),
        (CheckpointError, r"a \[4, 63\]", {"tensors": lambda t: t | {Q: t[Q][:, 1:].copy()}}),
        (CheckpointError, r"b \[64, 4\]; the base", {"tensors": lambda t: {n: x for n, x in t.items() if n != Q}}),
        (CheckpointError, "does not begin with", {"tensors": lambda t: t | {"q_proj.lora_A.weight": t[Q]}}),
        (
            CheckpointError,
            "h.0.c_attn has low-rank",
            {"tensors": lambda t: t | {f"{Q[:17]}h.0.c_attn.lora_A.weight": t[Q]}},
        ),
        (CheckpointError, "is of no module", {"tensors": lambda t: t | {f"{Q[:17]}score.weight": t[Q]}}),
        (CheckpointError, "tensor .* is I32", {"tensors": lambda t: t | {Q: t[Q].astype(np.int32)}}),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, kind: type, says: str, options: dict[str, Any]) -> None:
    with pytest.raises(kind, match=says) as caught:
        load_adapter(spoiled(tmp_path / "bad", **options), PLAIN)
    assert caught.value.hint


def test_files_that_are_missing_or_no_files(tmp_path: Path) -> None:
    def refused(says: str) -> None:
        with pytest.raises(CheckpointError, match=says) as caught:
            load_adapter(tmp_path / "a", PLAIN)
        assert caught.value.hint

    refused("has no adapter_config.json")
    spoiled(tmp_path / "a")
    weights, settings = (tmp_path / "a" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    refused("truncated")
    weights.rename(tmp_path / "a" / "adapter_model.bin")
    refused("has no adapter_model.safetensors")
    settings.write_text("[1]")
    refused("holds no JSON object")
    settings.write_bytes(b"\xff{")
    refused("not valid JSON")


def test_a_vocabulary_that_was_extended(tmp_path: Path) -> None:
    name = "base_model.model.lm_head.weight"
    folder = spoiled(tmp_path / "a", "lm-head-llama", tensors=lambda t: t | {name: np.vstack([t[name], t[name][:4]])})
    with pytest.raises(CheckpointError, match=re.escape("[324, 64]")) as caught:
        load_adapter(folder, PLAIN)
    assert "vocabulary" in caught.value.hint


# --- Other models than the goldens: biases, tied embeddings, quantised weights


def trained(params: Params, config: Any, lora: LoraConfig, seed: int = 0) -> Adapter:
    """A new adapter whose every array has been moved."""
    rng = np.random.default_rng(seed)
    fresh = new_adapter(params, config, lora, jax.random.key(seed))
    return jax.tree.map(lambda x: jnp.asarray(x + 0.3 * rng.standard_normal(x.shape), x.dtype), fresh)


LORAS = {
    "biases": LoraConfig(2, 4, bias="all", target_modules=("q_proj", "v_proj", "up_proj")),
    "biases of targets": LoraConfig(2, 4, bias="lora_only", dora=True, target_modules=("k_proj", "o_proj")),
    "lora_bias": LoraConfig(2, 3, lora_bias=True, dora=True, target_modules="all-linear"),
    "whole": LoraConfig(2, 4, target_modules=("q_proj",), modules_to_save=("k_proj", "input_layernorm", "q_norm")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LORAS)
def test_attached_equals_merged(name: str, tmp_path: Path) -> None:
    """Of a model with biases, fused and not; and saved and loaded again."""
    config = TINY["biased"]
    params, tokens = random_params(config), random_tokens(config, 2, 6)
    new = new_adapter(params, config, LORAS[name], jax.random.key(0))
    base, _ = run(params, config, tokens)
    assert error(run(attach(params, config, new)[0], config, tokens)[0], base) < 1e-5
    adapter = load_adapter(save_adapter(tmp_path / "a", trained(params, config, LORAS[name]), config), config)
    expected, _ = run(merge(params, config, adapter)[0], config, tokens)
    assert error(base, expected) > 0.01
    for layout in (params, fuse_params(params, config)):
        assert error(run(attach(layout, config, adapter)[0], config, tokens)[0], expected) < 2e-5
        assert error(run(merge(layout, config, adapter)[0], config, tokens)[0], expected) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("names", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
def test_tied_embeddings(names: tuple[str, ...]) -> None:
    """peft changes only what is named: a whole one of the two ends the tie, low-rank weights are of one of them."""
    config = TINY["tied-mqa"]
    params, tokens = random_params(config), random_tokens(config, 2, 6)
    apart = {**params, "lm_head": params["embed"]}
    for lora in (
        LoraConfig(2, 4, target_modules=names),
        LoraConfig(2, 4, target_modules=("q_proj",), modules_to_save=names),
    ):
        adapter = trained(params, config, lora)
        expected, _ = run(*merge(apart, config.replace(tie_word_embeddings=False), adapter), tokens)
        attached, own = attach(params, config, adapter)
        assert own.tie_word_embeddings == (not lora.modules_to_save)
        assert error(run(attached, own, tokens)[0], expected) < 2e-5


@pytest.mark.slow
def test_on_quantised_weights() -> None:
    """Codes stay as they are; to merge, they have to be decoded."""
    golden = base_of("dora-llama")
    adapter, tokens = load_adapter(LORA / "dora-llama", golden.config), random_tokens(golden.config, 2, 6)
    params, config = quantize_params(golden.params, golden.config, recipe("int8"))
    plain, decoded = dequantize_params(params, config, jnp.float32)
    expected, _ = run(*merge(plain, decoded, adapter), tokens)
    attached, own = attach(fuse_params(params, config), config, adapter)
    assert own.schemes == config.schemes
    assert error(run(attached, own, tokens)[0], expected) < 2e-5
    with pytest.raises(RequestError, match="is quantised"):
        merge(params, config, adapter)


def test_modules_that_are_saved_whole_bring_their_biases(tmp_path: Path) -> None:
    """Also by the name of what they are a part of; routed experts cannot be saved."""
    config = TINY["biased"]
    params = random_params(config)
    lora = LoraConfig(2, 4, target_modules=("q_proj",), modules_to_save=("k_proj", "mlp"))
    adapter = trained(params, config, lora)
    assert {name.partition(".")[2].partition(".")[2] for name in flatten(adapter.whole)} >= {
        "attn.k_proj.weight",
        "attn.k_proj.bias",
        "mlp.down_proj.weight",
    }
    read = load_adapter(save_adapter(tmp_path / "a", adapter, config), config)
    jax.tree.map(np.testing.assert_array_equal, read.whole, adapter.whole)
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({n: x for n, x in load_file(path).items() if not n.endswith("0.self_attn.k_proj.bias")}, path)
    with pytest.raises(CheckpointError, match="lacks k_proj"):
        load_adapter(tmp_path / "a", config)
    moe = TINY["sigmoid-moe"]
    with pytest.raises(UnsupportedModel, match=r"experts\.\w+ would be trained whole"):
        new_adapter(random_params(moe), moe, LoraConfig(modules_to_save=("feed_forward",)), jax.random.key(0))


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_names_of_a_new_adapter_that_the_model_lacks(field: str) -> None:
    config = TINY["plain"]
    with pytest.raises(UnsupportedModel, match="the model has no module 'v_porj'") as caught:
        new_adapter(random_params(config), config, LoraConfig(**{field: ("q_proj", "v_porj")}), jax.random.key(0))
    assert "v_proj" in caught.value.hint


def test_joint_projections_taken_apart() -> None:
    config = TINY["biased"]
    params = random_params(config)
    fused = fuse_params(params, config)["layers"]["0"]
    apart = split_layer(fused)
    assert jax.tree.structure(apart) == jax.tree.structure(params["layers"]["0"])
    jax.tree.map(np.testing.assert_array_equal, apart, params["layers"]["0"])


def test_gradients_reach_every_array() -> None:
    """And take DoRA's norm as a constant: against central differences of the loss with the norm held."""
    config = TINY["plain"]
    params, tokens = random_params(config), random_tokens(config, 1, 5)
    adapter = trained(
        params, config, LoraConfig(2, 4, dora=True, target_modules=("o_proj",), modules_to_save=("norm",))
    )

    def loss(adapter: Adapter, held: Adapter) -> jax.Array:
        attached, own = attach(params, config, adapter)
        gain, other = (
            attach(params, config, a)[0]["adapter"]["layers"]["0"]["attn"]["o_proj"] for a in (adapter, held)
        )
        magnitudes = (a.low_rank["layers"]["0"]["attn"]["o_proj"]["magnitude"] for a in (adapter, held))
        mine, theirs = magnitudes
        gain["gain"] = other["gain"] * mine / theirs
        attached["adapter"]["layers"]["0"]["attn"]["o_proj"] = gain
        return (run(attached, own, tokens)[0] ** 2).mean()

    def plain(adapter: Adapter) -> jax.Array:
        return (run(*attach(params, config, adapter), tokens)[0] ** 2).mean()

    found = jax.grad(plain)(adapter)
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(found))
    rng = np.random.default_rng(0)
    way = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), adapter)
    slope = sum(float(jnp.vdot(a, b)) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(way), strict=True))
    step = 1e-3
    moved = [jax.tree.map(lambda x, d, s=sign: x + s * step * d, adapter, way) for sign in (1, -1)]
    difference = float(loss(moved[0], adapter) - loss(moved[1], adapter)) / (2 * step)
    assert abs(slope - difference) < 2e-2 * abs(difference) + 1e-3


def test_errors_are_of_this_package() -> None:
    with pytest.raises(LlamaJaxError):
        attach(
            *attach(base_of("plain-llama").params, PLAIN, load_adapter(LORA / "plain-llama", PLAIN)),
            load_adapter(LORA / "plain-llama", PLAIN),
        )
