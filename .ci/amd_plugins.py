"""Prints what the tests do not compile with already: a line for each release of jax, with the generations of ROCm whose
plugins go with it, as "0.12.0 7 10"."""

from __future__ import annotations

from llama_jax.targets.rocm import JAX, NEWEST, PLUGINS


def pairs() -> dict[str, list[int]]:
    """Release of jax to generations; without the plugin of the dependency group `amd`, which all tests run with."""
    releases = dict.fromkeys(release for plugin in PLUGINS for release in plugin.built_with)
    return {
        release: [p.generation for p in PLUGINS if release in p.built_with and (release, p) != (JAX, NEWEST)]
        for release in releases
    }


if __name__ == "__main__":
    for release, generations in pairs().items():
        print(release, *generations)
