"""Writes tests/data/hf_configs.json: config.json files of every family beside what transformers makes of each.

Needs transformers (the non-default dependency group `hf`):

    uv run --group hf python scripts/make_config_goldens.py tests/data/hf_configs.json

Each entry holds `given`, a config.json with some keys left out, null or in the old style, and `resolved`, the same
config with every default filled in and rope standardised by transformers' own config classes.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "smollm3", "llama4_text")
DROPPED = ("transformers_version", "architectures", "initializer_range", "use_cache", "attention_dropout")
LAYERS = 4
CASES = 12
"""Of each family."""


def rope(rng: random.Random) -> dict[str, Any]:
    """Rope keys of the old or the new style, or none."""
    kind = rng.choice(["none", "theta", "default", "linear", "dynamic", "yarn", "llama3"])
    theta: dict[str, Any] = rng.choice([{}, {"rope_theta": 123456.0}, {"rope_theta": 5000}])
    if kind == "none":
        return {}
    if kind == "theta":
        return theta
    values: dict[str, Any] = {} if kind == "default" else {"factor": rng.choice([2.0, 8])}
    if kind == "llama3":
        values |= {"low_freq_factor": 1.0, "high_freq_factor": rng.choice([4.0, 1.0])}
    if kind == "yarn":
        optional = {"beta_fast": 16, "beta_slow": None, "mscale": 0.7, "mscale_all_dim": 0.2, "truncate": False}
        values |= {key: value for key, value in optional.items() if rng.random() < 0.4}
        if rng.random() < 0.3:
            values["attention_factor"] = 1.3
        if rng.random() < 0.2:
            values["factor"] = None
            values["original_max_position_embeddings"] = 1024
    outside: dict[str, Any] = {}
    if kind in ("llama3", "yarn") and rng.random() < 0.6:
        values["original_max_position_embeddings"] = 1024
        if rng.random() < 0.3:
            outside = {"original_max_position_embeddings": 512}
    if rng.random() < 0.5:
        name = rng.choice(["type", "rope_type"])
        result: dict[str, Any] = theta | outside | {"rope_scaling": {name: kind, **values}}
        if rng.random() < 0.2:
            result["rope_parameters"] = {"rope_type": "linear", "factor": 3.0, "rope_theta": 77777.0}
        return result
    return outside | {"rope_parameters": {"rope_type": kind, **theta, **values}}


def draw(family: str, rng: random.Random) -> dict[str, Any]:
    """A config.json of one family."""
    config: dict[str, Any] = {"model_type": family, "num_hidden_layers": LAYERS} | rope(rng)
    choices: dict[str, list[Any]] = {
        "head_dim": [None, 64],
        "num_key_value_heads": [None, 1, 4],
        "max_position_embeddings": [4096],
        "tie_word_embeddings": [True, False],
        "rms_norm_eps": [1e-5, 1e-6],
        "eos_token_id": [None, 7, [7, 9]],
        "bos_token_id": [None, 5],
        "hidden_act": ["gelu", "silu", "gelu_pytorch_tanh"],
        "attention_bias": [True],
        "mlp_bias": [True],
        rng.choice(["torch_dtype", "dtype"]): ["bfloat16", "float16"],
    }
    if family in ("mistral", "mixtral", "qwen2", "qwen3", "smollm3"):
        choices["sliding_window"] = [None, 16, 128]
    if family in ("qwen2", "qwen3", "smollm3"):
        choices["use_sliding_window"] = [True, True, False]
    if family in ("qwen2", "qwen3"):
        choices["max_window_layers"] = [0, 2, 3]
        choices["head_dim"] = [64]
    if family in ("smollm3", "llama4_text"):
        choices["no_rope_layers"] = [None, [1, 1, 0, 0], [0, 1, 0, 1, 1]]
        choices["no_rope_layer_interval"] = [2, 3]
        choices["head_dim"] = [64]
    if family == "mixtral":
        choices |= {"num_local_experts": [4, 16], "num_experts_per_tok": [1, 3]}
    if family == "llama4_text":
        choices["no_rope_layers"].append([])
        choices |= {
            "interleave_moe_layer_step": [2, 3],
            "moe_layers": [None, [1, 2]],
            "use_qk_norm": [True, False],
            "attn_temperature_tuning": [True, False],
            "floor_scale": [64],
            "attn_scale": [0.3],
            "attention_chunk_size": [32],
            "intermediate_size_mlp": [96],
        }
    for key, values in choices.items():
        if rng.random() < 0.45:
            config[key] = rng.choice(values)
    if config.get("use_sliding_window") and config.get("sliding_window") and rng.random() < 0.4:
        config["layer_types"] = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    return config


def resolve(given: dict[str, Any]) -> dict[str, Any]:
    config = AutoConfig.for_model(**copy.deepcopy(given))
    config.standardize_rope_params()
    return {key: value for key, value in config.to_dict().items() if key not in DROPPED}


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes config cases with transformers.")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    rng = random.Random(0)
    lines = []
    for family in FAMILIES:
        # The bare family first: nothing but defaults.
        entries = [{"given": {"model_type": family}, "resolved": resolve({"model_type": family})}]
        while len(entries) < CASES:
            given = draw(family, rng)
            try:
                entries.append({"given": given, "resolved": resolve(given)})
            except StrictDataclassError:
                continue  # this family takes no null there
        lines += [json.dumps(entry, sort_keys=True) for entry in entries]
    args.out.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
