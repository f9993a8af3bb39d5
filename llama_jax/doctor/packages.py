"""What is installed, and whether it goes together."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping

from llama_jax.doctor.report import INTERNAL, Check
from llama_jax.errors import NoDevice

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
    "msgpack",
)
"""What this package imports."""
PLUGINS = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "jax-rocm7-plugin", "jax-rocm7-pjrt")
"""What jax needs for a GPU; each has to be of jaxlib's version."""


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
