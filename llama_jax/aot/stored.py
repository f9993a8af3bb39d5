"""Compiled programs on disk that are found without tracing.

jax looks up its own cache by a program that has been traced and lowered. For the programs of an engine tracing takes
longer than everything else: 20 seconds of Python for Llama-3.1-8B. Here the key of a program is all that its tracing
depends on: this package's files, the versions and flags beneath it, the devices, and the shapes of its arguments. If
one of them changes, so does the key. Where they cannot be known, because other packages add kernels, nothing
is stored.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import os
import pickle
import stat
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax._src import config
from jax._src.core import AxisEnv
from jax.experimental import serialize_executable

import llama_jax
from llama_jax import plugins, runtime
from llama_jax.aot.programs import Program
from llama_jax.disk import write_file
from llama_jax.errors import StorageError
from llama_jax.kernels.dispatch.user_table import path_of
from llama_jax.sharding import AnyMesh, ruled
from llama_jax.targets import current

KEPT = 256
"""Number of programs; the least recently used are removed first. One of Llama-3.1-8B takes some 3 MB."""

_ENVIRONMENT = ("XLA_FLAGS", "LLAMA_JAX_KERNELS", "LLAMA_JAX_ROCM")
_NO_MATTER = ("cache", "log", "traceback", "profiler", "debug_dir", "dump")
"""In the names of jax's settings that change no program."""


def compile_stored(
    program: Program, about: Iterable[Any], devices: Sequence[jax.Device], mesh: AnyMesh = None
) -> tuple[Any, bool]:
    """Compiles a program, or reads it from disk. On a mesh: inside of `sharding.on(mesh)`.

    Args:
      about: everything that the program's function has been made for; what has the same `repr` is the same.
      devices: that it runs on.

    Returns:
      The compiled program, and whether it was read.
    """
    folder = runtime.programs_dir(devices[0].platform)
    path = None if folder is None or not _private(folder) else _path(folder, program, about, devices, mesh)
    if path is None:
        return program.lower().compile(), False
    if (found := _read(path, devices)) is not None:
        return found, True
    counted = runtime.count_compilations()
    before = counted.from_cache
    compiled = program.lower().compile()
    # What jax has read from its own cache for a CPU may not be whole when it is written again.
    if counted.from_cache == before or devices[0].platform != "cpu":
        _write(path, compiled)
    return compiled, False


def _path(
    folder: Path, program: Program, about: Iterable[Any], devices: Sequence[jax.Device], mesh: AnyMesh
) -> Path | None:
    """The path of a stored program, existing or not; None if it cannot be told from others."""
    if plugins.load(plugins.KERNELS) or jax.process_count() > 1:
        return None
    leaves, structure = jax.tree.flatten((program.args, dict(program.static)))
    parts = [
        *(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib")),
        devices[0].client.platform_version,
        *(f"{device.id} {device.device_kind}" for device in devices),
        *(f"{name}={os.environ.get(name, '')}" for name in _ENVIRONMENT),
        *(f"{name}={jax.config.values[name]}" for name in sorted(jax.config.values) if _matters(name)),
        *tracing_context(),
        *(f"{plugin.origin} {plugin.value!r}" for plugin in plugins.load(plugins.TARGETS)),
        _package(),
        _user_table(),
        repr(ruled(mesh)),
        repr(tuple(about)),
        str(structure),
        *(f"{x.dtype}{list(x.shape)} {getattr(x, 'sharding', None)!r}" for x in leaves),
    ]
    text = "\n".join(parts)
    if " at 0x" in text:  # the `repr` of an object by its address, which says nothing
        return None
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()}.program"


def _private(folder: Path) -> bool:
    """Returns whether only this user can write there: a stored program is code. A missing folder is created so."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        _warn(f"compiled programs cannot be stored in {folder}: {error.strerror}")
        return False
    if found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return True
    _warn(
        f"{folder} belongs to somebody else, or others may write into it, so no compiled program is read from it; "
        f"make it yours alone (chmod 700), or set {runtime.PROGRAMS_VARIABLE}=0"
    )
    return False


@functools.cache
def _warn(text: str) -> None:
    """Warns, once for all programs."""
    warnings.warn(text, RuntimeWarning, stacklevel=4)


def tracing_context() -> tuple[str, ...]:
    """jax's settings as this thread has them, and what else it traces by, but for the names of mapped axes, of which
    there are none here. What jax's modules add when they are imported late, while a program is traced perhaps, comes
    last and is off."""
    values = [repr(value) for value in config.trace_context() if not isinstance(value, AxisEnv)]
    while values and values[-1] in ("None", "False", "()"):
        values.pop()
    return tuple(values)


def _matters(name: str) -> bool:
    return not any(word in name for word in _NO_MATTER)


@functools.cache
def _package() -> str:
    """A digest of this package's files."""
    hasher, root = hashlib.sha256(), Path(llama_jax.__file__).parent
    for folder in (root, Path(llama_jax.kernels.__file__).parent):
        for file in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".json")):
            hasher.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return hasher.hexdigest()


def _user_table() -> str:
    """The user's choice of kernels."""
    try:
        return path_of(current()).read_text(encoding="utf-8")
    except (OSError, StorageError):
        return ""


def _read(path: Path, devices: Sequence[jax.Device]) -> Any:
    """The program of a file; None if there is none, or not all of it."""
    try:
        data = path.read_bytes()
    except OSError:  # where it matters, writing will say so
        return None
    digest, data = data[:32], data[32:]
    if hashlib.sha256(data).digest() != digest:
        return None
    try:
        trees, executable = pickle.loads(data)
        ins, outs = (jax.tree.structure(tree) for tree in trees)
        found = serialize_executable.deserialize_and_load(
            executable, ins, outs, backend=devices[0].client, execution_devices=devices
        )
    except Exception as error:  # of another jaxlib's making, perhaps: what cannot be read is compiled
        warnings.warn(f"{path} cannot be read, and is made again: {error}", RuntimeWarning, stacklevel=2)
        return None
    with contextlib.suppress(OSError):  # the folder may be read-only, or the file just removed
        os.utime(path)
    return found


def _write(path: Path, compiled: Any) -> None:
    """Stores a program; what goes wrong is a warning, since the program is there."""
    try:
        executable, *structures = serialize_executable.serialize(compiled)
        # A structure of jax's own cannot be pickled, but what has it can.
        trees = [jax.tree.unflatten(structure, range(structure.num_leaves)) for structure in structures]
        file = io.BytesIO()
        pickle.dump((trees, executable), file)
        data = file.getvalue()
        write_file(path, hashlib.sha256(data).digest() + data)
        files = sorted(path.parent.glob("*.program"), key=lambda file: file.stat().st_mtime)
        for old in files[:-KEPT]:
            old.unlink(missing_ok=True)
    except Exception as error:
        warnings.warn(f"a compiled program could not be stored in {path.parent}: {error}", RuntimeWarning, stacklevel=2)
