"""The check of kernels at start-up: once a device, driver and version of the kernels; what fails is disabled by name.

Older ROCm plugins have compiled attention kernels to code that computes something else, without an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

import llama_jax
from llama_jax.errors import KernelError, StorageError
from llama_jax.folders import cache_dir
from llama_jax.kernels.checking.compare import Check, checkable, run_checks
from llama_jax.kernels.dispatch.extra import extra
from llama_jax.kernels.dispatch.fingerprint import source_hash, versions
from llama_jax.kernels.dispatch.operation import REFERENCE, Operation, disable
from llama_jax.kernels.registry import OPERATIONS, operation
from llama_jax.targets import current

SWITCH = "LLAMA_JAX_SELF_CHECK"
"""0 skips the check, and enables what an earlier one has disabled."""
KEPT = 32
"""Devices and versions whose results are kept."""

Notify = Callable[[str], None]


def results_path() -> Path:
    """The place where results are kept."""
    return cache_dir() / "kernels" / "numerics.json"


def self_check(notify: Notify | None = None) -> tuple[Check, ...]:
    """Checks the kernels that this device could be given, unless that has been done; disables those that fail.

    Args:
      notify: called with one line before a check, and with one for each kernel that is disabled.

    Returns:
      What was checked; () where an earlier result was taken or nothing could be chosen.

    Raises:
      KernelError: a kernel fails while several processes compute together: they could not agree on another one.
    """
    say = notify or (lambda line: print(line, file=sys.stderr, flush=True))
    if os.environ.get(SWITCH, "1") in ("", "0") or not _anything_to_check():
        return ()
    checks: tuple[Check, ...] = ()
    failures = stored_failures()
    if failures is None:
        say("Checking kernels on this device (once a device and version)")
        checks = tuple(run_checks(_operations(), quick=True))
        failures = failures_of(checks)
        uncertain = [check for check in checks if check.backend == REFERENCE]
        for check in uncertain:
            say(f"warning: kernels of {check.operation} were not compared, {check.case}: {check.problem}")
        if not uncertain:
            store(failures)
    apply(failures, say)
    return checks


def report_checks(crashed: Mapping[str, str], *, at_once: bool = True) -> None:
    """Checks everything and prints one JSON object a line, for a parent process that outlives a crash: {event: name}
    for what `run_checks` tells, {"check": result}, at last {"device": key}. Keeps what failed for later processes.

    Args:
      crashed, at_once: see `run_checks`.
    """

    def notify(event: str, name: str) -> None:
        print(json.dumps({event: name}), flush=True)

    checks = []
    for check in run_checks(_operations(), at_once=at_once, crashed=crashed, notify=notify):
        checks.append(check)
        print(json.dumps({"check": asdict(check)}), flush=True)
    if all(check.backend != REFERENCE for check in checks):
        store(failures_of(tuple(checks)))
    print(json.dumps({"device": device_key()}), flush=True)


def failures_of(checks: tuple[Check, ...]) -> dict[str, str]:
    """ "operation/backend" to its first problem. A reference that fails leaves nothing to choose in its place."""
    failed: dict[str, str] = {}
    for check in checks:
        if check.problem and check.backend != REFERENCE:
            failed.setdefault(f"{check.operation}/{check.backend}", f"{check.case}: {check.problem}")
    return failed


def apply(failures: Mapping[str, str], say: Notify) -> None:
    """Disables the backends that have failed."""
    for name, problem in sorted(failures.items()):
        op, _, backend = name.partition("/")
        if jax.process_count() > 1:
            raise KernelError(
                f"{backend!r} of {op!r} is wrong on this device ({problem})",
                hint=f"name another backend on every host: LLAMA_JAX_KERNELS={op}=reference",
            )
        disable(op, backend, f"it was wrong on this device ({problem})")
        say(f"warning: kernel {op}/{backend} is disabled: {problem}")


def stored_failures() -> dict[str, str] | None:
    """The result of an earlier check of this device and these versions; None if there was none."""
    return _stored().get(device_key())


def store(failures: Mapping[str, str]) -> None:
    """Keeps a result for later processes. A folder that cannot be written costs only the next check's time."""
    try:
        path = results_path()
        kept = {key: value for key, value in _stored().items() if key != device_key()}
        kept = dict(list(kept.items())[1 - KEPT :]) | {device_key(): dict(failures)}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        temporary.replace(path)
    except (OSError, StorageError):
        return


def _stored() -> dict[str, dict[str, str]]:
    """All kept results; none where the file is absent or not as we write it, so that the check runs again."""
    try:
        data = json.loads(results_path().read_text(encoding="utf-8"))
    except (OSError, StorageError, ValueError):
        return {}
    return {k: v for k, v in data.items() if isinstance(v, dict)} if isinstance(data, dict) else {}


def device_key() -> str:
    """The conditions of a result: the device, its driver, every version, and the kernels' source."""
    device = jax.devices()[0]
    facts: dict[str, Any] = {
        "device": device.device_kind,
        "driver": device.client.platform_version,
        "versions": versions() | {"llama-jax": llama_jax.__version__},
        "sources": {name: source_hash(name) for name in OPERATIONS},
        "plugins": extra().origins,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return f"{device.device_kind}, jax {jax.__version__}, {digest}"


def _operations() -> dict[str, Operation]:
    return {name: operation(name) for name in OPERATIONS}


def _anything_to_check() -> bool:
    target = current()
    return any(checkable(op, case, target) for op in _operations().values() for case in op.cases() if case.quick)
