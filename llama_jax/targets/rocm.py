"""jax's plugins for AMD GPUs: the packages for each generation of ROCm, and the jax that they go with.

This is the single source of truth. The extras of pyproject.toml, compilation without hardware, `llama-jax doctor` and
docs/targets.md follow it, and tests check that they do. Nothing here loads a plugin.

A plugin matches the jaxlib of its release, the first three numbers of a version; further numbers are fixes of
either side. jax itself requires `jax-rocm7-plugin==0.11.2.*` (its extra `rocm7-local`), and at run time jaxlib does not
compare versions of ROCm plugins (jaxlib/plugin_support.py), while it compares those of CUDA's to the last number.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass

JAX = "0.11.2"
"""The release of jax that the extras pin, and uv.lock holds."""

DOCS = "https://rocm.docs.amd.com"


@dataclass(frozen=True)
class Plugin:
    """The plugin for one generation of ROCm.

    Attributes:
      generation: ROCm's major version, whose libraries the plugin is linked against.
      built_with: release of jax to the ROCm that the plugin for it was built with, as the packages say.
    """

    generation: int
    built_with: Mapping[str, str]

    @property
    def extra(self) -> str:
        """Of this package."""
        return f"rocm{self.generation}"

    @property
    def pjrt(self) -> str:
        """The package with XLA's runtime and compiler; enough to compile without a GPU."""
        return f"jax-rocm{self.generation}-pjrt"

    @property
    def plugin(self) -> str:
        """The package with jax's own kernels."""
        return f"jax-rocm{self.generation}-plugin"

    @property
    def module(self) -> str:
        """The module that `pjrt` installs."""
        return f"jax_plugins.xla_rocm{self.generation}"

    def compiler(self, jaxlib: str) -> tuple[str, ...]:
        """Requirements, for pip, to compile without a GPU: the compiler for this jaxlib, or where there is none, also
        the jax that is tested most."""
        if release(jaxlib) in self.built_with:
            return (f"{self.pjrt}=={release(jaxlib)}",)
        return tuple(wanted for wanted in self.requirements() if not wanted.startswith(self.plugin))

    def requirements(self, release: str = JAX, jax: str | None = None) -> tuple[str, ...]:
        """Everything that jax on an AMD GPU takes, for pip; `jax` names a repaired jax of this release."""
        jax = jax or release
        return f"jax=={jax}", f"jaxlib=={jax}", f"{self.plugin}=={release}", f"{self.pjrt}=={release}"


PLUGINS = (
    Plugin(7, {"0.11.2": "7.14.0", "0.12.0": "7.14.0"}),
    Plugin(10, {"0.11.2": "10.0.0", "0.12.0": "10.1.0"}),
)
"""By generation, the newest last. `.ci/run` compiles with each and executes the result on an emulated GPU."""

NEWEST = PLUGINS[-1]
"""The plugin that the extras `rocm` and `rocm-aot` install."""

PACKAGES = tuple(package for plugin in PLUGINS for package in (plugin.plugin, plugin.pjrt))

LIBRARY = "xla_rocm_plugin.so"
"""The shared library in each plugin's module."""


def of_generation(generation: int) -> Plugin | None:
    """The plugin for a major version of ROCm; None if there is none in the table."""
    return next((plugin for plugin in PLUGINS if plugin.generation == generation), None)


def installed() -> list[tuple[Plugin, str]]:
    """Plugins that can compile here, with the versions of their packages, the newest generation first."""
    found = []
    for plugin in reversed(PLUGINS):
        try:
            found.append((plugin, importlib.metadata.version(plugin.pjrt)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def release(version: str) -> str:
    """The first three numbers of a version: 0.12.0 of "0.12.0.1" and of "0.12.0.post1"."""
    return ".".join(re.findall(r"\d+", version)[:3])


def fits(plugin: str, jaxlib: str) -> bool:
    """Returns whether a plugin of this version goes with a jaxlib of that one."""
    return release(plugin) == release(jaxlib)
