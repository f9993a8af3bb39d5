"""Training: losses and gradients against plain formulas, steps against peft's; `eight_devices_training.py` on eight
simulated devices."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDENS, TINY, assert_gradient, on_eight_devices, random_params, random_tokens, tiny_config

from llama_jax.adapters import LoraConfig, attach, load_adapter, new_adapter
from llama_jax.checkpoint.build import load_source
from llama_jax.config import LayerSpec, LlamaConfig
from llama_jax.convert.opening import open_source
from llama_jax.errors import RequestError
from llama_jax.kernels.dispatch import using
from llama_jax.model import forward
from llama_jax.model.quantization import quantize_params
from llama_jax.model.remat import REMAT
from llama_jax.params import flatten
from llama_jax.plan.costs import matmul_params
from llama_jax.recipe import requested
from llama_jax.sharding import RuledMesh
from llama_jax.training import (
    Batch,
    Optimizer,
    full,
    gradients,
    initial_state,
    loss,
    low_rank,
    make_step,
    step_flops,
    targets,
)
from llama_jax.training.optimizers import OPTIMIZERS
from llama_jax.training.placement import COMPUTED, check_mesh

DATA = Path(__file__).parent / "data" / "training"
INTERPRETED = {"flash_attention": "pallas_interpret", "add_rms_norm": "pallas_interpret", "moe": "pallas_interpret"}


@pytest.mark.timeout(600)  # a process of its own
@pytest.mark.slow
def test_on_eight_devices() -> None:
    on_eight_devices("eight_devices_training.py")


def packed(config: LlamaConfig, rows: int = 2, length: int = 30) -> Batch:
    """Rows of a few texts, some tokens of which are not learned."""
    rng = np.random.default_rng(3)
    tokens = np.asarray(random_tokens(config, rows, length))
    labels = np.where(rng.random(tokens.shape) < 0.7, tokens, -100).astype(np.int32)
    return Batch(tokens, labels, np.sort(rng.integers(0, 3, tokens.shape), axis=1).astype(np.int32))


def plain_loss(params: Any, config: LlamaConfig, batch: Batch) -> jax.Array:
    """Each text in a row of its own, through `forward` and a softmax of all logits at once."""
    total = jnp.float32(0)
    for tokens, labels, segments in zip(batch.tokens, batch.labels, batch.segments, strict=True):
        for segment in np.unique(segments):
            text, wanted = tokens[segments == segment], labels[segments == segment][1:]
            logits, _ = forward(params, config, jnp.asarray(text[None]))
            at = np.flatnonzero(wanted != -100)
            total -= jnp.sum(jax.nn.log_softmax(logits[0], axis=-1)[at, wanted[at]])
    return total


def assert_close(found: Any, wanted: Any, rtol: float = 1e-5) -> None:
    """Every leaf within a share of its largest number."""
    found, wanted = flatten(found), flatten(wanted)
    assert found.keys() == wanted.keys()
    for name, y in wanted.items():
        np.testing.assert_allclose(found[name], y, rtol=0, atol=rtol * (np.abs(y).max() + 1e-3), err_msg=name)


# --- Loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["tied-mqa", *(pytest.param(n, marks=pytest.mark.slow) for n in TINY if n != "tied-mqa")]
)
def test_loss_and_gradient_are_those_of_each_text_alone(name: str) -> None:
    config = TINY[name]
    params, batch = random_params(config), packed(config)
    few = 7 * config.vocab_size * 2  # logits of seven tokens of each row at once
    found, gradient = jax.jit(jax.value_and_grad(lambda p: loss(p, config, batch, logits=few)[0]))(params)
    wanted, exact = jax.jit(jax.value_and_grad(lambda p: plain_loss(p, config, batch)))(params)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert_close(gradient, exact, rtol=3e-5)
    alone, count = jax.jit(lambda p: loss(p, config, batch, logits=few))(params)
    np.testing.assert_allclose(alone, wanted, rtol=1e-5)
    assert count == np.sum(targets(batch)[1])


def test_no_text_sees_another_and_none_predicts_the_next_ones_first_token() -> None:
    tokens = np.arange(12, dtype=np.int32)[None]
    batch = Batch(tokens, tokens, np.asarray([[0] * 5 + [1] * 4 + [2] * 3], np.int32))
    wanted, learned = targets(batch)
    assert learned[0].tolist() == [True] * 4 + [False] + [True] * 3 + [False] + [True] * 2 + [False]
    assert wanted[0][np.asarray(learned[0])].tolist() == [1, 2, 3, 4, 6, 7, 8, 10, 11]


def test_gradient_is_that_of_finite_differences() -> None:
    config = TINY["plain"]
    params, batch = random_params(config), packed(config)
    mean = jax.jit(lambda p: loss(p, config, batch)[0] / 30)
    assert_gradient(mean, params)


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_remat_changes_no_gradient(remat: str) -> None:
    config = TINY["plain"]
    params, batch = random_params(config), packed(config)

    def gradient(remat: str) -> Any:
        return jax.jit(jax.grad(lambda p: loss(p, config, batch, remat=remat)[0]))(params)

    assert_close(gradient(remat), gradient("none"), rtol=1e-6)


def test_remat_runs_attention_once_where_it_keeps_its_result() -> None:
    config = TINY["plain"]
    params, batch = random_params(config), packed(config)

    def calls(remat: str) -> int:
        with using(**INTERPRETED):
            made = jax.make_jaxpr(jax.grad(lambda p: loss(p, config, batch, remat=remat)[0]))(params)
        return sum(name == "flash_attention_forward" for name in kernels_in(made.jaxpr))

    def kernels_in(jaxpr: Any) -> Iterator[str]:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                yield equation.params["jaxpr"].debug_info.func_name
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from kernels_in(getattr(inner, "jaxpr", inner))

    assert [calls(remat) for remat in ("none", "products", "kernels", "full")] == [1, 1, 1, 2]


def test_remat_keeps_no_product_of_an_adapter_that_is_as_wide_as_the_layer() -> None:
    """Besides what a model without an adapter keeps, only the narrow product of each projection."""
    config, batch, rank = tiny_config(LayerSpec(mlp=96), LayerSpec(mlp=96), hidden_size=64), packed(TINY["plain"]), 2
    params = random_params(config)
    lora = LoraConfig(rank=rank, alpha=2 * rank, target_modules="all-linear")
    adapter = new_adapter(params, config, lora, jax.random.key(0))

    def kept(combine: Callable[[Any], tuple[Any, LlamaConfig]], trained: Any) -> int:
        """Numbers for each token."""
        backward = jax.eval_shape(
            lambda x: jax.vjp(lambda x: loss(*combine(x), batch, remat="products")[0], x)[1], trained
        )
        return sum(math.prod(x.shape[2:]) for x in jax.tree.leaves(backward) if x.shape[:2] == batch.tokens.shape)

    plain = kept(lambda params: (params, config), params)
    assert kept(lambda adapter: low_rank(config)(adapter, params), adapter) <= plain + 2 * 7 * rank


def test_unknown_remat_is_refused() -> None:
    with pytest.raises(RequestError, match="no remat policy is called 'dots'"):
        loss(random_params(TINY["plain"]), TINY["plain"], packed(TINY["plain"]), remat="dots")


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_gradients_through_the_kernels_are_those_of_the_references(name: str) -> None:
    config, remat = TINY[name], "kernels" if name in ("plain", "softmax-moe") else "none"
    params, batch = random_params(config), packed(config)

    def gradient(remat: str, **kernels: str) -> Any:
        with using(**kernels):
            return jax.jit(jax.value_and_grad(lambda p: loss(p, config, batch, remat=remat)[0]))(params)

    found, got = gradient(remat, **INTERPRETED)
    exact, wanted = gradient("none")
    np.testing.assert_allclose(found, exact, rtol=1e-5)
    assert_close(got, wanted, rtol=1e-4)


# --- Steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["train-llama", "train-dora-llama"])
def test_steps_are_those_of_peft(case: str) -> None:
    """Twenty steps of AdamW. In float64 peft's own run differs by 5e-6 in loss, 8e-5 in the norm and 6e-6 in weights;
    the last gradient of train-llama is eight times as long as those before, and rounding counts with it."""
    settings = json.loads((DATA / case / "train.json").read_text())
    with np.load(DATA / case / "expected.npz") as file:
        expected = dict(file)
    source = open_source(GOLDENS / settings["base"])
    params, config = load_source(source, dtype=jnp.dtype("float32")), source.config
    source.close()
    adapter = jax.tree.map(jnp.asarray, load_adapter(DATA / case / "init", config))
    transformation = Optimizer(
        learning_rate=settings["lr"],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["max_grad_norm"],
    ).transformation(settings["steps"])
    state = initial_state(adapter, transformation)
    step = make_step(low_rank(config), transformation, state, remat="products")
    found: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    for tokens, labels in zip(expected["input_ids"], expected["labels"], strict=True):
        state, metrics = step(state, params, Batch(tokens[None], labels[None]))
        for name, values in found.items():
            values.append(float(metrics[name]))
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=5e-6)
    np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=2e-4)
    final = flatten(load_adapter(DATA / case / "final", config).low_rank)
    assert flatten(state.trained.low_rank).keys() == final.keys()
    for name, x in flatten(state.trained.low_rank).items():
        np.testing.assert_allclose(x, final[name], rtol=0, atol=3e-5, err_msg=name)


def test_parts_of_a_batch_add_up_to_it() -> None:
    config = TINY["plain"]
    params, batch = random_params(config), packed(config, rows=4)
    whole = jax.jit(lambda p, b: gradients(full(config, jnp.float32), p, None, b))
    one = whole(params, jax.tree.map(lambda x: x[None], batch))
    four = whole(params, jax.tree.map(lambda x: x[:, None], batch))
    for name in ("loss", "tokens"):
        np.testing.assert_allclose(one[0][name], four[0][name], rtol=1e-6)
    assert_close(four[1], one[1], rtol=1e-5)


def test_adapters_of_quantised_weights_learn() -> None:
    """QLoRA: the gradient is that of the decoded model, and nothing of the base changes."""
    config = tiny_config(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8)
    params = random_params(config)
    held, quantised = quantize_params(params, config, requested("int8"))
    adapter = new_adapter(
        held, quantised, LoraConfig(rank=2, target_modules=("q_proj", "down_proj")), jax.random.key(0)
    )
    batch = jax.tree.map(lambda x: x[None], packed(quantised))
    found, gradient = jax.jit(lambda a, p: gradients(low_rank(quantised), a, p, batch))(adapter, held)
    changed = [name for name, x in flatten(gradient.low_rank).items() if np.abs(x).max() > 0]
    assert changed == [name for name in flatten(adapter.low_rank) if name.endswith(".b")]  # b is zero at first
    attached, its_config = attach(held, quantised, adapter)
    np.testing.assert_allclose(
        found["loss"] * found["tokens"], loss(attached, its_config, jax.tree.map(lambda x: x[0], batch))[0], rtol=1e-5
    )


def test_bfloat16_is_computed_with_and_float32_is_kept() -> None:
    config = TINY["plain"]
    batch = jax.tree.map(lambda x: x[None], packed(config))
    transformation = Optimizer(learning_rate=1e-4).transformation(10)  # less than bfloat16 can add to a weight of one
    state = initial_state(random_params(config), transformation)
    before = jax.device_get(state.trained)
    assert "bf16" in jax.jit(lambda p: gradients(full(config, jnp.bfloat16), p, None, batch)).lower(before).as_text()
    step = make_step(full(config, jnp.bfloat16), transformation, state)
    state, _ = step(state, None, batch)
    for name, x in flatten(state.trained).items():
        assert x.dtype == jnp.float32
        moved = np.abs(x - flatten(before)[name])
        if name != "embed.weight":  # rows that no token uses stay
            assert 5e-5 < np.median(moved) < 2e-4, name


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd"])
def test_optimisers_lower_the_loss(name: str) -> None:
    config = TINY["tied-mqa"]
    batch = jax.tree.map(lambda x: x[None], packed(config))
    rate = {"sgd": 0.3, "adafactor": 0.05}.get(name, 0.01)
    transformation = Optimizer(name, learning_rate=rate).transformation(8)
    state = initial_state(random_params(config), transformation)
    step = make_step(full(config, jnp.float32), transformation, state)
    losses = []
    for _ in range(8):
        state, metrics = step(state, None, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_matrices_decay_by_the_rate(name: str) -> None:
    transformation = Optimizer(name, learning_rate=0.1, warmup=4, weight_decay=0.5).transformation(8)
    trained = {"matrix": jnp.full((2, 3), 2.0), "norm": jnp.full(3, 2.0)}
    gradient = jax.tree.map(jnp.zeros_like, trained)
    updates, _ = transformation.update(gradient, transformation.init(trained), trained)
    np.testing.assert_allclose(updates["matrix"], -0.1 / 4 * 0.5 * 2, rtol=1e-6)
    np.testing.assert_array_equal(updates["norm"], 0)


def test_schedules() -> None:
    def rates(**settings: Any) -> list[float]:
        rate = Optimizer(learning_rate=1.0, warmup=2, **settings).rate(6)
        return [round(float(rate(step)), 4) for step in range(7)]

    assert rates() == [0.5, 1, 1, 1, 1, 1, 1]
    assert rates(schedule="linear", end=0.2) == [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert rates(schedule="cosine") == [0.5, 1, 1, 0.8536, 0.5, 0.1464, 0]


def test_rows_that_a_mesh_cannot_split_are_refused() -> None:
    mesh = RuledMesh({"data": 2, "fsdp": 4}, COMPUTED)
    check_mesh(TINY["plain"], mesh, 16)
    with pytest.raises(RequestError, match=r"12 rows .* over 8 devices"):
        check_mesh(TINY["plain"], mesh, 12)


def test_flops_count_what_is_trained() -> None:
    config = TINY["plain"]
    weights = matmul_params(config, 1)
    attention = 12 * sum(n * (n + 1) // 2 for n in (3, 5)) * config.num_heads * config.head_dim
    assert step_flops(config, [3, 5]) == 6 * weights * 8 + attention
    assert step_flops(config, [3, 5], trained=10) == 8 * (4 * weights + 6 * 10) + attention
