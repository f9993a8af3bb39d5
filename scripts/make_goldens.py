"""Writes the golden cases of tests/data/goldens: tiny random checkpoints and what transformers computes from them.

Needs torch and transformers (the non-default dependency group `hf`):

    uv run --group hf python scripts/make_goldens.py tests/data/goldens [CASE ...]

Each case is a folder as `save_pretrained` writes it, and `expected.npz`:

    input_ids       [batch, seq] int64, left-padded with 0
    attention_mask  [batch, seq] int64
    logits          [batch, seq, vocab] float32: the float32 model, eager attention, each row computed alone without its
                    padding; zero where masked
    greedy          [batch, 16] int64: the next greedy tokens of each row, end-of-text ids taken like any other

Weights are drawn wide (standard deviation 0.15), norms and biases at random, so that a forgotten or transposed tensor
shows. A seed is taken only if every tensor (and every expert of it) has a gradient, float64 agrees with float32 within
1e-5 of the largest logit, and no greedy choice is closer than 1e-3 of it: rounding alone must not fail a test.

Multimodal cases (those of tests/data/multimodal) run only the text model, on text; the other parts are as small as they
can be.

With dynamic NTK rope, transformers recomputes the base while decoding, although the cached keys were rotated with the
old one. Here the base stays what the prompt made it, both in `logits` and in `greedy`.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

NEW_TOKENS = 16


@dataclass(frozen=True)
class Case:
    """One golden: a config, how it is saved, and the lengths of its prompts in tokens.

    With `vision`, the keys of a vision model, it is a multimodal model: `keys` are those of its text model, `top` those
    of the whole.
    """

    model_type: str
    keys: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (20, 13)
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "50GB"
    old_style: bool = False
    vision: dict[str, Any] | None = None
    top: dict[str, Any] = field(default_factory=dict)


SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
# Sizes at which yarn's ramp spans several frequencies, and llama3's bands hold at least one each.
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}
YARN_KEYS = {"max_position_embeddings": 256, "head_dim": 32, "num_key_value_heads": 1}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

PIXTRAL = {
    "head_dim": 4,
    "hidden_size": 8,
    "image_size": 16,
    "intermediate_size": 8,
    "model_type": "pixtral",
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "patch_size": 8,
}

CASES: dict[str, Case] = {
    "llama-biases": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": Case(
        "llama", {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 10}
    ),
    "llama-mqa": Case("llama", {"num_key_value_heads": 1, "eos_token_id": [2, 5]}),
    "llama-gelu": Case("llama", {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-2}),
    "llama-rope-linear": Case(
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0}, "head_dim": 16},
        (40, 17),
    ),
    "llama-rope-dynamic": Case(
        "llama",
        {
            "max_position_embeddings": 16,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
        (40, 16, 9),
    ),
    "llama-rope-yarn": Case("llama", YARN_KEYS | {"rope_parameters": YARN}, (80, 11)),
    "llama-rope-yarn-mscale": Case(
        "llama",
        YARN_KEYS
        | {
            "rope_parameters": YARN
            | {"mscale": 0.8, "mscale_all_dim": 0.3, "truncate": False, "beta_fast": 4.0, "beta_slow": 0.5}
        },
        (80, 11),
    ),
    "llama-rope-yarn-attention-factor": Case(
        "llama", YARN_KEYS | {"rope_parameters": YARN | {"attention_factor": 1.4, "factor": 3.0}}, (80, 11)
    ),
    "llama-rope-llama3-tied": Case(
        "llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16}, (80, 23)
    ),
    "llama-old-config": Case(
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0}},
        old_style=True,
    ),
    "llama-bf16-sharded": Case("llama", dtype=torch.bfloat16, max_shard_size="20KB"),
    "llama-f16": Case("llama", {"tie_word_embeddings": True}, dtype=torch.float16),
    "mistral-short-window": Case("mistral", {"sliding_window": 5, "head_dim": 16}, (33, 4)),
    "mixtral-window-3of8": Case(
        "mixtral",
        {"sliding_window": 6, "num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 16},
        (30, 11),
    ),
    "qwen2-windows": Case(
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "num_hidden_layers": 3},
        (30, 5),
    ),
    "qwen3-bias": Case("qwen3", {"attention_bias": True, "head_dim": 16, "tie_word_embeddings": True}),
    "smollm3-window": Case(
        "smollm3",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "no_rope_layer_interval": 2,
            "attention_bias": True,
            "mlp_bias": True,
            "num_hidden_layers": 4,
        },
        (30, 12),
    ),
    "llama4-interleaved": Case(
        "llama4_text",
        {
            "interleave_moe_layer_step": 2,
            "intermediate_size": 16,
            "intermediate_size_mlp": 40,
            "num_hidden_layers": 4,
            "head_dim": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "use_qk_norm": False,
            "attention_bias": True,
            "attention_chunk_size": 5,
            "floor_scale": 4,
            "attn_scale": 0.5,
            "no_rope_layer_interval": 2,
        },
        (24, 13),
    ),
    "llama4-scout-like": Case(
        "llama4_text",
        {
            "intermediate_size": 16,
            "intermediate_size_mlp": 16,
            "head_dim": 16,
            "num_local_experts": 4,
            "attention_chunk_size": 8,
            "floor_scale": 4,
            "num_hidden_layers": 3,
            "no_rope_layers": [1, 0, 1],
            "rope_parameters": LLAMA3
            | {"factor": 16.0, "high_freq_factor": 1.0, "original_max_position_embeddings": 16},
        },
        (40, 21),
    ),
    "mllama": Case(
        "mllama",
        {
            "num_hidden_layers": 4,
            "cross_attention_layers": [1, 3],
            "rope_parameters": LLAMA3,
        },
        (40, 21),
        vision={
            "attention_heads": 2,
            "hidden_size": 8,
            "image_size": 14,
            "intermediate_layers_indices": [0],
            "intermediate_size": 8,
            "num_global_layers": 1,
            "num_hidden_layers": 1,
            "patch_size": 14,
            "vision_output_dim": 16,
        },
    ),
    "mistral3-tied": Case(
        "mistral3",
        {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
        (20, 13),
        dtype=torch.bfloat16,
        vision=PIXTRAL,
        top={"tie_word_embeddings": True},
    ),
    "mistral3": Case(
        "mistral3",
        {"model_type": "mistral", "sliding_window": 6, "head_dim": 12},
        (20, 13),
        vision=PIXTRAL,
        top={"tie_word_embeddings": False},
    ),
}


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Gives norms and biases values that matter; other weights keep their wide random initialisation."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data = 1.0 + 0.3 * noise
        elif name.endswith("bias"):
            parameter.data = 0.3 * noise


def factory(case: Case) -> Any:
    return AutoModelForCausalLM if case.vision is None else AutoModelForImageTextToText


def save(case: Case, seed: int, folder: Path) -> None:
    torch.manual_seed(seed)
    keys = SMALL | {"dtype": "float32"} | copy.deepcopy(case.keys)
    if case.vision is not None:
        keys = {"dtype": "float32", "text_config": keys, "vision_config": dict(case.vision), **case.top}
    config = AutoConfig.for_model(case.model_type, **keys)
    model = factory(case).from_config(config)
    randomise(model, torch.Generator().manual_seed(seed))
    model.to(case.dtype).save_pretrained(folder, max_shard_size=case.max_shard_size)
    if case.old_style:
        make_old_style(folder / "config.json")


def make_old_style(path: Path) -> None:
    """Rewrites config.json as transformers 4 wrote it."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    config["torch_dtype"] = config.pop("dtype")
    del config["head_dim"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def run_row(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, list[int], float]:
    """Logits of one row [seq, vocab], its greedy continuation, and the smallest lead of a greedy choice."""
    # Dynamic rope keeps state between calls: every row starts from a fresh model.
    model = copy.deepcopy(model)
    logits = model(ids[None], use_cache=False).logits[0]
    rotary = getattr(model.model, "language_model", model.model).rotary_emb
    if rotary.rope_type == "dynamic":
        rotary.rope_type = "default"  # from here on the base is frozen
    margin, tokens, current = float("inf"), [], logits[-1]
    for _ in range(NEW_TOKENS):
        first, second = current.topk(2).values.tolist()
        margin = min(margin, first - second)
        tokens.append(int(current.argmax()))
        ids = torch.cat([ids, torch.tensor(tokens[-1:])])
        current = model(ids[None], use_cache=False).logits[0, -1]
    return logits, tokens, margin


NO_TEXT = ("vision_tower.", "vision_model.", "multi_modal_projector.")


def dead_tensors(model: torch.nn.Module, rows: list[torch.Tensor]) -> list[str]:
    """Parameters (for expert stacks: any expert of one) that no logit depends on."""
    model = copy.deepcopy(model)
    for row in rows:
        logits = model(row[None], use_cache=False).logits
        (logits * torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)).sum().backward()
    crossing = getattr(model.config.get_text_config(), "cross_attention_layers", ())
    unused = (*NO_TEXT, *(f"language_model.layers.{i}." for i in crossing))
    dead = []
    for name, parameter in model.named_parameters():
        if any(part in name for part in unused):
            continue
        slices = parameter.grad if "experts" in name and parameter.ndim == 3 else [parameter.grad]
        # (A key bias cancels in the softmax unless rope rotates it; rounding then leaves a gradient that is not 0.)
        if any(float(grad.abs().max()) == 0.0 for grad in slices):
            dead.append(name)
    return dead


