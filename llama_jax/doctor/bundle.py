"""Collects what a bug report needs in one zip file: the report, all installed packages, the output of the driver's
tools, and the kernels tuned on this machine. The home folder is written as `~`; nothing is sent anywhere."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from llama_jax.disk import storage_errors, write_file
from llama_jax.doctor.child import run_child
from llama_jax.doctor.report import Report
from llama_jax.folders import cache_dir

TOOLS: tuple[tuple[str, ...], ...] = (
    ("rocminfo",),
    ("rocm-smi", "--showallinfo"),
    ("nvidia-smi", "-q"),
    ("lspci", "-nn"),
)
"""Programs whose output says what the hardware is. Those that are not installed are left out."""
TOOL_DEADLINE_S = 20.0


def write_bundle(
    path: Path, report: Report, environ: Mapping[str, str], *, tools: Sequence[Sequence[str]] = TOOLS
) -> None:
    """Writes the zip file.

    Raises:
      StorageError: it cannot be written.
      DoesNotFit: the disk is full.
    """
    files = {"report.json": json.dumps(dataclasses.asdict(report), indent=1), "packages.txt": _packages()}
    for command in tools:
        if said := _output(command, environ):
            files[f"{command[0]}.txt"] = said
    for table in sorted((cache_dir() / "kernels").glob("*.json")):
        files[f"kernels/{table.name}"] = table.read_text(encoding="utf-8", errors="replace")
    home, buffer = str(Path.home()), io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, text in files.items():
            bundle.writestr(name, text.replace(home, "~") if home != "/" else text)
    with storage_errors(path):
        write_file(path, buffer.getvalue())


def _packages() -> str:
    found = {f"{each.metadata['Name']}=={each.version}" for each in importlib.metadata.distributions()}
    return "\n".join(sorted(found, key=str.lower)) + "\n"


def _output(command: Sequence[str], environ: Mapping[str, str]) -> str:
    """The output of a program; empty if it is not there, and why it has none if it hangs."""
    try:
        done = run_child(command, environ, deadline_s=TOOL_DEADLINE_S)
    except OSError:
        return ""
    return f"no answer within {TOOL_DEADLINE_S:g} s\n" if done is None else done.stdout + done.stderr
