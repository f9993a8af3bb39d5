"""Checking of backends on the device itself: each case against the reference in float32."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.kernels.checking.stages import Traced, compiled, threads, trace
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
    """One backend on one case; the reference only where it failed, so that nothing could be compared.

    Attributes:
      error: the largest relative error of a row, a gradient's divided by GRADIENTS; None where nothing could be
        computed.
      limit: what is allowed.
      problem: what is wrong; "" if nothing.
      seconds: tracing, waiting for what is compiled (perhaps beside others), and running, once.
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
    arguments = case.arguments()
    return [
        name
        for name, backend in sorted(op.all_backends().items())
        if name != REFERENCE and backend.interpreted <= interpreted and backend.unsupported(target, **arguments) is None
    ]


Event = Literal["prepare", "compiled", "start"]


def run_checks(
    operations: Mapping[str, Operation],
    *,
    quick: bool = False,
    at_once: bool = True,
    crashed: Mapping[str, str] = MappingProxyType({}),
    notify: Callable[[Event, str], None] = lambda event, name: None,
) -> Iterator[Check]:
    """Checks every backend that supports the device, one result after the other.

    Args:
      operations: by name.
      quick: only the small cases, and no gradients; else everything, interpreted backends too where there is no GPU.
      at_once: traces everything, compiles it in as many threads as there are processors, and only then runs one after
        the other; else one check is finished before the next is traced.
      crashed: "operation/backend/case" to what is known to be wrong, of those that are not to be tried.
      notify: called with each name before it is traced, when it is compiled, and before it runs. If not `at_once`, only
        with "start", before anything is done for it: whatever happens then is due to that one.
    """
    parts = list(_parts(operations, quick))
    with_gradients = not quick
    pool = ThreadPoolExecutor(threads(), thread_name_prefix="compile")
    try:
        begun: dict[str, _Begun | Exception] = {}
        if at_once:
            wanted = [part for part in parts if part.name not in crashed]
            for part in wanted:
                notify("prepare", part.name)
                begun[part.name] = _begin(part, pool, with_gradients)
            for name, work in begun.items():
                if isinstance(work, _Begun):
                    wait(work.compiling)
                notify("compiled", name)
        expected: list[np.ndarray] | None = None
        for part in parts:
            is_reference = part.backend == REFERENCE
            if not is_reference and expected is None:
                continue
            if known := crashed.get(part.name):
                expected = None if is_reference else expected
                yield part.failed(known)
                continue
            notify("start", part.name)
            began = time.perf_counter()
            work = begun.pop(part.name) if at_once else _begin(part, pool, with_gradients)
            if not is_reference:
                assert expected is not None
                yield _compared(part, partial(_values, work), expected, began, with_gradients)
                continue
            try:
                expected = _values(work)
            except Exception as error:
                expected = None
                yield part.failed(_message(error), time.perf_counter() - began)
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Part:
    """One backend, or the reference, on one case."""

    op: Operation
    backend: str
    case: Case
    arrays: Arrays

    @property
    def name(self) -> str:
        return f"{self.op.name}/{self.backend}/{self.case.name}"

    def failed(self, problem: str, seconds: float = 0.0) -> Check:
        return Check(self.op.name, self.backend, self.case.name, None, 0.0, problem, seconds)


@dataclass(frozen=True)
class _Begun:
    """Work that is traced and being compiled."""

    traced: Traced
    compiling: tuple[Future[jax.stages.Compiled], ...]


def _parts(operations: Mapping[str, Operation], quick: bool) -> Iterator[_Part]:
    """The reference of each case, followed by the backends compared with it."""
    target = current()
    for op in operations.values():
        for case in op.cases():
            if quick and not case.quick:
                continue
            names = checkable(op, case, target, interpreted=not quick and target.vendor == "cpu")
            arrays = case.example() if names else {}
            yield from (_Part(op, name, case, arrays) for name in ((REFERENCE, *names) if names else ()))


def _begin(part: _Part, pool: Executor, gradients: bool) -> _Begun | Exception:
    """Traces, and begins to compile; what tracing raised, which is for the one who asks for the values."""
    try:
        if part.backend == REFERENCE:
            traced = _trace_reference(part.op, part.case, part.arrays, gradients)
        else:
            run = part.op.all_backends()[part.backend].run
            traced = trace(run, part.case, part.arrays, gradients=gradients)
        return _Begun(traced, traced.compile(pool))
    except Exception as error:
        return error


