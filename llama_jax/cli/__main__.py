"""`python -m llama_jax.cli`: the command line without an installed script."""

from __future__ import annotations

from llama_jax.cli import main

main()
