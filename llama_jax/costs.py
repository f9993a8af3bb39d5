"""What a model costs to run, counted from its shapes: weights that are read, and arithmetic."""

from __future__ import annotations

from llama_jax.config import LlamaConfig, MoeSpec
from llama_jax.params import ParamSpec, param_specs


def share_used(spec: ParamSpec, config: LlamaConfig, tokens: int) -> float:
    """Part of a parameter that a step of `tokens` tokens multiplies with: the embedding counts once, as logits, and of
    the experts only as many as the tokens can use."""
    if spec.name == "embed.weight" and not config.tie_word_embeddings:
        return 0.0
    if ".moe.experts." not in spec.name:
        return 1.0
    moe = config.layers[int(spec.path[1])].mlp
    assert isinstance(moe, MoeSpec)
    return min(1.0, tokens * moe.top_k / moe.num_experts)


def matmul_params(config: LlamaConfig, tokens: int) -> int:
    """Weights that a step of `tokens` tokens multiplies with."""
    return round(sum(spec.size * share_used(spec, config, tokens) for spec in param_specs(config)))


def step_bytes(config: LlamaConfig, itemsize: int, batch: int, length: int) -> int:
    """Bytes that a decode step must read: every weight that it uses once, and `length` tokens of cache for each row."""
    cache = 2 * config.num_layers * batch * length * config.kv_dim * itemsize
    return matmul_params(config, batch) * itemsize + cache


def prefill_flops(config: LlamaConfig, batch: int, prompt: int) -> int:
    """Multiplications and additions of a prompt: all products per token, causal attention, logits of the last token."""
    head = config.vocab_size * config.hidden_size
    attention = 2 * prompt * (prompt + 1) * config.q_dim * config.num_layers
    return batch * (2 * prompt * (matmul_params(config, 1) - head) + attention + 2 * head)
