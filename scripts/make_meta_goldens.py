"""Writes tests/data/meta and tests/data/torch: tiny checkpoints as Meta and torch write them, and what comes of them.

Needs torch, transformers and tiktoken:

    uv run --group hf --with tiktoken --with regex python scripts/make_meta_goldens.py tests/data

Each case in `meta` holds params.json, a folder `SHARDS/` of consolidated.NN.pth for each way to cut the model, and
expected.npz as scripts/make_goldens.py writes it. The logits come from a forward pass written after Meta's model.py, on
Meta's layout of the weights (rope turns neighbouring pairs); transformers, on its own layout, has to agree.

`meta/tokenizer.model` is a small vocabulary in Llama 3's format, `meta/tokenizer_ids.json` what tiktoken makes of some
texts with it. `torch` holds files of `torch.save` with tensors of every kind, and the same tensors as npz.
"""

from __future__ import annotations

import argparse
import base64
import collections
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch
from tiktoken._educational import bpe_train
from transformers import LlamaConfig, LlamaForCausalLM

NEW_TOKENS = 16
LENGTHS = (20, 13)
SPECIAL_TOKENS = 256
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "The quick brown fox jumps over the lazy dog; isn't it? We'll see: THEY'RE here, I'm not, he'd gone.",
    "def f(x_y: int) -> str:\n    return  f'{x_y ** 2:>10}'   # two  and   three spaces\n\n\tif a[0] != b: pass\r\n",
    "0 1 12 123 1234 12345 123456 3.14159 1,234,567.89 0x1F ½ ²³ ٣٤٥ 四十二",
    "Ünïcödé façade, naïve Straße; Ελληνικά Кириллица עברית العربية हिन्दी ไทย 日本語と中文 한국어 Việt Nam",
    "emoji 👍🏽 👩\u200d💻 🇩🇪 ❤️ and e\u0301 combining, zero\u200bwidth, \u00a0nbsp\u3000wide",
    "   leading\n\n\n  and trailing   \n \t \n",
    "{}[]()<>;:'\"`~!@#$%^&*-_=+\\|/?,. \U0001f600\u2028\u2029\x00\x7f\ufffd",
    "<|begin_of_text|>user<|eot_id|> is plain text here",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa aaaaaa aaa aa a" + " " * 33 + "=" * 70,
    "",
    " ",
    "\n",
    "'S 'LL n'T",
]


@dataclass(frozen=True)
class Case:
    """One model: its params.json, the size of its vocabulary, and how it is cut."""

    params: dict[str, Any]
    vocab: int
    dtype: torch.dtype
    shards: tuple[int, ...]
    rope_factor: float | None = None
    tied: bool = False


def cases(llama3_vocab: int) -> dict[str, Case]:
    base = {"dim": 32, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5}
    llama3 = base | {"n_kv_heads": 2, "vocab_size": llama3_vocab, "rope_theta": 500000.0, "use_scaled_rope": True}
    return {
        "llama2": Case(base | {"multiple_of": 16, "vocab_size": -1}, 400, torch.float16, (1, 2, 4)),
        "llama3.1": Case(
            llama3 | {"multiple_of": 32, "ffn_dim_multiplier": 1.3}, llama3_vocab, torch.bfloat16, (2,), 8.0
        ),
        "llama3.2": Case(
            llama3 | {"multiple_of": 32, "ffn_dim_multiplier": 0.7}, llama3_vocab, torch.bfloat16, (1,), 32.0, True
        ),
    }


