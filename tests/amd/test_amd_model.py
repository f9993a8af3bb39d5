"""Whole models on emulated GPUs: prefill, then decode steps with the cache, against the same code on the CPU.

Both compute in bfloat16, so they agree as far as bfloat16 goes. With the same tokens given to both, logits may differ by
LOGITS_TOLERANCE of the largest, keys and values by CACHE_TOLERANCE: a few roundings of 2^-8 each, over two layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params

from amd.harness import ARCHS, compile_on
from llama_jax.cache import DenseCache
from llama_jax.config import LayerSpec, LlamaConfig, MoeSpec
from llama_jax.kernels.attention import decode_attention, flash_attention
from llama_jax.kernels.dispatch import Operation, using
from llama_jax.kernels.moe import grouped_experts
from llama_jax.model import forward

# Pallas's Triton lowering, which JAX has deprecated.
pytestmark = [pytest.mark.amd, pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")]

LOGITS_TOLERANCE = CACHE_TOLERANCE = 2.0**-6
PROMPT, STEPS, CAPACITY = 24, 8, 64
OPERATIONS: tuple[Operation, ...] = (flash_attention, decode_attention, grouped_experts)


def config(*layers: LayerSpec) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        layers=layers,
        max_position_embeddings=128,
        dtype="bfloat16",
    )


# Full attention and a window, a dense MLP and experts.
MODELS = {
    "dense": config(LayerSpec(mlp=256), LayerSpec("sliding", 16, mlp=256)),
    "experts": config(LayerSpec(mlp=256), LayerSpec(mlp=MoeSpec(4, 2, 128))),
}


def relative_error(actual: np.ndarray, expected: jax.Array) -> float:
    want = np.asarray(expected, np.float64)
    got = actual.astype(np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    return float(np.abs(got - want).max() / np.abs(want).max())


def named(backend: str) -> Mapping[str, str]:
    """`backend` for every operation that has it."""
    return {op.name: backend for op in OPERATIONS if backend in op.backends}


def assert_launched(kernels: Counter[str], operation: Operation) -> None:
    """The kernels of an operation are named after it."""
    assert any(name.startswith(operation.name) for name in kernels), f"{operation.name} is not among {dict(kernels)}"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("backend", ["reference", pytest.param("pallas_triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", ["dense", pytest.param("experts", marks=pytest.mark.slow)])
def test_prefill_and_decode(arch: str, backend: str, model: str) -> None:
    chosen = named(backend)
    if not chosen:
        pytest.skip(f"no operation has a backend {backend}")
    cfg = MODELS[model]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(cfg))
    tokens = np.random.default_rng(1).integers(0, cfg.vocab_size, (1, PROMPT + STEPS)).astype(np.int32)
    positions = np.arange(PROMPT + STEPS, dtype=np.int32)[None]

    def prefill(params, tokens, positions):  # type: ignore[no-untyped-def]
        return forward(params, cfg, tokens, positions, DenseCache.create(cfg, 1, CAPACITY, jnp.bfloat16))

    def step(params, tokens, positions, cache):  # type: ignore[no-untyped-def]
        return forward(params, cfg, tokens, positions, cache)

    first = (params, tokens[:, :PROMPT], positions[:, :PROMPT])
    with using(**named("reference")):
        want, want_cache = jax.jit(prefill)(*first)
        cpu_step = jax.jit(step)
    with using(**chosen):
        (got, cache), report = compile_on(arch, prefill, *first).run(*first)
        kernels = Counter(report.kernels)
        print(f"prefill on {arch}: {report.wave_instructions} wave instructions, {dict(report.kernels)}")
        assert relative_error(got, want) < LOGITS_TOLERANCE
        amd_step = compile_on(arch, step, params, tokens[:, :1], positions[:, :1], cache)
        for n in range(PROMPT, PROMPT + STEPS):
            now = (tokens[:, n : n + 1], positions[:, n : n + 1])
            (got, cache), report = amd_step.run(params, *now, cache)
            kernels += report.kernels
            with using(**named("reference")):
                want, want_cache = cpu_step(params, *now, want_cache)
            assert relative_error(got, want) < LOGITS_TOLERANCE
        print(f"decode step on {arch}: {report.wave_instructions} wave instructions, {dict(report.kernels)}")
    for mine, theirs in zip(jax.tree.leaves((cache.k, cache.v)), jax.tree.leaves((want_cache.k, want_cache.v)), strict=True):
        assert relative_error(mine, theirs) < CACHE_TOLERANCE
    np.testing.assert_array_equal(cache.positions, want_cache.positions)
    assert int(cache.length) == PROMPT + STEPS
    if backend != "reference":
        for operation in OPERATIONS:
            if operation.name in chosen and (operation is not grouped_experts or model == "experts"):
                assert_launched(kernels, operation)
