"""One step of training, as a pure function of state and batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from llama_jax.adapters import Adapter, attach
from llama_jax.config import LlamaConfig
from llama_jax.params import Params
from llama_jax.sharding import DeviceMesh, on
from llama_jax.training.batch import Batch, targets
from llama_jax.training.loss import LOGITS, loss

type Combine = Callable[[Any, Any], tuple[Params, LlamaConfig]]
"""From trained and frozen leaves to the parameters that they make up, and their config."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """The state that a step changes.

    Attributes:
      step: int32, the number of steps that have been made.
      trained: a tree of float32 arrays.
      optimizer: the state of the optimiser, as optax has it.
    """

    step: Any
    trained: Any
    optimizer: Any


def full(config: LlamaConfig, dtype: DTypeLike) -> Combine:
    """Trains all parameters, and computes with them in `dtype`; nothing is frozen."""

    def combine(trained: Params, frozen: None) -> tuple[Params, LlamaConfig]:
        return jax.tree.map(lambda x: x.astype(dtype), trained), config

    return combine


def low_rank(config: LlamaConfig) -> Combine:
    """Trains an `Adapter` of frozen parameters, which may be quantised, and computes in their dtype."""

    def combine(trained: Adapter, frozen: Params) -> tuple[Params, LlamaConfig]:
        return attach(frozen, config, trained)

    return combine


def initial_state(
    trained: Any, transformation: optax.GradientTransformation, *, mesh: DeviceMesh | None = None
) -> State:
    """The state before the first step; the optimiser's arrays are placed as those that they belong to.

    What is trained becomes a part of the state, and steps donate that: use the state's from here on.
    """
    shapes = jax.eval_shape(transformation.init, trained)
    if mesh is None:
        return State(jnp.int32(0), trained, jax.jit(transformation.init)(trained))
    whole = jax.sharding.NamedSharding(_device_mesh(trained), jax.sharding.PartitionSpec())
    placed = optax.tree.map_params(
        transformation,
        lambda moment, x: x.sharding if moment.shape == x.shape else whole,
        shapes,
        trained,
        transform_non_params=lambda _: whole,
    )
    return State(
        jax.device_put(jnp.int32(0), whole), trained, jax.jit(transformation.init, out_shardings=placed)(trained)
    )


def _device_mesh(trained: Any) -> jax.sharding.Mesh:
    return jax.tree.leaves(trained)[0].sharding.mesh


def gradients(
    combine: Combine,
    trained: Any,
    frozen: Any,
    batch: Batch,
    *,
    remat: str = "none",
    logits: int = LOGITS,
    placed: Any = None,
) -> tuple[jax.Array, jax.Array, Any]:
    """The loss of a batch and its gradient.

    Args:
      batch: of arrays [parts, batch, len]: the gradients of the parts are added up in float32, one after the other. The
        loss is the mean over the learned tokens of all of them, so that parts are no different from one large batch.
      remat, logits: see `loss`.
      placed: the sharding of each array of the gradient; None leaves it to the compiler.

    Returns:
      The loss, the number of learned tokens, and the gradient in float32.
    """
    count = jnp.sum(jax.vmap(targets)(batch)[1], dtype=jnp.float32)
    scale = 1 / jnp.maximum(count, 1)

    def part_loss(trained: Any, part: Batch) -> jax.Array:
        params, config = combine(trained, frozen)
        return loss(params, config, part, remat=remat, logits=logits)[0] * scale

    def of_part(part: Batch) -> tuple[jax.Array, Any]:
        total, gradient = jax.value_and_grad(part_loss)(trained, part)
        return total, gradient if placed is None else jax.lax.with_sharding_constraint(gradient, placed)

    def add(carry: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, of_part(part)), None

    if len(batch.tokens) == 1:
        total, gradient = of_part(jax.tree.map(lambda x: x[0], batch))
    else:
        zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), trained))
        (total, gradient), _ = jax.lax.scan(add, zeros, batch)
    return total, count, gradient


def make_step(
    combine: Combine,
    transformation: optax.GradientTransformation,
    state: State,
    *,
    mesh: DeviceMesh | None = None,
    remat: str = "none",
    logits: int = LOGITS,
) -> Callable[[State, Any, Batch], tuple[State, dict[str, jax.Array]]]:
    """A compiled step: state, frozen parameters and a batch [parts, batch, len] to the next state and measurements.

    The measurements are float32 scalars: "loss", "tokens" (those that are learned) and "grad_norm" (before clipping).
    The state that goes in is donated.

    Args:
      state: of the shapes and placement that the step is for.
      mesh: with the rules of `training_mesh`.
    """

    def step(state: State, frozen: Any, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        where = None if placed is None else placed.trained
        total, count, gradient = gradients(
            combine, state.trained, frozen, batch, remat=remat, logits=logits, placed=where
        )
        updates, optimizer = transformation.update(gradient, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        found = {"loss": total, "tokens": count, "grad_norm": optax.tree.norm(gradient)}
        return State(state.step + 1, trained, optimizer), found

    placed = None if mesh is None else jax.tree.map(lambda x: x.sharding, state)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=None if placed is None else (placed, None))

    def run(state: State, frozen: Any, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        with on(mesh):
            return compiled(state, frozen, batch)

    return run


def make_evaluation(
    combine: Combine, *, mesh: DeviceMesh | None = None, logits: int = LOGITS
) -> Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]:
    """Compiles the `loss` of a batch [parts, batch, len]: what is trained, what is frozen and the batch to the sum and
    the number of learned tokens."""

    @jax.jit
    def compiled(trained: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        params, config = combine(trained, frozen)
        found = jax.lax.map(lambda part: loss(params, config, part, logits=logits), batch)
        return jnp.sum(found[0]), jnp.sum(found[1])

    def run(trained: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        with on(mesh):
            return compiled(trained, frozen, batch)

    return run
