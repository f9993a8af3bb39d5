"""Silences one message of jax: that AMD's plugin is installed on a machine without an AMD GPU.

The plugin is installed there on purpose: it is the compiler (`llama_jax.targets.compile_for`). Its `initialize` raises
a ValueError where it finds no GPU, and jax logs that with a traceback at start-up. It affects neither CPU nor NVIDIA
GPUs, and with an AMD GPU nothing is raised.
"""

from __future__ import annotations

import logging

_JAX_LOGGER = "jax._src.xla_bridge"
_NO_GPU = "No AMD GPUs were found, skipping ROCm plugin initialization"


def _is_news(record: logging.LogRecord) -> bool:
    """False for that one record: a plugin's error that says this sentence."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, ValueError) and str(error) == _NO_GPU)


def silence_missing_amd_gpu() -> None:
    """Takes effect for a jax that has not started its backends yet; neither imports nor configures jax."""
    logging.getLogger(_JAX_LOGGER).addFilter(_is_news)