def _values(work: _Begun | Exception) -> list[np.ndarray]:
    if isinstance(work, Exception):
        raise work
    return work.traced.run([each.result() for each in work.compiling])


def _trace_reference(op: Operation, case: Case, arrays: Arrays, gradients: bool) -> Traced:
    host = {name: np.asarray(x) for name, x in arrays.items()}
    wide = {
        name: jnp.asarray(x.astype(np.float32) if jnp.issubdtype(x.dtype, jnp.floating) and x.itemsize > 1 else x)
        for name, x in host.items()
    }
    return trace(op.backends[REFERENCE].run, case, wide, gradients=gradients, jointly=True)


def reference(op: Operation, case: Case, arrays: Arrays, *, gradients: bool) -> list[np.ndarray]:
    """The reference's outputs, then its gradients, all computed in float32."""
    return _compute(_trace_reference(op, case, arrays, gradients))


def check(
    op: Operation, name: str, case: Case, arrays: Arrays, expected: list[np.ndarray], *, gradients: bool, **options: Any
) -> Check:
    """Runs one backend and compares; an exception becomes the problem.

    Args:
      expected: what `reference` gives.
      options: further arguments of the backend.
    """
    run = partial(op.all_backends()[name].run, **options)

    def values() -> list[np.ndarray]:
        return _compute(trace(run, case, arrays, gradients=gradients))

    return _compared(_Part(op, name, case, arrays), values, expected, time.perf_counter(), gradients)


def _compute(traced: Traced) -> list[np.ndarray]:
    return traced.run([compiled(program) for program in traced.programs])


def _compared(
    part: _Part, compute: Callable[[], list[np.ndarray]], expected: list[np.ndarray], began: float, gradients: bool
) -> Check:
    try:
        values = compute()
        errors = [row_error(*pair) for pair in zip(values, expected, strict=True)]
    except Exception as raised:  # a compiler's or driver's error is what is looked for
        return part.failed(_message(raised), time.perf_counter() - began)
    outputs = len(errors) - (len(part.case.differentiate) if gradients else 0)
    error = _largest([*errors[:outputs], *(e / GRADIENTS for e in errors[outputs:])])
    limit = LIMITS[jnp.dtype(values[0].dtype).name]
    problem = "" if error <= limit else f"a row is off by {error:.2g} of its length; {limit:g} is allowed"
    seconds = time.perf_counter() - began
    return Check(part.op.name, part.backend, part.case.name, error, limit, problem, seconds)


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def worst_row_error(values: Any, expected: Any) -> float:
    """The largest `row_error` of an operation's outputs, an array or a tuple of them."""
    pairs = zip(jax.tree.leaves(values), jax.tree.leaves(expected), strict=True)
    return _largest([row_error(*pair) for pair in pairs])


def _largest(errors: list[float]) -> float:
    """The largest; a NaN, which is not within any limit and which max() would lose, if there is one."""
    return max(errors, key=lambda e: (e != e, e))


def row_error(value: jax.Array | np.ndarray, expected: jax.Array | np.ndarray) -> float:
    """The largest ‖row - expected row‖ / ‖expected row‖ over rows of the last axis.

    A row a tenth as long as the typical one, or shorter, counts as that long: its relative error means nothing. One
    wrong row among thousands shows, as it would not in the norm of the whole. NaN where `value` is not finite.
    Arrays of numpy are compared by numpy: on a device each step would be a program to compile.
    """
    xp: Any = np if isinstance(value, np.ndarray) else jnp
    with np.errstate(all="ignore"):
        value, expected = value.astype(jnp.float32), expected.astype(jnp.float32)
        lengths = xp.linalg.norm(expected, axis=-1)
        typical = xp.sqrt(xp.sum(lengths**2) / xp.maximum(xp.sum(lengths > 0), 1))
        errors = xp.linalg.norm(value - expected, axis=-1) / xp.maximum(lengths, 0.1 * typical + 1e-30)
        return float(xp.max(errors))
