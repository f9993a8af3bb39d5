"""Checks the two links before setuptools builds; everything else is in pyproject.toml."""

from pathlib import Path

for name in ("kernels", "convert"):
    init = Path(__file__).parent / "llama_jax" / name / "__init__.py"
    if not init.is_file():
        raise SystemExit(
            f"error: llama_jax/{name}/__init__.py is missing, so this source tree cannot be built.\n"
            f"llama_jax/{name} is a symbolic link to ../{name}. Git on Windows and some unpackers of zip files do not "
            "create links:\n"
            "clone with `git clone -c core.symlinks=true` on Linux, macOS or WSL, or install a wheel."
        )

from setuptools import setup  # noqa: E402  (the check must speak before anything else can fail)

setup()