def compute(case: Case, seed: int, folder: Path) -> str | None:
    """Writes expected.npz; returns why this seed will not do, or None."""
    load = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"}
    model = factory(case).from_pretrained(folder, **load).eval()
    rng = np.random.default_rng(seed)
    rows = [torch.from_numpy(rng.integers(3, SMALL["vocab_size"], n)) for n in case.lengths]
    if dead := dead_tensors(model, rows):
        return f"no gradient reaches {', '.join(dead)}"
    batch, seq = len(rows), max(case.lengths)
    ids = np.zeros((batch, seq), np.int64)
    mask = np.zeros((batch, seq), np.int64)
    logits = np.zeros((batch, seq, SMALL["vocab_size"]), np.float32)
    greedy = np.zeros((batch, NEW_TOKENS), np.int64)
    with torch.no_grad():
        double = copy.deepcopy(model).double()
        for i, row in enumerate(rows):
            ids[i, -len(row) :], mask[i, -len(row) :] = row.numpy(), 1
            out, tokens, margin = run_row(model, row)
            exact, exact_tokens, _ = run_row(double, row)
            scale = float(out.abs().max())
            error = float((out - exact).abs().max())
            if error > 1e-5 * scale or tokens != exact_tokens:
                return f"float32 is {error / scale:.1e} from float64"
            if margin < 1e-3 * scale:
                return f"greedy lead of {margin / scale:.1e}"
            logits[i, -len(row) :], greedy[i] = out.numpy(), tokens
    np.savez_compressed(folder / "expected.npz", input_ids=ids, attention_mask=mask, logits=logits, greedy=greedy)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes golden cases with transformers.")
    parser.add_argument("out", type=Path, help="folder for the cases")
    parser.add_argument("cases", nargs="*", help="names of cases; all text models when none is named")
    args = parser.parse_args()
    for name in args.cases or [name for name, case in CASES.items() if case.vision is None]:
        folder = args.out / name
        for seed in range(20):
            shutil.rmtree(folder, ignore_errors=True)
            save(CASES[name], seed, folder)
            reason = compute(CASES[name], seed, folder)
            if reason is None:
                size = sum(file.stat().st_size for file in folder.iterdir())
                print(f"{name}: seed {seed}, {size // 1000} kB")
                break
            print(f"{name}: seed {seed} refused: {reason}")
        else:
            raise SystemExit(f"{name}: no usable seed")


if __name__ == "__main__":
    main()
