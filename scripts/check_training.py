#!/usr/bin/env python
"""Gradients of the loss on this device by its kernels, against the references in float32, for every family; and whether
two runs of a few steps end with the same bits.

    python scripts/check_training.py
    python scripts/check_training.py mixtral llama4
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_shared import UNTUNED

from llama_jax.config import LayerSpec, LlamaConfig, MoeSpec
from llama_jax.kernels.dispatch import using
from llama_jax.kernels.dispatch.operation import recorder
from llama_jax.params import flatten, init_params
from llama_jax.training import Batch, Optimizer, full, initial_state, loss, make_step

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "dtype": "float32",
}
DENSE = LayerSpec(mlp=512)
FAMILIES = {
    "llama": LlamaConfig(layers=(DENSE, DENSE), **SIZES),
    "tied": LlamaConfig(layers=(DENSE, DENSE), tie_word_embeddings=True, **SIZES),
    "qwen2": LlamaConfig(layers=(DENSE, DENSE), qkv_bias=True, **SIZES),
    "qwen3": LlamaConfig(layers=(dataclasses.replace(DENSE, qk_norm="rms"),) * 2, **SIZES),
    "mistral": LlamaConfig(layers=(dataclasses.replace(DENSE, attention="sliding", window=100),) * 2, **SIZES),
    "mixtral": LlamaConfig(layers=(LayerSpec(mlp=MoeSpec(4, 2, 256)),) * 2, **SIZES),
    "llama4": LlamaConfig(
        layers=(
            LayerSpec(
                "chunked", 64, qk_norm="l2", mlp=MoeSpec(4, 1, 256, router="sigmoid", shared_intermediate_size=256)
            ),
            LayerSpec(rope=False, mlp=512),
        ),
        **SIZES,
    ),
}
OPTIONS = UNTUNED if jax.default_backend() == "gpu" else {}
REFERENCES = {"flash_attention": "reference", "add_rms_norm": "reference", "moe": "reference"}


def batch_of(config: LlamaConfig, rows: int = 2, length: int = 320) -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (rows, length)).astype(np.int32)
    labels = np.where(rng.random(tokens.shape) < 0.8, tokens, -100).astype(np.int32)
    segments = np.sort(rng.integers(0, 4, tokens.shape), axis=-1).astype(np.int32)
    return Batch(tokens, labels, segments)


def random(config: LlamaConfig) -> Any:
    return jax.jit(lambda: init_params(config, jax.random.key(0), jnp.float32))()


def gradient(config: LlamaConfig, params: Any, batch: Batch, dtype: Any, kernels: dict[str, str]) -> Any:
    def mean(params: Any) -> jax.Array:
        total, count = loss(jax.tree.map(lambda x: x.astype(dtype), params), config, batch, logits=512 * 2 * 100)
        return total / count

    with using(**kernels):
        return jax.jit(jax.value_and_grad(mean), compiler_options=OPTIONS)(params)


def main() -> None:
    print(jax.devices()[0].device_kind, jax.__version__)
    names = sys.argv[1:] or list(FAMILIES)
    for name in names:
        config = FAMILIES[name]
        params = random(config)
        batch = batch_of(config)
        exact, wanted = gradient(config, params, batch, jnp.float32, REFERENCES)
        wanted = flatten(jax.device_get(wanted))
        for dtype in ("float32", "bfloat16"):
            found, got = gradient(config, params, batch, jnp.dtype(dtype), {})
            errors = {
                leaf: float(np.linalg.norm(g - w) / max(np.linalg.norm(w), 1e-12))
                for (leaf, g), w in zip(flatten(jax.device_get(got)).items(), wanted.values(), strict=True)
            }
            worst = max(errors, key=errors.__getitem__)
            print(
                f"{name:8} {dtype:8} loss {abs(float(found - exact)):.2e}, gradient {errors[worst]:.2e} in {worst}",
                flush=True,
            )
    print(*sorted({f"{choice.operation}: {choice.backend}" for choice in recorder.counts()}), sep="\n")
    for name in names:
        print(name, "two runs end with the same bits:", same_bits(FAMILIES[name]), flush=True)


def same_bits(config: LlamaConfig) -> bool:
    ends = []
    for _ in range(2):
        transformation = Optimizer(learning_rate=1e-2).transformation(8)
        state = initial_state(random(config), transformation)
        step = make_step(full(config, jnp.bfloat16), transformation, state)
        batch = jax.tree.map(lambda x: x[None], batch_of(config, rows=16))
        for _ in range(8):
            state, _ = step(state, None, batch)
        ends.append(state.trained)
    return all(bool(jnp.array_equal(a, b)) for a, b in zip(*map(jax.tree.leaves, ends), strict=True))


if __name__ == "__main__":
    main()
