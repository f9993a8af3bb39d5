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
from llama_jax.training.batch import Batch
from llama_jax.training.loss import CROSS_ENTROPY, LOGITS, Objective, entropies

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
    objective: Objective = CROSS_ENTROPY,
    remat: str = "none",
    logits: int = LOGITS,
    placed: Any = None,
) -> tuple[dict[str, jax.Array], Any]:
    """The loss of a batch and its gradient.

    Args:
      batch: of arrays [parts, batch, len]: the gradients of the parts are added up in float32, one after the other. The
        loss is the mean over all of them, so that parts are no different from one large batch.
      objective: the loss, by default the cross entropy of learned tokens.
      remat, logits: see `loss`.
      placed: the sharding of each array of the gradient; None leaves it to the compiler.

    Returns:
      Float32 scalars, "loss", "tokens" (those that are learned) and the means that the objective reports; and the
      gradient in float32.
    """
    scale = 1 / jnp.maximum(jnp.sum(jax.vmap(objective.count)(batch)), 1)

    def part_loss(trained: Any, part: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        params, config = combine(trained, frozen)
        total, more = objective(params, config, part, remat=remat, logits=logits)
        return total * scale, jax.tree.map(lambda x: x * scale, more)

    def of_part(part: Batch) -> tuple[dict[str, jax.Array], Any]:
        (total, more), gradient = jax.value_and_grad(part_loss, has_aux=True)(trained, part)
        found = {"loss": total, "tokens": CROSS_ENTROPY.count(part), **more}
        return found, gradient if placed is None else jax.lax.with_sharding_constraint(gradient, placed)

    def add(carry: Any, part: Batch) -> tuple[Any, dict[str, jax.Array]]:
        found, gradient = of_part(part)
        return jax.tree.map(jnp.add, carry, gradient), found

    if len(batch.tokens) == 1:
        return of_part(jax.tree.map(lambda x: x[0], batch))
    gradient, found = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trained), batch)
    return jax.tree.map(jnp.sum, found), gradient


def make_step(
    combine: Combine,
    transformation: optax.GradientTransformation,
    state: State,
    *,
    objective: Objective = CROSS_ENTROPY,
    mesh: DeviceMesh | None = None,
    remat: str = "none",
    logits: int = LOGITS,
) -> Callable[[State, Any, Batch], tuple[State, dict[str, jax.Array]]]:
    """A compiled step: state, frozen parameters and a batch [parts, batch, len] to the next state and measurements.

    The measurements are those of `gradients`, and "grad_norm" (before clipping). The state that goes in is donated.

    Args:
      state: of the shapes and placement that the step is for.
      mesh: with the rules of `training_mesh`.
    """

    def step(state: State, frozen: Any, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        where = None if placed is None else placed.trained
        found, gradient = gradients(
            combine, state.trained, frozen, batch, objective=objective, remat=remat, logits=logits, placed=where
        )
        updates, optimizer = transformation.update(gradient, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        return State(state.step + 1, trained, optimizer), found | {"grad_norm": optax.tree.norm(gradient)}

    placed = None if mesh is None else jax.tree.map(lambda x: x.sharding, state)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=None if placed is None else (placed, None))

    def run(state: State, frozen: Any, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        with on(mesh):
            return compiled(state, frozen, batch)

    return run


def make_evaluation(
    combine: Combine, *, objective: Objective = CROSS_ENTROPY, mesh: DeviceMesh | None = None, logits: int = LOGITS
) -> Callable[[Any, Any, Batch], dict[str, jax.Array]]:
    """Compiles a loss without its gradient: what is trained, what is frozen and a batch [parts, batch, len] to sums:
    "loss", what the objective reports, and "count", which makes means of them."""

    def of_part(params: Params, config: LlamaConfig, part: Batch) -> dict[str, jax.Array]:
        total, more = objective(params, config, part, remat="none", logits=logits)
        return {"loss": total, **more, "count": objective.count(part)}

    run = _compiled(combine, mesh, of_part)
    return lambda *args: jax.tree.map(jnp.sum, run(*args))


def make_entropies(
    combine: Combine, *, mesh: DeviceMesh | None = None, logits: int = LOGITS
) -> Callable[[Any, Any, Batch], jax.Array]:
    """Compiles `entropies`: what is trained, what is frozen and a batch [parts, batch, len] to as many numbers."""
    return _compiled(combine, mesh, lambda params, config, part: entropies(params, config, part, logits=logits))


def _compiled(
    combine: Combine, mesh: DeviceMesh | None, of_part: Callable[[Params, LlamaConfig, Batch], Any]
) -> Callable[[Any, Any, Batch], Any]:
    """Compiles a function of parameters and a part for all parts of a batch."""

    @jax.jit
    def compiled(trained: Any, frozen: Any, batch: Batch) -> Any:
        params, config = combine(trained, frozen)
        return jax.lax.map(lambda part: of_part(params, config, part), batch)

    def run(trained: Any, frozen: Any, batch: Batch) -> Any:
        with on(mesh):
            return compiled(trained, frozen, batch)

    return run
