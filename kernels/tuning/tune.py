"""Measures the kernels on this device and writes the user's table, which then wins over the shipped one.

Measurements are kept in a journal line by line, so that an interrupted run resumes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.disk import storage_errors
from llama_jax.kernels.checking.compare import LIMITS, check, reference, worst_row_error
from llama_jax.kernels.dispatch.cases import Arrays, Case
from llama_jax.kernels.dispatch.fingerprint import source_hash, versions
from llama_jax.kernels.dispatch.operation import REFERENCE, Operation, disabled
from llama_jax.kernels.dispatch.tables import Rule
from llama_jax.kernels.dispatch.user_table import path_of
from llama_jax.kernels.tuning.timing import seconds_per_call
from llama_jax.targets import Target, current

BLOCKED = "blocked"
"""A second reference, for pages: the shipped table says where it is the faster one."""


@dataclass(frozen=True)
class Candidate:
    """One thing to measure: a backend with tiles (None: its own choice) on one case."""

    operation: Operation
    case: Case
    backend: str
    tiles: Any = None

    @property
    def tile_numbers(self) -> dict[str, int]:
        return {} if self.tiles is None else dataclasses.asdict(self.tiles)


@dataclass(frozen=True)
class Measurement:
    """The result of a candidate.

    Attributes:
      dtype, shape: as in the tables.
      seconds: of one call; None if it failed.
      problem: why; "" if it did not.
    """

    operation: str
    case: str
    dtype: str
    shape: str
    backend: str
    tiles: Mapping[str, int]
    seconds: float | None
    problem: str = ""


@dataclass(frozen=True)
class Tuning:
    """The outcome: all measurements of this device and these versions, and the table made of them.

    Attributes:
      table: where it was written.
      rules: by operation.
    """

    device: str
    table: Path
    measurements: tuple[Measurement, ...]
    rules: Mapping[str, tuple[Rule, ...]]


def candidates(
    operations: Sequence[Operation], target: Target, numbers: Mapping[str, Any] | None, most: int
) -> tuple[Candidate, ...]:
    """Lists what to measure: for each case the reference, and at most `most` tiles of each other backend that can
    run it. A case that only the reference can run is left out."""
    found: list[Candidate] = []
    for op in operations:
        for case in op.models(numbers):
            arguments = case.arguments()
            others = []
            for name, backend in sorted(op.all_backends().items()):
                if name in (REFERENCE, BLOCKED) or backend.interpreted or (op.name, name) in disabled():
                    continue
                if backend.unsupported(target, **arguments) is None:
                    tiles = list(itertools.islice(backend.candidates(target, **arguments), most)) or [None]
                    others += [Candidate(op, case, name, each) for each in tiles]
            if others:
                found += [Candidate(op, case, REFERENCE), *others]
    return tuple(found)


def tune(
    found: Sequence[Candidate],
    *,
    rounds: int = 10,
    progress: Callable[[int, int, Measurement], None] = lambda done, total, measurement: None,
    measure: Callable[..., float] = seconds_per_call,
) -> Tuning:
    """Measures what the journal does not hold yet, and writes the table after each case.

    Args:
      found: of `candidates`.
      rounds: number of rounds that medians are taken over.
      progress: called with the number of candidates done, of all, and the last measurement.
      measure: takes a function of arrays, arrays and `rounds`; seconds of one call.

    Raises:
      StorageError: the cache folder cannot be written.
    """
    target, device = current(), jax.devices()[0].device_kind
    table = path_of(target)
    journal = table.with_suffix(".measured.jsonl")
    with storage_errors(table):
        table.parent.mkdir(parents=True, exist_ok=True)
    known = dict(read_journal(journal, device))
    done = 0
    for _, group in itertools.groupby(found, key=lambda c: (c.operation.name, c.case.name)):
        session: _Session | None = None
        for candidate in group:
            key = _key(candidate)
            if key not in known:
                session = session or _Session(candidate.operation, candidate.case)
                known[key] = session.measure(candidate, partial(measure, rounds=rounds))
                entry = _made_with(candidate.operation.name, device) | {"key": key}
                entry["measurement"] = dataclasses.asdict(known[key])
                with storage_errors(journal), journal.open("a", encoding="utf-8") as file:
                    # The newline comes first: a torn line of a run that was killed spoils no other.
                    file.write("\n" + json.dumps(entry))
            done += 1
            progress(done, len(found), known[key])
        rules = best_rules(list(known.values()), device)
        with storage_errors(table):
            write_table(table, target, device, rules)
    return Tuning(device, table, tuple(known.values()), best_rules(list(known.values()), device))


class _Session:
    """One case's arrays and expected output, made when the first of its candidates is measured."""

    def __init__(self, op: Operation, case: Case):
        self._op, self._case = op, case
        self._dtype = jnp.dtype(next(iter(case.abstract().values())).dtype).name
        self._shape = op.shape(**case.arguments())
        self._arrays: Arrays = {}
        self._expected: Any = None

    def measure(self, candidate: Candidate, measure: Callable[..., float]) -> Measurement:
        seconds, problem = None, ""
        try:
            if not self._arrays:
                self._arrays = self._case.example()
            problem = self._wrong(candidate)
            if not problem:
                seconds = measure(_call(candidate), self._arrays)
        except Exception as error:  # a compiler's or driver's error, or no memory
            problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        return Measurement(
            self._op.name,
            self._case.name,
            self._dtype,
            self._shape,
            candidate.backend,
            candidate.tile_numbers,
            seconds,
            problem,
        )

    def _wrong(self, candidate: Candidate) -> str:
        """Errors in a candidate's numbers: against the reference's on this case, or, where the reference needs
        more memory than there is, on the small cases."""
        if candidate.backend == REFERENCE:
            self._expected = self._results(candidate)
            return ""
        if self._expected is None:
            return self._wrong_on_small_cases(candidate)
        out = self._results(candidate)
        error, limit = worst_row_error(out, self._expected), 2 * LIMITS[jax.tree.leaves(out)[0].dtype.name]
        return "" if error <= limit else f"a row is off by {error:.2g} of its length; {limit:g} is allowed"

    def _results(self, candidate: Candidate) -> Any:
        return self._case.compared(jax.block_until_ready(jax.jit(_call(candidate))(**self._arrays)))

    def _wrong_on_small_cases(self, candidate: Candidate) -> str:
        op, options = self._op, {} if candidate.tiles is None else {"tiles": candidate.tiles}
        for case in op.cases():
            arguments = case.arguments()
            if case.quick and op.all_backends()[candidate.backend].unsupported(current(), **arguments) is None:
                arrays = case.example()
                expected = reference(op, case, arrays, gradients=False)
                found = check(op, candidate.backend, case, arrays, expected, gradients=False, **options)
                if found.problem:
                    return f"{case.name}: {found.problem}"
        return ""


