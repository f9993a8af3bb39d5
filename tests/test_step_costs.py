"""Costs of steps equal the plan's costs of decode steps and prompts, and add up however a prompt is cut."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType

from llama_jax.config import LlamaConfig, preset
from llama_jax.layout import local_heads, split_config
from llama_jax.plan.costs import prefill_flops, read_bytes, step_bytes, step_flops
from llama_jax.plan.step_costs import Load, Peak, StepCosts
from llama_jax.targets import find

PRESETS = ["llama-3.1-8b", "mistral-7b-v0.1", "mixtral-8x7b", "llama-4-scout"]
CONFIGS = {name: preset(name) for name in PRESETS}
MEASURES = {name: StepCosts(config, jnp.bfloat16) for name, config in CONFIGS.items()}


def stored(config: LlamaConfig, tokens: int) -> int:
    """Bytes of the keys and values of that many tokens."""
    return 2 * config.num_layers * tokens * config.num_kv_heads * config.head_dim * 2


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("rows", "length"), [(1, 7), (3, 5000), (64, 20_000)])
def test_a_decode_step(name: str, rows: int, length: int) -> None:
    config = CONFIGS[name]
    moved, flops = MEASURES[name].total([Load(1, [length] * rows, [])])
    assert moved == pytest.approx(step_bytes(config, 2, rows, length) + stored(config, rows), rel=1e-9)
    assert flops == pytest.approx(step_flops(config, rows, length), rel=1e-9)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("prompt", [1, 300, 9000])
def test_a_whole_prompt(name: str, prompt: int) -> None:
    config = CONFIGS[name]
    moved, flops = MEASURES[name].total([Load(1, [], [(0, prompt, True)])])
    assert moved == pytest.approx(read_bytes(config, 2, prompt) + stored(config, prompt), rel=1e-9)
    assert flops == pytest.approx(prefill_flops(config, 1, prompt), rel=1e-9)


@pytest.mark.parametrize("name", PRESETS)
@given(lengths=st.lists(st.integers(1, 9000), min_size=1, max_size=6), cut=st.integers(1, 8999))
def test_sums(name: str, lengths: list[int], cut: int) -> None:
    """Rows of any lengths one by one, several steps of one dispatch one by one, a prompt in two chunks."""
    costs, config = MEASURES[name], CONFIGS[name]
    rows = [length + 4 for length in lengths]
    each = [costs.total([Load(1, [row], [])]) for row in rows]
    moved, flops = costs.total([Load(1, rows, [])])
    weights = read_bytes(config, 2, len(rows)) - len(rows) * read_bytes(config, 2, 1)
    assert moved == pytest.approx(sum(one for one, _ in each) + weights, rel=1e-9)
    assert flops == pytest.approx(sum(one for _, one in each), rel=1e-9)

    one_by_one = [Load(1, [row - 2 + i for row in rows], []) for i in range(3)]
    assert costs.total([Load(3, rows, [])]) == pytest.approx(costs.total(one_by_one), rel=1e-9)

    cut, end = min(cut, max(rows) - 1), max(rows)
    whole, parts = (
        costs.total([Load(1, [], chunks)]) for chunks in ([(0, end, True)], [(0, cut, False), (cut, end - cut, True)])
    )
    assert parts[1] == pytest.approx(whole[1], rel=1e-9)
    assert parts[0] >= whole[0]  # the second chunk reads what the first one has stored


def test_a_device_of_a_mesh() -> None:
    mesh: Any = AbstractMesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    config = split_config(preset("llama-3.1-8b"), mesh)
    moved, flops = StepCosts(config, jnp.bfloat16, mesh).total([Load(1, [100] * 3, [])])
    written = 2 * config.num_layers * 3 * local_heads(config, mesh)[1] * config.head_dim * 2
    assert moved == pytest.approx(step_bytes(config, 2, 3, 100, mesh) + written, rel=1e-9)
    assert flops == pytest.approx(step_flops(config, 3, 100, mesh), rel=1e-9)


def test_peaks_are_known_or_not_told() -> None:
    h100 = Peak.of(find("h100"), "bfloat16")
    assert h100 is not None
    assert (h100.bytes_per_s, h100.source) == (find("h100").bandwidth, "data sheet")
    assert Peak.of(find("cpu"), "float32") is None
