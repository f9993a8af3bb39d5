"""config.json to LlamaConfig and back, for every family."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.config import LayerSpec, LlamaConfig, MoeSpec, QueryScale, RopeSpec, config_from_hf, config_to_hf
from llama_jax.config.families import FAMILIES
from llama_jax.config.spec import AttentionKind
from llama_jax.errors import UnsupportedModel

DATA = Path(__file__).parent / "data"
GOLDENS = sorted(path.parent for path in (DATA / "goldens").glob("*/config.json"))
RESOLVED = json.loads((DATA / "hf_configs.json").read_text())

# Keys of the goldens that say nothing about inference, or that others say in full (layer_types, moe_layers, ...).
UNUSED = {
    "initializer_range",
    "transformers_version",
    "pretraining_tp",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "max_window_layers",
    "no_rope_layer_interval",
    "interleave_moe_layer_step",
}


def llama(**keys: Any) -> dict[str, Any]:
    """A small config.json; keys override."""
    base = {"model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128}
    return base | {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 4096} | keys


@pytest.mark.parametrize("folder", GOLDENS, ids=lambda path: path.name)
def test_goldens_round_trip(folder: Path) -> None:
    hf = json.loads((folder / "config.json").read_text())
    config = config_from_hf(hf)
    written = config_to_hf(config)
    assert config_from_hf(written) == config
    assert json.loads(json.dumps(written)) == written
    if "rope_scaling" in hf:
        hf["rope_parameters"] = {"rope_theta": hf.pop("rope_theta"), "rope_type": "linear", "factor": 2.0}
        hf["dtype"] = hf.pop("torch_dtype")
        del hf["rope_scaling"]
    for key in hf.keys() - UNUSED:
        if key == "rope_parameters":
            assert hf[key].items() <= written[key].items()
        elif key == "head_dim" and hf[key] is None:
            assert written[key] == config.hidden_size // config.num_heads
        else:
            assert written[key] == hf[key], key


@pytest.mark.parametrize("index", range(len(RESOLVED)))
def test_defaults_are_those_of_transformers(index: int) -> None:
    """`resolved` holds every key, filled in by transformers: reading it needs no default of ours."""
    entry = RESOLVED[index]
    config = config_from_hf(entry["given"])
    assert config == config_from_hf(entry["resolved"])
    assert config_from_hf(config_to_hf(config)) == config


def test_reads_a_whole_llama4() -> None:
    config = config_from_hf(json.loads((DATA / "goldens/llama4-interleaved/config.json").read_text()))
    moe = MoeSpec(num_experts=4, top_k=2, intermediate_size=16, router="sigmoid", shared_intermediate_size=16)
    rotated = LayerSpec(attention="chunked", window=5, mlp=40)
    plain = LayerSpec(rope=False, query_scale=QueryScale(scale=0.5, floor=4), mlp=moe)
    assert config.layers == (rotated, plain, rotated, plain)
    assert config.rope == RopeSpec(theta=500_000.0, interleaved=True)
    assert (config.head_dim, config.num_kv_heads, config.q_dim, config.kv_dim) == (12, 2, 48, 24)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, False)
    assert (config.eos_token_ids, config.bos_token_id, config.pad_token_id) == ((2,), 1, 0)


def test_reads_windows() -> None:
    def windows(name: str) -> list[tuple[str, int | None, bool]]:
        config = config_from_hf(json.loads((DATA / "goldens" / name / "config.json").read_text()))
        return [(layer.attention, layer.window, layer.rope) for layer in config.layers]

    assert windows("mistral-short-window") == [("sliding", 5, True)] * 2
    assert windows("qwen2-windows") == [("full", None, True)] + [("sliding", 6, True)] * 2
    assert windows("smollm3-window") == [("full", None, True), ("sliding", 7, False)] * 2


def test_biases_differ_by_family() -> None:
    def biases(family: str, **keys: Any) -> tuple[bool, bool, bool]:
        config = config_from_hf(llama(model_type=family, num_key_value_heads=4, **keys))
        return config.qkv_bias, config.o_bias, config.mlp_bias

    on = {"attention_bias": True, "mlp_bias": True}
    assert biases("llama", **on) == (True, True, True)
    assert biases("llama") == (False, False, False)
    assert biases("mistral", **on) == (False, False, False)
    assert biases("qwen2") == (True, False, False)
    assert biases("qwen3", **on) == (True, True, False)
    assert biases("smollm3", **on) == (True, True, True)


def test_old_and_new_style_agree() -> None:
    old = llama(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2}, torch_dtype="bfloat16")
    new = llama(rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}, dtype="bfloat16")
    assert config_from_hf(old) == config_from_hf(new)
    assert config_from_hf(new).rope == RopeSpec(theta=5e5, kind="linear", factor=2.0)
    assert config_from_hf(llama(dtype="torch.float16")).dtype == "float16"


def test_rope_rules() -> None:
    def rope(**keys: Any) -> RopeSpec:
        return config_from_hf(llama(**keys)).rope

    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert rope() == RopeSpec(theta=10_000.0)
    assert rope(rope_parameters=yarn).original_max_positions == 4096
    assert rope(rope_parameters=yarn | {"original_max_position_embeddings": 64}).original_max_positions == 64
    # Beside the dict beats inside it, and rope_scaling beats rope_parameters.
    inside = yarn | {"original_max_position_embeddings": 64}
    assert rope(rope_parameters=inside, original_max_position_embeddings=32).original_max_positions == 32
    assert rope(rope_parameters=inside, rope_scaling={"type": "linear", "factor": 2.0}).kind == "linear"
    # The base inside the dict beats the one beside it.
    assert rope(rope_theta=7.0, rope_parameters={"rope_theta": 9.0}).theta == 9.0
    # Dynamic growth is measured against max_position_embeddings whatever the dict says.
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}
    assert rope(rope_parameters=dynamic).original_max_positions == 4096
    assert rope(rope_parameters=inside | {"factor": None}).factor == 64.0
    assert rope(rope_parameters=inside | {"truncate": False, "mscale": 0.5}) == RopeSpec(
        kind="yarn", factor=4.0, original_max_positions=64, truncate=False, mscale=0.5
    )


def test_end_of_text_ids() -> None:
    assert config_from_hf(llama(eos_token_id=[3, 5])).eos_token_ids == (3, 5)
    assert config_from_hf(llama(eos_token_id=None)).eos_token_ids == ()
    assert config_from_hf(llama()).eos_token_ids == (2,)
    assert config_from_hf(llama(pad_token_id=-1)).pad_token_id is None


def test_multimodal_wrappers_give_their_text_model() -> None:
    text = llama(model_type="mistral", num_key_value_heads=2, sliding_window=None)
    del text["model_type"]
    wrapper = {
        "model_type": "mistral3",
        "architectures": ["Mistral3ForConditionalGeneration"],
        "torch_dtype": "bfloat16",
        "vision_config": {"model_type": "pixtral"},
        "text_config": text,
    }
    config = config_from_hf(wrapper)
    assert config == config_from_hf({"model_type": "mistral", "dtype": "bfloat16", **text})
    assert config.family == "mistral"
    with pytest.raises(UnsupportedModel, match="text_config"):
        config_from_hf({"model_type": "llama4", "text_config": None})
    with pytest.raises(UnsupportedModel, match="gemma"):
        config_from_hf(wrapper | {"text_config": text | {"model_type": "gemma"}})


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"model_type": "gpt_neox"}, "gpt_neox"),
        ({"model_type": None}, "model_type"),
        ({"model_type": 3}, "model_type"),
        ({"model_type": []}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"hidden_act": "relu2"}, "relu2"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "longrope"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": float("nan")}}, "factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 10**400}}, "factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"rope_theta": "1e4"}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 66}, "head_dim"),
        ({"head_dim": 15}, "head_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"intermediate_size": 2**40}, "intermediate_size"),
        ({"intermediate_size": [1, 2]}, "intermediate_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"eos_token_id": [2, 2.5]}, "eos_token_id"),
        ({"bos_token_id": -5}, "bos_token_id"),
        ({"model_type": "qwen2", "num_key_value_heads": 4, "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "qwen2", "num_key_value_heads": 4, "layer_types": ["mamba"] * 2}, "mamba"),
        ({"model_type": "qwen2", "num_key_value_heads": 4, "layer_types": ["sliding_attention"] * 2}, "sliding_window"),
        ({"model_type": "qwen3", "num_key_value_heads": 4, "layer_types": ["chunked_attention"] * 2}, "chunked"),
        ({"model_type": "mistral", "num_key_value_heads": 4, "layer_types": ["full_attention"] * 2}, "layer_types"),
        ({"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": 0}, "sliding_window"),
        ({"model_type": "mixtral", "num_key_value_heads": 4, "num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"model_type": "smollm3", "num_key_value_heads": 4, "no_rope_layers": [1]}, "no_rope_layers"),
        ({"model_type": "smollm3", "num_key_value_heads": 4, "no_rope_layers": [1, 2]}, "no_rope_layers"),
        ({"model_type": "llama4_text", "num_key_value_heads": 4, "attention_chunk_size": None}, "attention_chunk_size"),
        ({"model_type": "llama4_text", "num_key_value_heads": 4, "moe_layers": "all"}, "moe_layers"),
        ({"model_type": "llama4_text", "num_key_value_heads": 4, "interleave_moe_layer_step": 0}, "interleave"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_computed_is_refused_by_name(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel) as error:
        config_from_hf(llama(**keys))
    assert named in str(error.value)
    assert error.value.hint


def test_what_is_harmless_is_ignored() -> None:
    odd = llama(auto_map={"AutoConfig": "evil.Config"}, some_new_key={"a": [1]}, transformers_version="9.9")
    before = copy.deepcopy(odd)
    assert config_from_hf(odd) == config_from_hf(llama())
    assert odd == before


@pytest.mark.parametrize("value", [None, [], "llama", 3])
def test_not_an_object(value: Any) -> None:
    with pytest.raises(UnsupportedModel, match="object"):
        config_from_hf(value)


def test_to_hf_refuses_what_the_family_cannot_say() -> None:
    config = config_from_hf(llama())
    with pytest.raises(UnsupportedModel, match="o_bias"):
        config_to_hf(config.replace(qkv_bias=True, o_bias=False))
    with pytest.raises(UnsupportedModel, match="layers"):
        config_to_hf(config.replace(layers=(LayerSpec(mlp=128), LayerSpec(mlp=64))))
    with pytest.raises(UnsupportedModel, match="rope"):
        config_to_hf(config.replace(rope=RopeSpec(interleaved=True)))
    with pytest.raises(UnsupportedModel, match="bert"):
        config_to_hf(config.replace(family="bert"))


@st.composite
def ropes(draw: st.DrawFn, max_positions: int, interleaved: bool) -> RopeSpec:
    kind = draw(st.sampled_from(["default", "linear", "dynamic", "yarn", "llama3"]))
    values: dict[str, Any] = {"theta": draw(st.floats(2.0, 1e7)), "kind": kind, "interleaved": interleaved}
    if kind != "default":
        values["factor"] = draw(st.floats(1.0, 64.0))
    if kind == "dynamic":
        values["original_max_positions"] = max_positions
    if kind in ("yarn", "llama3"):
        values["original_max_positions"] = draw(st.integers(1, max_positions))
    if kind == "llama3":
        values["low_freq_factor"] = draw(st.floats(0.5, 2.0))
        values["high_freq_factor"] = draw(st.floats(2.5, 8.0))
    if kind == "yarn":
        values["beta_fast"] = draw(st.floats(8.0, 64.0))
        values["beta_slow"] = draw(st.floats(0.5, 4.0))
        values["truncate"] = draw(st.booleans())
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            values[key] = draw(st.none() | st.floats(0.1, 2.0))
    return RopeSpec(**values)


@st.composite
def configs(draw: st.DrawFn, name: str) -> LlamaConfig:
    """A config that its family can express."""
    family = FAMILIES[name]
    n = draw(st.integers(1, 6))
    window, width = draw(st.integers(1, 99)), draw(st.integers(1, 999))
    biased = draw(st.booleans())
    use_norm, tuned = draw(st.booleans()), draw(st.booleans())
    scale = QueryScale(draw(st.floats(0.01, 1.0)), draw(st.integers(1, 9999)))
    experts = draw(st.integers(1, 16))
    router = family.experts or "softmax"
    moe = MoeSpec(experts, draw(st.integers(1, experts)), width, router, width if router == "sigmoid" else 0)
    everywhere = draw(st.booleans())
    layers = []
    for _ in range(n):
        rotated = draw(st.booleans()) if family.nope else True
        local = everywhere if family.windows == "all" else family.windows != "none" and draw(st.booleans())
        kind: AttentionKind = "full" if not local else "chunked" if family.windows == "chunked" else "sliding"
        sparse = family.experts == "softmax" or (family.experts == "sigmoid" and draw(st.booleans()))
        norm = family.qk_norm
        if norm == "l2" and not (use_norm and rotated):
            norm = "none"
        layers.append(
            LayerSpec(
                attention=kind,
                window=window if local else None,
                rope=rotated,
                qk_norm=norm,
                query_scale=scale if tuned and not rotated and family.qk_norm == "l2" else None,
                mlp=moe if sparse else width,
            )
        )
    kv_heads, max_positions = draw(st.integers(1, 4)), draw(st.integers(2, 10**6))
    ids = st.integers(0, 200_000)
    return LlamaConfig(
        vocab_size=draw(st.integers(1, 10**6)),
        hidden_size=draw(st.integers(1, 9999)),
        num_heads=kv_heads * draw(st.integers(1, 5)),
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 64)),
        layers=tuple(layers),
        hf_mlp_module=family.mlp_module,
        rope=draw(ropes(max_positions, family.interleaved_rope)),
        rms_norm_eps=draw(st.floats(1e-8, 1e-2)),
        activation=draw(st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"])),
        qkv_bias=biased if family.qkv_bias == "attention_bias" else family.qkv_bias,
        o_bias=biased if family.o_bias == "attention_bias" else family.o_bias,
        mlp_bias=family.mlp_bias and draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        max_position_embeddings=max_positions,
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        bos_token_id=draw(st.none() | ids),
        eos_token_ids=tuple(draw(st.lists(ids, max_size=3))),
        pad_token_id=draw(st.none() | ids),
        family=name,
    )


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
def test_any_config_round_trips(name: str, data: st.DataObject) -> None:
    config = data.draw(configs(name))
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config
    assert hash(config) == hash(config.replace())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
def test_damaged_files_give_one_typed_error(data: st.DataObject) -> None:
    """Any JSON value under any key: a config or UnsupportedModel, nothing else."""
    hf = copy.deepcopy(data.draw(st.sampled_from(RESOLVED))["resolved"])
    for key in data.draw(st.lists(st.sampled_from(sorted(hf)), min_size=1, max_size=3)):
        hf[key] = data.draw(json_values)
    if isinstance(hf.get("rope_parameters"), dict) and data.draw(st.booleans()):
        rope = hf["rope_parameters"]
        rope[data.draw(st.sampled_from([*rope, "factor", "rope_type", "truncate"]))] = data.draw(json_values)
    try:
        config = config_from_hf(hf)
    except UnsupportedModel:
        return
    assert config_from_hf(config_to_hf(config)) == config


def test_reading_a_config_does_not_import_jax() -> None:
    code = "import sys; from llama_jax.config import preset; preset('llama-2-7b'); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
