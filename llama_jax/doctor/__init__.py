"""What this machine and this installation can do, what is missing, and the command that fixes it.

One module a subject. JAX is asked in a child process with a deadline, so that a driver that hangs cannot hang the one
who asks; this package imports neither jax nor numpy.
"""

from __future__ import annotations

from llama_jax.doctor.devices import check_devices
from llama_jax.doctor.environment import ENVIRONMENT, PREFIXES, check_environment, shown
from llama_jax.doctor.examination import check_several, doctor, gpus_in_use
from llama_jax.doctor.graphs import check_graphs
from llama_jax.doctor.kernels import check_choices, check_numerics
from llama_jax.doctor.links import check_links
from llama_jax.doctor.packages import PACKAGES, PLUGINS, check_packages, check_plugins, installed_versions
from llama_jax.doctor.probe import PROBE_DEADLINE_S, Probe, probe_jax
from llama_jax.doctor.report import INTERNAL, Check, Report, Status
from llama_jax.doctor.shared_memory import check_shared_memory
from llama_jax.doctor.storage import check_cache, check_default_model, check_folder
from llama_jax.doctor.visibility import check_visibility

__all__ = [
    "ENVIRONMENT",
    "INTERNAL",
    "PACKAGES",
    "PLUGINS",
    "PREFIXES",
    "PROBE_DEADLINE_S",
    "Check",
    "Probe",
    "Report",
    "Status",
    "check_cache",
    "check_choices",
    "check_default_model",
    "check_devices",
    "check_environment",
    "check_folder",
    "check_graphs",
    "check_links",
    "check_numerics",
    "check_packages",
    "check_plugins",
    "check_several",
    "check_shared_memory",
    "check_visibility",
    "doctor",
    "gpus_in_use",
    "installed_versions",
    "probe_jax",
    "shown",
]
