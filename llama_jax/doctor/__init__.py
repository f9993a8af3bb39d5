"""Reports what this machine and this installation can do, what is missing, and the command that fixes it.

One module per subject. JAX runs in a child process with a deadline, so that a driver that hangs cannot hang the
caller; this package imports neither jax nor numpy.
"""

from __future__ import annotations

from llama_jax.doctor.examination import doctor
from llama_jax.doctor.report import Check, Report

__all__ = ["Check", "Report", "doctor"]
