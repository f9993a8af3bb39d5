"""An implementation on the arrays of a case, in stages: traced in one thread, compiled in others, run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.kernels.dispatch.cases import Arrays, Case


@dataclass(frozen=True)
class Traced:
    """Programs that are traced but not compiled, with their arguments.

    The first gives the output. The last gives the output and its gradients, where those are wanted; it may be the only
    one.
    """

    programs: tuple[jax.stages.Lowered, ...]
    arguments: tuple[tuple[Any, ...], ...]
    gradients: bool

    def compile(self, pool: Executor) -> tuple[Future[jax.stages.Compiled], ...]:
        """Begins to compile all programs in a pool of threads: XLA lets go of Python's lock."""
        return tuple(pool.submit(program.compile) for program in self.programs)

    def run(self, compiled: Sequence[jax.stages.Compiled]) -> list[np.ndarray]:
        """The output, then the gradients."""
        results = [program(*arguments) for program, arguments in zip(compiled, self.arguments, strict=True)]
        if not self.gradients:
            return [jax.device_get(results[0])]
        out = results[0] if len(results) > 1 else results[0][0]
        values: list[np.ndarray] = jax.device_get([out, *results[-1][1]])
        return values


def trace(
    run: Callable[..., jax.Array], case: Case, arrays: Arrays, *, gradients: bool, jointly: bool = False
) -> Traced:
    """Traces an implementation.

    Args:
      gradients: those that the case asks for as well, of a sum of the output by fixed random weights.
      jointly: output and gradients by one program: less to compile. What computes the output on its own may be another
        kernel than what computes it for a gradient.
    """

    def output(arrays: Arrays) -> jax.Array:
        """With what is not meaningful set to zero."""
        out = run(**arrays, **case.static)
        return out if case.meaningful is None else jnp.where(case.meaningful(arrays), out, 0)

    def pulled(some: Arrays, others: Arrays, weights: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        out, pull = jax.vjp(lambda some: output(others | some), some)
        (found,) = pull(weights.astype(out.dtype))
        return out, [found[name] for name in case.differentiate]

    wanted = gradients and bool(case.differentiate)
    programs: list[jax.stages.Lowered] = []
    arguments: list[tuple[Any, ...]] = []
    if not (wanted and jointly):
        programs.append(jax.jit(output).lower(arrays))
        arguments.append((arrays,))
    if wanted:
        shape = programs[0].out_info.shape if programs else jax.eval_shape(output, arrays).shape
        weights = jnp.asarray(np.random.default_rng(1).standard_normal(shape, np.float32))
        some = {name: arrays[name] for name in case.differentiate}
        others = {name: x for name, x in arrays.items() if name not in some}
        programs.append(jax.jit(pulled).lower(some, others, weights))
        arguments.append((some, others, weights))
    return Traced(tuple(programs), tuple(arguments), wanted)


def threads() -> int:
    """As many as there are processors for this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
