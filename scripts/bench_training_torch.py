"""Steps of training by PyTorch, for `scripts/bench_training.py --torch`, which starts this in a process of its own.

A compact Llama: fused projections, `scaled_dot_product_attention`, `torch.compile`, AdamW's fused kernel, cross entropy
of 512 tokens of each row at a time, whose logits are computed again for the gradient. Weights that are trained are
float32 and computed with in bfloat16; rows of one text each. Needs torch alone; reads its sizes as JSON from standard
input.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

CHUNK = 512


def model_of(sizes: dict[str, Any], torch: Any) -> Any:
    nn: Any = torch.nn
    functional = nn.functional
    hidden, heads, kv, dim = (sizes[n] for n in ("hidden_size", "num_heads", "num_kv_heads", "head_dim"))
    lora = sizes["method"] == "lora"
    base = torch.bfloat16 if lora else torch.float32

    class Linear(nn.Module):  # type: ignore[misc, unused-ignore]
        def __init__(self, into: int, out: int):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(out, into, device="cuda", dtype=base) * into**-0.5, not lora)
            if lora:
                self.a = nn.Parameter(torch.randn(sizes["rank"], into, device="cuda") * into**-0.5)
                self.b = nn.Parameter(torch.zeros(out, sizes["rank"], device="cuda"))

        def forward(self, x: Any) -> Any:
            out = functional.linear(x, self.weight.to(x.dtype))
            if lora:
                out = out + 2 * functional.linear(functional.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
            return out

    class Norm(nn.Module):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(hidden, device="cuda", dtype=base), not lora)

        def forward(self, x: Any) -> Any:
            return functional.rms_norm(x.float(), (hidden,), eps=1e-5).to(x.dtype) * self.weight.to(x.dtype)

    def rotated(x: Any, cos: Any, sin: Any) -> Any:
        one, two = x.float().chunk(2, dim=-1)
        return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1).to(x.dtype)

    class Layer(nn.Module):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([Norm(), Norm()])
            self.qkv, self.o = Linear(hidden, (heads + 2 * kv) * dim), Linear(heads * dim, hidden)
            self.gate_up, self.down = Linear(hidden, 2 * sizes["mlp"]), Linear(sizes["mlp"], hidden)

        def forward(self, x: Any, cos: Any, sin: Any) -> Any:
            rows, length, _ = x.shape
            q, k, v = self.qkv(self.norms[0](x)).view(rows, length, -1, dim).transpose(1, 2).split([heads, kv, kv], 1)
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + self.o(out.transpose(1, 2).reshape(rows, length, -1))
            gate, up = self.gate_up(self.norms[1](x)).chunk(2, dim=-1)
            return x + self.down(functional.silu(gate) * up)

    class Llama(nn.Module):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            table = torch.randn(sizes["vocab_size"], hidden, device="cuda", dtype=base) * hidden**-0.5
            self.embed = nn.Parameter(table, not lora)
            self.head = self.embed if sizes["tied"] else nn.Parameter(torch.randn_like(table) * hidden**-0.5, not lora)
            self.layers = nn.ModuleList([Layer() for _ in range(sizes["num_layers"])])
            self.norm = Norm()

        def forward(self, tokens: Any, cos: Any, sin: Any) -> Any:
            x = self.embed[tokens].to(torch.bfloat16)
            for layer in self.layers:
                x = layer(x, cos, sin)
            return self.norm(x)

    return Llama()


def main() -> None:
    import torch
    from torch.utils.checkpoint import checkpoint

    sizes = json.loads(sys.stdin.read())
    torch.manual_seed(0)
    model = model_of(sizes, torch)
    length, dim = sizes["length"], sizes["head_dim"]
    angles = torch.arange(length, device="cuda")[:, None] * 5e5 ** (-torch.arange(0, dim, 2, device="cuda") / dim)
    cos, sin = angles.cos(), angles.sin()
    compiled = torch.compile(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    @torch.compile
    def entropy(x: Any, head: Any, wanted: Any) -> Any:
        logits = torch.nn.functional.linear(x, head.to(x.dtype)).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")

    def step(tokens: Any) -> Any:
        wanted = tokens.roll(-1, 1)
        wanted[:, -1] = -100  # ignored; parts of one size are compiled once
        parts = zip(compiled(tokens, cos, sin).split(CHUNK, 1), wanted.split(CHUNK, 1), strict=True)
        total = sum(checkpoint(entropy, x, model.head, part, use_reentrant=False) for x, part in parts)
        loss = total / tokens[:, 1:].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    batches = [torch.randint(0, sizes["vocab_size"], (sizes["rows"], length), device="cuda") for _ in range(4)]
    for batch in batches[:3]:
        step(batch).item()
    began = time.perf_counter()
    for i in range(sizes["steps"]):
        loss = step(batches[i % 4])
    loss.item()
    seconds = (time.perf_counter() - began) / sizes["steps"]
    found = {
        "torch": torch.__version__,
        **{name: sizes[name] for name in ("preset", "method", "rows", "length")},
        "step_s": round(seconds, 5),
        "tokens_per_s": round(sizes["rows"] * length / seconds),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "last_loss": float(loss),
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
