"""Queries jax for its devices, in a child process with a deadline: a driver that hangs cannot hang the caller."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llama_jax.doctor.child import run_child

PROBE_DEADLINE_S = 90.0

_ANSWERS = ("probe", "kernels")
# Runs in the child: lists the devices and computes something small on the first one.
_PROBE = """
import json, jax, jax.numpy as jnp
devices = jax.devices()
total = float(jnp.ones((64, 64)).sum())
assert total == 4096.0, f"the sum of 4096 ones came out as {total}"
def memory(device):
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except Exception:
        return None
print("probe:" + json.dumps({
    "backend": jax.default_backend(),
    "platform_version": devices[0].client.platform_version,
    "devices": [{"name": str(d), "kind": d.device_kind, "memory": memory(d)} for d in devices],
}), flush=True)
# What this package would run there comes second: if that fails, the devices are known all the same.
try:
    from llama_jax.errors import LlamaJaxError
    from llama_jax.decode.graphs import graph_options
    from llama_jax.kernels import choices
    from llama_jax.kernels.integer_matmul import library
    try:
        graphs = [graph_options(several=several) for several in (False, True)[:len(devices)]]
        native = library.status() if jax.default_backend() == "cpu" else None
        made = [choice.to_json() for choice in choices()]
        print("kernels:" + json.dumps({"choices": made, "graphs": graphs, "native": native}))
    except LlamaJaxError as error:
        print("kernels:" + json.dumps({"error": error.message, "hint": error.hint}))
except ImportError as error:
    print("kernels:" + json.dumps({"error": str(error), "hint": "install the missing package"}))
"""


@dataclass(frozen=True)
class Probe:
    """The answer of jax: either `result` or the reason why there is none; `kernels` has "choices", "graphs" and, on a
    CPU, "native", or "error"."""

    result: dict[str, Any] | None = None
    error: str = ""
    said: str = ""
    kernels: dict[str, Any] = field(default_factory=dict)


def probe_jax(environ: Mapping[str, str], *, deadline_s: float = PROBE_DEADLINE_S, code: str = _PROBE) -> Probe:
    """Asks jax for its devices in a child process, which is killed at the deadline."""
    # Only as much of the GPU's memory as it needs: others may be computing there.
    environ = {"TF_CPP_MIN_LOG_LEVEL": "1", **environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = run_child([sys.executable, "-c", code], environ, deadline_s=deadline_s)
    if done is None:
        return Probe(error=f"jax did not name its devices within {deadline_s:g} s")
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = [line.partition(":") for line in done.stdout.splitlines()]
    answers = {name: json.loads(rest) for name, _, rest in said if name in _ANSWERS}
    if "probe" in answers:
        return Probe(answers["probe"], said="\n".join(lines), kernels=answers.get("kernels", {}))
    reason = lines[-1][:500] if lines else "no message"
    return Probe(error=f"jax failed (exit status {done.returncode}): {reason}", said="\n".join(lines))
