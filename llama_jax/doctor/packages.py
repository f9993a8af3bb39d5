"""Checks which packages are installed, and whether they fit together."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping

from llama_jax.doctor.report import INTERNAL, Check
from llama_jax.errors import NoDevice
from llama_jax.targets import rocm

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorstore",
    "numpy",
    "ml_dtypes",
    "tokenizers",
    "sentencepiece",
    "jinja2",
    "llguidance",
    "safetensors",
    "gguf",
    "huggingface-hub",
    "click",
    "rich",
    "markdown-it-py",
    "prompt-toolkit",
    "platformdirs",
    "psutil",
    "xxhash",
    "msgpack",
    "starlette",
    "uvicorn",
    "h11",
    "msgspec",
    "prometheus-client",
    "httpx2",
)
"""Packages that this package imports."""
CUDA = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
PLUGINS = (*CUDA, *rocm.PACKAGES)
"""Packages that jax needs for a GPU."""


def installed_versions() -> dict[str, str | None]:
    """Version of every package that matters, None for one that is not installed."""
    return {name: _version(name) for name in ("llama-jax", *PACKAGES, *PLUGINS)}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages(versions: Mapping[str, str | None]) -> list[Check]:
    """Checks that everything this package imports is installed."""
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
    """Checks that jax, jaxlib and the GPU plugins match: they are built for one another.

    jax takes no jaxlib that is newer (`jax/_src/lib`), jaxlib a CUDA plugin of its very version, and a ROCm plugin of
    its release (`targets.rocm`).
    """
    jaxlib = versions.get("jaxlib")
    if jaxlib is None:
        return []
    plugins = {name: v for name in PLUGINS if (v := versions.get(name))}
    other = {
        name: v
        for name, v in plugins.items()
        if not (rocm.fits(v, jaxlib) if name in rocm.PACKAGES else _numbers(v) == _numbers(jaxlib))
    }
    if (jax := versions.get("jax")) and _numbers(jax) < _numbers(jaxlib):
        other = {"jax": jax, **other}
    if not other:
        return []
    names = ", ".join(f"{name} {version}" for name, version in other.items())
    # The plugins come out after jaxlib, so theirs is the version that exists of all.
    version = next(iter(plugins.values()), jaxlib)
    numbers = ".".join(map(str, _numbers(version)))
    wanted = [f"jax=={numbers}", f"jaxlib=={numbers}", *(f"{name}=={version}" for name in plugins)]
    fix = "pip install " + " ".join(wanted)
    return [Check("plugins", "problem", f"jaxlib is {jaxlib}, but {names}", fix, NoDevice.exit_code)]


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (0, 12, 0, 1) of "0.12.0.1", (0, 11, 0) of "0.11.0.post1"."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, leading[0].split("."))) if leading else ()
