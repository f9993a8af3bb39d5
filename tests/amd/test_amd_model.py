"""Whole models on emulated GPUs: prefill, then decode steps with the cache, against the same code on the CPU.

Both compute in bfloat16, which alone puts the logits of these models up to 0.013 away from float32 (norm of the
difference over the norm, of one token). So TOLERANCE between two such computations is 0.025; a window that is one slot
too wide gives twice as much.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, random_tokens, run

from amd.harness import ARCHS, compile_on
from llama_jax.cache import DenseCache
from llama_jax.config import LayerSpec, LlamaConfig, MoeSpec
from llama_jax.kernels.attention import decode_attention, flash_attention
from llama_jax.kernels.dispatch import Operation, using
from llama_jax.kernels.moe import routed_experts_op
from llama_jax.kernels.norm import add_rms_norm_op
from llama_jax.model import forward
from llama_jax.params import Params

# Pallas's Triton lowering, which JAX has deprecated.
pytestmark = [pytest.mark.amd, pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")]

TOLERANCE = 0.025
PROMPT, STEPS, CAPACITY = 24, 8, 64
OPERATIONS: tuple[Operation, ...] = (flash_attention, decode_attention, routed_experts_op, add_rms_norm_op)


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


def error(actual: np.ndarray | jax.Array, expected: jax.Array) -> float:
    """||actual - expected|| / ||expected|| of the worst vector (last axis)."""
    got, want = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    return float((np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)).max())


def named(backend: str) -> Mapping[str, str]:
    """`backend` for every operation that has it."""
    return {op.name: backend for op in OPERATIONS if backend in op.backends}


def assert_launched(kernels: Counter[str], operation: Operation) -> None:
    """The kernels of an operation are named after it."""
    assert any(name.startswith(operation.name) for name in kernels), f"{operation.name} is not among {dict(kernels)}"


def test_the_tolerance_notices_a_window_that_is_too_wide() -> None:
    cfg, params, tokens = MODELS["dense"], random_params(MODELS["dense"]), random_tokens(MODELS["dense"], 1, PROMPT)
    wide = cfg.replace(layers=(cfg.layers[0], dataclasses.replace(cfg.layers[1], window=17)))
    right, wrong = (run(params, c, tokens)[0] for c in (cfg, wide))
    assert error(wrong, right) > 2 * TOLERANCE


def decided_tokens(cfg: LlamaConfig, params: Params) -> np.ndarray:
    """Token ids [1, PROMPT + STEPS] whose experts are far from a tie, where a rounding would choose another."""
    candidates = np.random.default_rng(1).integers(0, cfg.vocab_size, (32, PROMPT + STEPS)).astype(np.int32)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    _, _, seen = run(exact, cfg, candidates, capture=("layers.*.mlp_in",))
    gap = np.full(len(candidates), np.inf)
    for index, layer in enumerate(cfg.layers):
        if isinstance(layer.mlp, MoeSpec):
            logits = seen[f"layers.{index}.mlp_in"] @ exact["layers"][str(index)]["moe"]["router"]["weight"].T
            *_, last_in, first_out = np.moveaxis(np.asarray(jax.lax.top_k(logits, layer.mlp.top_k + 1)[0]), -1, 0)
            gap = np.minimum(gap, (last_in - first_out).min(axis=-1))
    assert gap.max() > 0.05
    return candidates[[gap.argmax()]]


def numbers(cache: DenseCache) -> list[jax.Array]:
    """Keys and values of all layers."""
    scales = [1.0 if x is None else x.astype(jnp.float32)[..., None] for x in (*cache.k_scale, *cache.v_scale)]
    return [x.astype(jnp.float32) * scale for x, scale in zip((*cache.k, *cache.v), scales, strict=True)]


CASES = [
    pytest.param(arch, backend, model, cache, marks=pytest.mark.slow, id=f"{model}-{backend}-{arch}-{cache}")
    for backend, model, arch, cache in [
        *product(("pallas_triton",), MODELS, ARCHS, ("bfloat16",)),
        ("reference", "experts", "gfx942", "bfloat16"),
        ("pallas_triton", "dense", "gfx942", "int8"),
        ("reference", "dense", "gfx942", "fp8_fnuz"),
        ("pallas_triton", "dense", "gfx950", "fp8"),
    ]
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("arch", "backend", "model", "dtype"), CASES)
def test_prefill_and_decode(arch: str, backend: str, model: str, dtype: str) -> None:
    chosen = named(backend)
    if not chosen:
        pytest.skip(f"no operation has a backend {backend}")
    # A step of an eight-bit float is a sixteenth of it: some codes are neighbours of the CPU's.
    tolerance = (2 if dtype.startswith("fp8") else 1) * TOLERANCE
    cfg = MODELS[model]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(cfg))
    tokens = decided_tokens(cfg, params)
    positions = np.arange(PROMPT + STEPS, dtype=np.int32)[None]

    def prefill(params, tokens, positions):  # type: ignore[no-untyped-def]
        return forward(params, cfg, tokens, positions, DenseCache.create(cfg, 1, CAPACITY, dtype))

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
        assert error(got, want) < tolerance
        amd_step = compile_on(arch, step, params, tokens[:, :1], positions[:, :1], cache)
        for n in range(PROMPT, PROMPT + STEPS):
            now = (tokens[:, n : n + 1], positions[:, n : n + 1])
            (got, cache), report = amd_step.run(params, *now, cache)
            kernels += report.kernels
            with using(**named("reference")):
                want, want_cache = cpu_step(params, *now, want_cache)
            assert error(got, want) < tolerance
        print(f"decode step on {arch}: {report.wave_instructions} wave instructions, {dict(report.kernels)}")
    for mine, theirs in zip(numbers(cache), numbers(want_cache), strict=True):
        used = slice(0, PROMPT + STEPS)
        assert error(mine[:, :, used], theirs[:, :, used]) < tolerance
    np.testing.assert_array_equal(cache.positions, want_cache.positions)
    assert int(cache.length) == PROMPT + STEPS
    if backend != "reference":
        for operation in OPERATIONS:
            if operation.name in chosen and (operation is not routed_experts_op or model == "experts"):
                assert_launched(kernels, operation)
