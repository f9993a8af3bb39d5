"""Checking of backends on the device itself: each case against the reference in float32."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.dispatch.cases import Arrays, Case
from llama_jax.kernels.dispatch.operation import REFERENCE, Operation
from llama_jax.targets import Target, current

LIMITS = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 1.5e-2}
"""The largest relative error of a row, by the dtype of the output: a few rounding steps of that dtype (bfloat16's is
2^-8). One key too many among 300 changes a row by 6e-2 on average; a wrong scale or head by more."""
GRADIENTS = 5.0
"""Gradients pass through more roundings: their errors count a fifth."""


@dataclass(frozen=True)
class Check:
    """One backend on one case.

    Attributes:
      error: the largest relative error of a row, a gradient's divided by GRADIENTS; None where nothing could be
        computed.
      limit: what is allowed.
      problem: what is wrong; "" if nothing.
      seconds: compiling and running, once.
    """

    operation: str
    backend: str
    case: str
    error: float | None
    limit: float
    problem: str
    seconds: float


def checkable(op: Operation, case: Case, target: Target, *, interpreted: bool = False) -> list[str]:
    """The backends besides the reference that say they can run a case on a target."""
    shapes = case.abstract()
    return [
        name
        for name, backend in sorted(op.all_backends().items())
        if name != REFERENCE
        and backend.interpreted <= interpreted
        and backend.unsupported(target, **shapes, **case.static) is None
    ]


def run_checks(
    operations: Mapping[str, Operation],
    *,
    quick: bool = False,
    starting: Callable[[str, str, str], str] = lambda *_: "",
) -> Iterator[Check]:
    """Checks every backend that supports the device, one result after the other.

    Args:
      operations: by name.
      quick: only the small cases, and no gradients; else everything, interpreted backends too where there is no GPU.
      starting: called with operation, backend and case before each; what it returns, if not "", is taken as the problem
        and the case is not run.
    """
    target = current()
    for op in operations.values():
        for case in op.cases():
            if quick and not case.quick:
                continue
            names = checkable(op, case, target, interpreted=not quick and target.vendor == "cpu")
            expected = None
            for name in names:
                if known := starting(op.name, name, case.name):
                    yield Check(op.name, name, case.name, None, 0.0, known, 0.0)
                    continue
                arrays = case.example()
                if expected is None:
                    expected = reference(op, case, arrays, gradients=not quick)
                yield check(op, name, case, arrays, expected, gradients=not quick)


def reference(op: Operation, case: Case, arrays: Arrays, *, gradients: bool) -> list[jax.Array]:
    """The reference's outputs, then its gradients, all computed in float32."""
    wide = {k: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for k, x in arrays.items()}
    return _evaluate(op.backends[REFERENCE].run, case, wide, gradients)


def check(
    op: Operation, name: str, case: Case, arrays: Arrays, expected: list[jax.Array], *, gradients: bool, **options: Any
) -> Check:
    """Runs one backend and compares; what it raises becomes the problem."""
    began = time.perf_counter()
    backend = op.all_backends()[name]
    try:

        def run(**arguments: Any) -> Any:
            return backend.run(**arguments, **options)

        values = _evaluate(run, case, arrays, gradients)
        errors = [row_error(*pair) for pair in zip(values, expected, strict=True)]
        outputs = len(errors) - (len(case.differentiate) if gradients else 0)
        error = _largest([*errors[:outputs], *(e / GRADIENTS for e in errors[outputs:])])
    except Exception as raised:  # a compiler's or driver's error is what is looked for
        problem = f"{type(raised).__name__}: {(str(raised).splitlines() or [''])[0][:200]}"
        return Check(op.name, name, case.name, None, 0.0, problem, time.perf_counter() - began)
    limit = LIMITS[jnp.dtype(values[0].dtype).name]
    problem = "" if error <= limit else f"a row is off by {error:.2g} of its length; {limit:g} is allowed"
    return Check(op.name, name, case.name, error, limit, problem, time.perf_counter() - began)


def _evaluate(run: Callable[..., Any], case: Case, arrays: Arrays, gradients: bool) -> list[jax.Array]:
    """Outputs with what is not meaningful set to zero, then the gradients that the case asks for."""

    def outputs(arrays: Arrays) -> list[jax.Array]:
        found = jax.tree.leaves(run(**arrays, **case.static))
        return [out if case.meaningful is None else jnp.where(case.meaningful(arrays), out, 0) for out in found]

    def loss(some: Arrays, others: Arrays) -> jax.Array:
        total = jnp.float32(0)
        for i, out in enumerate(outputs(others | some)):
            weights = jax.random.normal(jax.random.key(1 + i), out.shape, jnp.float32)
            total += jnp.sum(out.astype(jnp.float32) * weights)
        return total

    values = list(jax.jit(outputs)(arrays))
    if gradients and case.differentiate:
        some = {name: arrays[name] for name in case.differentiate}
        found = jax.jit(jax.grad(loss))(some, {k: x for k, x in arrays.items() if k not in some})
        values += [found[name] for name in case.differentiate]
    return jax.block_until_ready(values)


def worst_row_error(values: Any, expected: Any) -> float:
    """The largest `row_error` of an operation's outputs, an array or a tuple of them."""
    pairs = zip(jax.tree.leaves(values), jax.tree.leaves(expected), strict=True)
    return _largest([row_error(*pair) for pair in pairs])


def _largest(errors: list[float]) -> float:
    """The largest; a NaN, which is not within any limit and which max() would lose, if there is one."""
    return max(errors, key=lambda e: (e != e, e))


def row_error(value: jax.Array, expected: jax.Array) -> float:
    """The largest ‖row - expected row‖ / ‖expected row‖ over rows of the last axis.

    A row a tenth as long as the typical one, or shorter, counts as that long: its relative error means nothing. One
    wrong row among thousands shows, as it would not in the norm of the whole. NaN where `value` is not finite.
    """
    value, expected = value.astype(jnp.float32), expected.astype(jnp.float32)
    lengths = jnp.linalg.norm(expected, axis=-1)
    typical = jnp.sqrt(jnp.sum(lengths**2) / jnp.maximum(jnp.sum(lengths > 0), 1))
    errors = jnp.linalg.norm(value - expected, axis=-1) / jnp.maximum(lengths, 0.1 * typical + 1e-30)
    return float(jnp.max(errors))
