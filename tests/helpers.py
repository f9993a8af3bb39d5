"""Shared by the tests of the model core: golden cases, tiny configurations, random weights."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import LayerSpec, LlamaConfig, MoeSpec, QueryScale, RopeSpec
from llama_jax.convert.opening import open_source
from llama_jax.model import forward
from llama_jax.params import Params, flatten, param_specs, projection_names, unflatten

GOLDENS = Path(__file__).parent / "data" / "goldens"
GOLDEN_CASES = tuple(sorted(path.name for path in GOLDENS.iterdir() if (path / "expected.npz").exists()))
TOLERANCE = 5e-5
"""Largest difference to the expected logits, as a share of the largest of them."""

run = jax.jit(forward, static_argnames=("config", "capture"))
"""`forward` as people use it; one compilation cache for all tests."""


def simulated(devices: int, **variables: str) -> dict[str, str]:
    """The environment of a process with some simulated devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | variables


def on_eight_devices(file: str, *marks: str) -> None:
    """Runs the tests of a file in a process that has eight simulated devices; its output tells which one failed."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "--durations=5", "-p", "no:cacheprovider", *marks]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name(file))],
        env=simulated(8, PYTEST_ADDOPTS=""),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


def computed_once[T](function: Callable[..., T]) -> Callable[..., T]:
    """The function, whose later calls have the arguments of the first one, `progress` aside, and get its result."""
    kept: list[tuple[Any, T]] = []

    def call(*args: Any, progress: Any = None, **options: Any) -> T:
        if not kept:
            kept.append(((args, options), function(*args, progress=progress, **options)))
        assert kept[0][0] == (args, options)
        return kept[0][1]

    return call


@dataclass(frozen=True)
class Golden:
    """A small checkpoint and what Hugging Face transformers computed with it, in float32.

    Attributes:
      tokens, positions: int32 [batch, len], left-padded; padding has position -1.
      mask: bool [batch, len].
      logits: float32 [batch, len, vocab_size].
      greedy: int32 [batch, n], the likeliest tokens after each row.
    """

    config: LlamaConfig
    params: Params
    tokens: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    logits: np.ndarray
    greedy: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return self.mask.sum(axis=1).astype(np.int32)


@functools.cache
def load_golden(case: str) -> Golden:
    """A golden case by the name of its folder, weights in float32."""
    source = open_source(GOLDENS / case)
    try:
        leaves = {s.name: jnp.asarray(source.read(s).astype(np.float32)) for s in param_specs(source.config)}
    finally:
        source.close()
    with np.load(GOLDENS / case / "expected.npz") as file:
        expected = dict(file)
    mask = expected["attention_mask"] > 0
    return Golden(
        config=source.config,
        params=unflatten(leaves),
        tokens=expected["input_ids"].astype(np.int32),
        positions=np.where(mask, np.cumsum(mask, axis=1) - 1, -1).astype(np.int32),
        mask=mask,
        logits=expected["logits"],
        greedy=expected["greedy"].astype(np.int32),
    )


def golden_json(case: str) -> dict[str, Any]:
    """The config.json of a golden case."""
    return json.loads((GOLDENS / case / "config.json").read_text())


def error(actual: Any, expected: Any, where: np.ndarray | None = None) -> float:
    """Largest difference as a share of the largest expected value, both taken where `where` is True."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    if where is not None:
        actual, expected = actual[where], expected[where]
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def assert_gradient(function: Callable[[Params], jax.Array], params: Params) -> None:
    """The gradient in a random direction is the slope between the points 1e-2 away on either side."""
    gradient = jax.jit(jax.grad(function))(params)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), params)
    step = 1e-2 / float(sum(jnp.vdot(d, d) for d in jax.tree.leaves(direction))) ** 0.5
    ends = [function(jax.tree.map(lambda x, d, s=s: x + s * step * d, params, direction)) for s in (-1, 1)]
    slope = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    np.testing.assert_allclose((ends[1] - ends[0]) / (2 * step), slope, rtol=3e-3)