def _call(candidate: Candidate) -> Callable[..., Any]:
    run = candidate.operation.all_backends()[candidate.backend].run
    options = {} if candidate.tiles is None else {"tiles": candidate.tiles}
    return lambda **arrays: run(**candidate.case.arguments(arrays), **options)


def _key(candidate: Candidate) -> str:
    tiles = " ".join(f"{name}={number}" for name, number in candidate.tile_numbers.items())
    return f"{candidate.operation.name} | {candidate.case.name} | {candidate.backend} | {tiles}"


def _made_with(operation: str, device: str) -> dict[str, Any]:
    return {"device": device, "versions": versions(), "sources": source_hash(operation)}


def read_journal(path: Path, device: str) -> Iterator[tuple[str, Measurement]]:
    """The measurements of this device that these versions and kernels have made; other lines, and the torn last line of
    a run that was killed, are passed over."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            measurement = Measurement(**entry["measurement"])
            valid = {name: entry[name] for name in ("device", "versions", "sources")}
            if valid == _made_with(measurement.operation, device):
                yield entry["key"], measurement
        except (ValueError, KeyError, TypeError):
            continue


def best_rules(measurements: Sequence[Measurement], device: str) -> dict[str, tuple[Rule, ...]]:
    """For each operation, dtype and shape the fastest candidate that ran on all of its cases: that with the smallest
    geometric mean of the times."""
    rules: dict[str, tuple[Rule, ...]] = {}
    groups: dict[tuple[str, str, str], list[Measurement]] = {}
    for measurement in measurements:
        groups.setdefault((measurement.operation, measurement.dtype, measurement.shape), []).append(measurement)
    for (op, dtype, shape), group in sorted(groups.items()):
        cases = {m.case for m in group}
        times: dict[tuple[str, tuple[tuple[str, int], ...]], list[float]] = {}
        for m in group:
            if m.seconds is not None:
                times.setdefault((m.backend, tuple(sorted(m.tiles.items()))), []).append(m.seconds)
        means = {c: math.exp(sum(map(math.log, t)) / len(t)) for c, t in times.items() if len(t) == len(cases)}
        if not means:
            continue
        (backend, tiles), seconds = min(means.items(), key=lambda item: item[1])
        other = means.get((REFERENCE, ()))
        beside = f", the reference {other * 1e6:.1f} µs" if other and backend != REFERENCE else ""
        source = f"measured on {device}: {seconds * 1e6:.1f} µs{beside}"
        rules[op] = (*rules.get(op, ()), Rule(backend, source, True, dtype, shape, tiles))
    return rules


def write_table(path: Path, target: Target, device: str, rules: Mapping[str, Sequence[Rule]]) -> None:
    """Replaces the previous table atomically."""
    data = {
        "arch": target.arch,
        "device": device,
        "versions": versions(),
        "sources": {op: source_hash(op) for op in rules},
        "rules": {op: [rule.to_json() for rule in rules[op]] for op in rules},
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)