def mlp_width(params: dict[str, Any]) -> int:
    width = int(2 * 4 * params["dim"] / 3)
    if params.get("ffn_dim_multiplier") is not None:
        width = int(params["ffn_dim_multiplier"] * width)
    return params["multiple_of"] * ((width + params["multiple_of"] - 1) // params["multiple_of"])


def random_weights(case: Case, generator: torch.Generator) -> dict[str, torch.Tensor]:
    p = case.params
    dim, width = p["dim"], mlp_width(p)
    kv = dim // p["n_heads"] * p.get("n_kv_heads", p["n_heads"])
    shapes = {"tok_embeddings": (case.vocab, dim)}
    for i in range(p["n_layers"]):
        shapes |= {
            f"layers.{i}.attention.wq": (dim, dim),
            f"layers.{i}.attention.wk": (kv, dim),
            f"layers.{i}.attention.wv": (kv, dim),
            f"layers.{i}.attention.wo": (dim, dim),
            f"layers.{i}.feed_forward.w1": (width, dim),
            f"layers.{i}.feed_forward.w2": (dim, width),
            f"layers.{i}.feed_forward.w3": (width, dim),
        }
    shapes["output"] = (case.vocab, dim)
    norms = ["norm", *(f"layers.{i}.{n}_norm" for i in range(p["n_layers"]) for n in ("attention", "ffn"))]
    made = {f"{n}.weight": torch.randn(s, generator=generator) * 0.25 for n, s in shapes.items()}
    made |= {f"{n}.weight": 1 + 0.2 * torch.randn(dim, generator=generator) for n in norms}
    made = {n: w.to(case.dtype) for n, w in made.items()}
    if case.tied:
        made["output.weight"] = made["tok_embeddings.weight"]
    return made


def frequencies(case: Case) -> torch.Tensor:
    p = case.params
    size = p["dim"] // p["n_heads"]
    freqs = 1.0 / p.get("rope_theta", 10000.0) ** (torch.arange(0, size, 2).double() / size)
    if case.rope_factor is None:
        return freqs
    # Long waves are stretched by the factor, short ones kept, those between mixed (Llama 3.1).
    out = []
    for freq in freqs.tolist():
        turns = 8192 * freq / (2 * np.pi)
        mix = min(max((turns - 1) / (4 - 1), 0.0), 1.0)
        out.append((1 - mix) * freq / case.rope_factor + mix * freq)
    return torch.tensor(out, dtype=torch.float64)


def forward(case: Case, weights: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """Logits [seq, vocab] in float64, in Meta's layout: rope turns the pairs (2i, 2i + 1) as complex numbers."""
    p, w = case.params, {n: t.double() for n, t in weights.items()}
    heads, kv_heads, seq = p["n_heads"], p.get("n_kv_heads", p["n_heads"]), len(ids)
    turn = torch.outer(torch.arange(seq).double(), frequencies(case))
    turn = torch.polar(torch.ones_like(turn), turn)[:, None, :]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + p["norm_eps"]) * w[f"{name}.weight"]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    h = w["tok_embeddings.weight"][ids]
    mask = torch.full((seq, seq), -torch.inf).double().triu(1)
    for i in range(p["n_layers"]):
        name = f"layers.{i}"
        x = norm(h, f"{name}.attention_norm")
        q, k, v = (
            (x @ w[f"{name}.attention.w{c}.weight"].T).view(seq, n, -1)
            for c, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = rotated(q), rotated(k).repeat_interleave(heads // kv_heads, 1)
        v = v.repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5 + mask
        h = h + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ w[f"{name}.attention.wo.weight"].T
        x = norm(h, f"{name}.ffn_norm")
        gate = torch.nn.functional.silu(x @ w[f"{name}.feed_forward.w1.weight"].T)
        h = h + (gate * (x @ w[f"{name}.feed_forward.w3.weight"].T)) @ w[f"{name}.feed_forward.w2.weight"].T
    return norm(h, "norm") @ w["output.weight"].T


def transformers_model(case: Case, weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    p = case.params
    theta = p.get("rope_theta", 10000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if case.rope_factor:
        rope = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": case.rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    config = LlamaConfig(
        vocab_size=case.vocab,
        hidden_size=p["dim"],
        intermediate_size=mlp_width(p),
        num_hidden_layers=p["n_layers"],
        num_attention_heads=p["n_heads"],
        num_key_value_heads=p.get("n_kv_heads", p["n_heads"]),
        rms_norm_eps=p["norm_eps"],
        rope_parameters=rope,
        tie_word_embeddings=case.tied,
        max_position_embeddings=131072,
        attn_implementation="eager",
    )
    names = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    state = {}
    for name, weight in weights.items():
        if ".wq." in name or ".wk." in name:
            heads = p["n_heads"] if ".wq." in name else p.get("n_kv_heads", p["n_heads"])
            weight = weight.view(heads, -1, 2, p["dim"]).transpose(1, 2).reshape(-1, p["dim"])
        for ours, theirs in names.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        name = name.replace("tok_embeddings", "embed_tokens")
        state["lm_head.weight" if name == "output.weight" else f"model.{name}"] = weight.float()
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    return model


def shard(case: Case, weights: dict[str, torch.Tensor], rank: int, n: int) -> dict[str, torch.Tensor]:
    """The part that process `rank` of `n` holds."""
    rows = ("wq", "wk", "wv", "w1", "w3", "output")
    part = collections.OrderedDict()
    for name, weight in weights.items():
        kind = name.split(".")[-2]
        axes = dict.fromkeys(rows, 0) | {"wo": 1, "w2": 1, "tok_embeddings": 0 if case.rope_factor else 1}
        axis = axes.get(kind)
        if n == 1 or axis is None:
            part[name] = weight
        else:
            part[name] = weight.chunk(n, axis)[rank].clone(memory_format=torch.contiguous_format)
    part["rope.freqs"] = frequencies(case).to(case.dtype)
    return part


def make_case(case: Case, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        weights = random_weights(case, generator)
        rows = [torch.randint(0, case.vocab, (n,), generator=generator).tolist() for n in LENGTHS]
        if (expected := compute(case, weights, rows)) is not None:
            break
    else:
        raise SystemExit(f"{folder}: no seed will do")
    np.savez_compressed(folder / "expected.npz", **expected)
    (folder / "params.json").write_text(json.dumps(case.params) + "\n")
    for n in case.shards:
        (folder / str(n)).mkdir(exist_ok=True)
        for rank in range(n):
            torch.save(shard(case, weights, rank, n), folder / str(n) / f"consolidated.{rank:02}.pth")
    print(folder, "seed", seed)


def compute(case: Case, weights: dict[str, torch.Tensor], rows: list[list[int]]) -> dict[str, Any] | None:
    """The arrays of expected.npz; None where a greedy choice is too close for float32."""
    longest = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), longest), np.int64)
    logits = np.zeros((len(rows), longest, case.vocab), np.float32)
    greedy = np.zeros((len(rows), NEW_TOKENS), np.int64)
    other = transformers_model(case, weights)
    for i, row in enumerate(rows):
        ids[i, -len(row) :], mask[i, -len(row) :] = row, 1
        out = forward(case, weights, row)
        with torch.no_grad():
            theirs = other(torch.tensor([row])).logits[0]
        difference = float((out - theirs).abs().max() / out.abs().max())
        if difference > 1e-5:
            raise SystemExit(f"transformers differs by {difference:.1e}")
        logits[i, -len(row) :] = out.float().numpy()
        tokens = list(row)
        for step in range(NEW_TOKENS):
            last = forward(case, weights, tokens)[-1]
            best = last.topk(2)
            if float(best.values[0] - best.values[1]) < 1e-3 * float(out.abs().max()):
                return None
            greedy[i, step] = int(best.indices[0])
            tokens.append(int(best.indices[0]))
    return {"input_ids": ids, "attention_mask": mask, "logits": logits, "greedy": greedy}


def make_tokenizer(folder: Path) -> int:
    """Writes the vocabulary and the ids; returns the number of tokens, control tokens included."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = bpe_train("\n".join(TEXTS * 2), 256 + 128, SPLIT, visualise=None)
    # Meta's file, like GPT-2's vocabulary, starts with the printable bytes.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    order = [bytes([b]) for b in (*printable, *(b for b in range(256) if b not in printable))]
    order += [token for token, _ in sorted(trained.items(), key=lambda item: item[1]) if len(token) > 1]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(order)]
    (folder / "tokenizer.model").write_text("".join(lines))
    ranks = {token: rank for rank, token in enumerate(order)}
    special = {"<|begin_of_text|>": len(order), "<|end_of_text|>": len(order) + 1, "<|eot_id|>": len(order) + 9}
    encoding = tiktoken.Encoding("llama3", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)
    ids = [
        {
            "text": text,
            "plain": encoding.encode(text, disallowed_special=()),
            "special": encoding.encode(text, allowed_special="all"),
        }
        for text in TEXTS
    ]
    (folder / "tokenizer_ids.json").write_text(json.dumps(ids, indent=1) + "\n")
    return len(order) + SPECIAL_TOKENS


def make_torch_files(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 4, generator=generator)
    state = collections.OrderedDict(
        plain=a,
        shared=a,
        transposed=a.T,
        part=a[1:4, 1:3],
        permuted=torch.randn(3, 4, 5, generator=generator).permute(2, 0, 1),
        half=a.half(),
        bfloat16=a.bfloat16(),
        parameter=torch.nn.Parameter(a[2]),
        scalar=torch.tensor(1.5),
        empty=torch.zeros(0, 3),
        int64=torch.arange(3),
        bool=torch.tensor([True, False]),
    )
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  # as Module.state_dict does
    torch.save(state, folder / "zip.bin")
    torch.save(state, folder / "before_1.6.bin", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(2, 2), folder / "module.bin")
    np.savez_compressed(folder / "expected.npz", **{n: t.detach().double().numpy() for n, t in state.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description="Write tests/data/meta and tests/data/torch.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    vocab = make_tokenizer(folder / "meta")
    for name, case in cases(vocab).items():
        make_case(case, folder / "meta" / name)
    make_torch_files(folder / "torch")


if __name__ == "__main__":
    main()