def tiny_config(*layers: LayerSpec, **changes: Any) -> LlamaConfig:
    """A configuration that compiles in no time; `changes` are fields of `LlamaConfig`."""
    fields: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "layers": layers or (LayerSpec(mlp=24),),
        "max_position_embeddings": 64,
        "dtype": "float32",
    }
    return LlamaConfig(**fields | changes)


# Between them every branch of the forward pass.
TINY: Mapping[str, LlamaConfig] = {
    "plain": tiny_config(),
    "biased": tiny_config(
        LayerSpec("sliding", 3, qk_norm="rms", mlp=24), qkv_bias=True, o_bias=True, mlp_bias=True, num_kv_heads=4
    ),
    "tied-mqa": tiny_config(LayerSpec(mlp=24), tie_word_embeddings=True, num_kv_heads=1, activation="gelu_tanh"),
    "softmax-moe": tiny_config(LayerSpec(mlp=MoeSpec(4, 2, 12))),
    "sigmoid-moe": tiny_config(
        LayerSpec("chunked", 4, qk_norm="l2", mlp=MoeSpec(4, 2, 12, router="sigmoid", shared_intermediate_size=12)),
        LayerSpec(rope=False, query_scale=QueryScale(0.3, 2), mlp=24),
        rope=RopeSpec(interleaved=True),
    ),
}


def random_params(config: LlamaConfig, seed: int = 0) -> Params:
    """Random weights of every leaf: unlike `init_params`, norms are not all ones and biases not all zeros."""
    rng = np.random.default_rng(seed)
    flat = {}
    for spec in param_specs(config):
        noise = rng.standard_normal(spec.shape)
        if spec.init == "normal":
            flat[spec.name] = noise * spec.shape[-1] ** -0.5
        else:
            flat[spec.name] = float(spec.init == "ones") + 0.2 * noise
    return unflatten({name: jnp.asarray(leaf, jnp.float32) for name, leaf in flat.items()})


def random_tokens(config: LlamaConfig, batch: int, length: int, seed: int = 0) -> jax.Array:
    """int32 [batch, length]."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length)), jnp.int32)


def arange_positions(batch: int, length: int) -> jax.Array:
    """int32 [batch, length]: 0, 1, 2, ... in every row."""
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


def random_adapters(config: LlamaConfig, rank: int = 2, seed: int = 1) -> Params:
    """A low-rank adapter for every projection."""
    rng = np.random.default_rng(seed)
    shapes = {s.name: s.shape for s in param_specs(config)}
    flat: dict[str, Any] = {}
    for name in projection_names(config):
        out, into = shapes[f"{name}.weight"]
        flat[f"{name}.a"] = jnp.asarray(rng.standard_normal((rank, into)) * into**-0.5, jnp.float32)
        flat[f"{name}.b"] = jnp.asarray(rng.standard_normal((out, rank)), jnp.float32)
        flat[f"{name}.scale"] = jnp.float32(0.5)
    return unflatten(flat)


def in_slots(*adapters: Params) -> Params:
    """The adapters in slots 1, 2, ..., where `b` is [rank, out]; slot 0 holds noise, which nothing may use."""
    noise = jax.tree.map(lambda x: jnp.full_like(x, 7.0), adapters[0])
    stacked = flatten(jax.tree.map(lambda *x: jnp.stack(x), noise, *adapters))
    return unflatten({name: x.swapaxes(1, 2) if name.endswith(".b") else x for name, x in stacked.items()})


def merge_adapters(params: Params, adapters: Params) -> Params:
    """W + scale * b a, in float64 by numpy."""
    flat, lora = flatten(params), flatten(adapters)
    for name in {key.rsplit(".", 1)[0] for key in lora}:
        a, b, scale = (np.asarray(lora[f"{name}.{part}"], np.float64) for part in ("a", "b", "scale"))
        weight = np.asarray(flat[f"{name}.weight"], np.float64)
        flat[f"{name}.weight"] = jnp.asarray(weight + scale * b @ a, jnp.float32)
    return unflatten(flat)
