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

# XLA need not look for the fastest of its own products: what is compared is numbers, and only once.
_COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0}


def compiled(program: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiled quickly rather than for speed."""
    return program.compile(compiler_options=_COMPILER_OPTIONS)


@dataclass(frozen=True)
class Traced:
    """Programs that are traced but not compiled, with their arguments.

    The first gives the outputs. The last gives the outputs and their gradients, where those are wanted; it may be the
    only one.
    """

    programs: tuple[jax.stages.Lowered, ...]
    arguments: tuple[tuple[Any, ...], ...]
    gradients: bool

    def compile(self, pool: Executor) -> tuple[Future[jax.stages.Compiled], ...]:
        """Begins to compile all programs in a pool of threads: XLA lets go of Python's lock."""
        return tuple(pool.submit(compiled, program) for program in self.programs)

    def run(self, compiled: Sequence[jax.stages.Compiled]) -> list[np.ndarray]:
        """The outputs, then the gradients."""
        results = [program(*arguments) for program, arguments in zip(compiled, self.arguments, strict=True)]
        if not self.gradients:
            return list(jax.device_get(results[0]))
        outputs = results[0] if len(results) > 1 else results[0][0]
        values: list[np.ndarray] = jax.device_get([*outputs, *results[-1][1]])
        return values


def trace(run: Callable[..., Any], case: Case, arrays: Arrays, *, gradients: bool, jointly: bool = False) -> Traced:
    """Traces an implementation.

    Args:
      gradients: those that the case asks for as well, of a sum of the outputs by fixed random weights.
      jointly: outputs and gradients by one program: less to compile. What computes the outputs on their own may be
        another kernel than what computes them for a gradient.
    """

    def outputs(arrays: Arrays) -> list[jax.Array]:
        """The outputs with meaningless values set to zero."""
        found = jax.tree.leaves(case.compared(run(**case.arguments(arrays))))
        return [out if case.meaningful is None else jnp.where(case.meaningful(arrays), out, 0) for out in found]

    def pulled(some: Arrays, others: Arrays, weights: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        found, pull = jax.vjp(lambda some: outputs(others | some), some)
        (by_name,) = pull([w.astype(out.dtype) for w, out in zip(weights, found, strict=True)])
        return found, [by_name[name] for name in case.differentiate]

    wanted = gradients and bool(case.differentiate)
    programs: list[jax.stages.Lowered] = []
    arguments: list[tuple[Any, ...]] = []
    if not (wanted and jointly):
        programs.append(jax.jit(outputs).lower(arrays))
        arguments.append((arrays,))
    if wanted:
        shapes = programs[0].out_info if programs else jax.eval_shape(outputs, arrays)
        rng = np.random.default_rng(1)
        weights = [jnp.asarray(rng.standard_normal(out.shape, np.float32)) for out in shapes]
        some = {name: arrays[name] for name in case.differentiate}
        others = {name: x for name, x in arrays.items() if name not in some}
        programs.append(jax.jit(pulled).lower(some, others, weights))
        arguments.append((some, others, weights))
    return Traced(tuple(programs), tuple(arguments), wanted)


def threads() -> int:
    """As many as there are processors for this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
