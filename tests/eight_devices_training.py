"""Training on eight simulated devices; `test_training.py` runs this in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config
from tiny_chat_model import write_chat_model

from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError
from llama_jax.layout import param_sharding
from llama_jax.params import flatten, init_params, param_specs, unflatten
from llama_jax.training import (
    Batch,
    Dpo,
    Objective,
    Optimizer,
    full,
    initial_state,
    make_step,
    settings_from,
    train,
    training_mesh,
)
from llama_jax.training.loss import CROSS_ENTROPY
from llama_jax.training.placement import kept

STEPS = 4
OPTIMIZER = Optimizer(learning_rate=1e-2, weight_decay=0.01)


def config_of(**changes: Any) -> LlamaConfig:
    return tiny_config(num_heads=8, num_kv_heads=4, vocab_size=64, **changes)


def losses(config: LlamaConfig, axes: str | None, parts: int = 1, objective: Objective = CROSS_ENTROPY) -> list[float]:
    params = init_params(config, jax.random.key(0), jnp.float32)
    mesh = None if axes is None else training_mesh(axes)
    if mesh is not None:
        place = param_sharding(config, kept(mesh))
        params = unflatten({s.name: jax.device_put(flatten(params)[s.name], place(s)) for s in param_specs(config)})
    transformation = OPTIMIZER.transformation(STEPS)
    state = initial_state(params, transformation, mesh=mesh)
    step = make_step(full(config, jnp.float32), transformation, state, objective=objective, mesh=mesh, remat="products")
    found = []
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = rng.integers(0, config.vocab_size, (parts, 8 // parts, 32)).astype(np.int32)
        labels = np.where(rng.random(tokens.shape) < 0.7, tokens, -100).astype(np.int32)
        segments = np.sort(rng.integers(0, 4, tokens.shape), axis=-1).astype(np.int32)
        reference = rng.uniform(3, 6, tokens.shape).astype(np.float32)
        state, metrics = step(state, None, Batch(tokens, labels, segments, reference))
        found += [float(metrics["loss"]), float(metrics["grad_norm"])]
    if mesh is not None and mesh.shape.get("fsdp", 1) > 1:
        leaf = state.optimizer[1][0].mu["layers"]["0"]["attn"]["q_proj"]["weight"]
        assert leaf.addressable_shards[0].data.size * 8 // mesh.shape.get("data", 1) == leaf.size
    return found


def test_meshes_have_the_losses_of_one_device() -> None:
    config = config_of()
    alone = losses(config, None)
    for axes in ("fsdp=8", "data=8", "data=2,tensor=4", "data=2,fsdp=2,tensor=2"):
        np.testing.assert_allclose(losses(config, axes), alone, rtol=1e-5, err_msg=axes)


def test_preferences_on_a_mesh() -> None:
    alone = losses(config_of(), None, objective=Dpo())
    np.testing.assert_allclose(losses(config_of(), "data=2,fsdp=2,tensor=2", objective=Dpo()), alone, rtol=1e-5)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_whole_runs_on_meshes(method: str, tmp_path: Path) -> None:
    """From the same files, to files that every mesh and device loads, with checkpoints that another mesh resumes."""
    write_chat_model(tmp_path / "hf", layers=2)
    texts = [" ".join(["the cat sat on a mat"] * n) for n in (1, 2, 3, 4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 4))

    def losses(mesh: str | None, output: str, stop_after: int = 99) -> list[float]:
        values = {
            "model": str(tmp_path / "hf"),
            "output": str(tmp_path / output),
            "method": method,
            "steps": 4,
            "data": {"files": [str(tmp_path / "train.jsonl")]},
            "rows": {"length": 32, "rows": 16, "parts": 2},
            "optimizer": {"learning_rate": 0.01},
            "compute": {} if mesh is None else {"mesh": mesh},
        }
        told: list[float] = []
        train(settings_from(values), told=lambda m: told.append(m.loss), stop=lambda: len(told) >= stop_after)
        return told

    alone = losses(None, "alone")
    for mesh in ("fsdp=8", "fsdp=4,tensor=2"):
        np.testing.assert_allclose(losses(mesh, mesh), alone, rtol=1e-5, err_msg=mesh)
    first = losses("fsdp=8", "moved", stop_after=1)
    np.testing.assert_allclose(first + losses("data=4,tensor=2", "moved"), alone, rtol=1e-5)
    with pytest.raises(RequestError, match="4 devices of the axis tensor for 2 key/value heads"):
        losses("tensor=4", "refused")
