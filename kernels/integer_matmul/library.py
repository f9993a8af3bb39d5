"""The library of the backend `native`: compiled where it runs, once, by the C++ compiler that is there.

It needs XLA's headers, which jaxlib brings, and must be made for the version of jaxlib that calls it. So it is not part
of the wheel, which stays pure Python, and an installation needs neither a compiler nor a second jaxlib to build with:
`prepare` builds it when a model is first loaded with int8 activations, compares it with the reference, and keeps it in
the cache folder. Without a compiler, XLA multiplies.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llama_jax.disk import file_lock
from llama_jax.errors import LlamaJaxError
from llama_jax.folders import cache_dir
from llama_jax.targets import hardware

TARGET = "llama_jax_integer_matmul"
"""The handler's name, in the library and in programs of XLA."""
SOURCES = Path(__file__).parent / "cpp"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread")
COMPILERS = ("c++", "g++", "clang++")
DEADLINE_S = 300

_loaded: list[ctypes.CDLL] = []
_problem: list[str] = []
_loading = threading.Lock()
"""Programs are traced by several threads."""


def missing() -> str | None:
    """The reason there is no library for this process; None if there is one, which is then loaded."""
    if _loaded:
        return None
    with _loading, contextlib.suppress(LlamaJaxError, OSError):
        if not _loaded and (place := path()).exists():
            _load(place)
        if _loaded:
            return None
    return _problem[-1] if _problem else "its library is not built yet: `load` with int8 activations builds it"


def prepare(notify: Callable[[str], None] | None = None) -> None:
    """Builds and checks the library, unless that has been done. Where it cannot be, `missing` says why.

    Args:
      notify: called with a line before it is built, and with one where that fails.
    """
    say = notify or (lambda line: None)
    if _problem or missing() is None:
        return
    try:
        _build(say)
    except (LlamaJaxError, OSError, subprocess.SubprocessError) as error:
        _problem.append(f"its library could not be built: {error}")
    if _problem:
        say(f"int8 activations are multiplied by XLA, which is slower: {_problem[-1]}")


def register() -> str:
    """The name that the handler is registered under.

    Raises:
      KeyError: there is no library (`missing`).
    """
    if (problem := missing()) is not None:
        raise KeyError(problem)
    return TARGET


def instructions() -> tuple[str, ...]:
    """Sets of instructions of this processor that the library has products for, the best first; () without one."""
    return () if missing() else tuple(_names(_loaded[0]))


def status() -> dict[str, Any]:
    """For reports: the "instructions" in use, the "compiler" that would build it, why it is "missing"; or None."""
    return {"instructions": next(iter(instructions()), None), "compiler": compiler(), "missing": missing()}


def compiler() -> str | None:
    """The C++ compiler that would build it: CXX, else the first of COMPILERS that is there."""
    named = os.environ.get("CXX", "")
    return next((found for name in (named, *COMPILERS) if name and (found := shutil.which(name))), None)


def path() -> Path:
    """The library's path: a file for each version of its sources and of jaxlib, and each kind of processor.

    Raises:
      StorageError: there is no cache folder.
    """
    hasher = hashlib.sha256(repr((version("jaxlib"), FLAGS, platform.machine(), hardware.cpu())).encode())
    for file in sorted(SOURCES.iterdir()):
        hasher.update(file.name.encode() + b"\0" + file.read_bytes())
    return cache_dir() / "kernels" / f"integer_matmul-{hasher.hexdigest()[:16]}.so"


def command(compiler: str, out: Path, *flags: str) -> list[str]:
    """The command line that builds it."""
    import jax

    source = str(SOURCES / "integer_matmul.cpp")
    return [compiler, *FLAGS, *flags, "-isystem", jax.ffi.include_dir(), "-o", str(out), source]


def _build(say: Callable[[str], None]) -> None:
    place, found = path(), compiler()
    if found is None:
        _problem.append(f"there is no C++ compiler ({', '.join(COMPILERS)})")
        return
    with file_lock(place.with_suffix(".lock")):
        if missing() is None:
            return
        say(f"Compiling the CPU's kernel with {found} (once, some seconds)")
        fresh = place.with_suffix(f".{os.getpid()}.so")
        try:
            done = subprocess.run(command(found, fresh), capture_output=True, text=True, timeout=DEADLINE_S)
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if "error" in line] or [f"status {done.returncode}"]
                _problem.append(f"{found} fails: {errors[0][:300]}")
                return
            with _loading:
                _load(fresh)
            if wrong := _wrong():
                _problem.append(wrong)
            else:
                fresh.replace(place)
        finally:
            fresh.unlink(missing_ok=True)


def _wrong() -> str | None:
    """Wrong results of the loaded library; if there are any, it is not chosen."""
    from llama_jax.kernels.checking.compare import run_checks
    from llama_jax.kernels.dispatch.operation import disable
    from llama_jax.kernels.registry import operation

    checks = run_checks({"integer_matmul": operation("integer_matmul")}, quick=True)
    problem = next((f"{check.case}: {check.problem}" for check in checks if check.problem), None)
    if problem:
        disable("integer_matmul", "native", f"it was wrong on this processor ({problem})")
    return problem


def _load(place: Path) -> None:
    import jax

    library = ctypes.CDLL(str(place))
    library.llama_jax_instructions.restype = ctypes.c_char_p
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(getattr(library, TARGET)), platform="cpu")
    _loaded.append(library)


def _names(library: ctypes.CDLL) -> Iterator[str]:
    index = 0
    while (name := library.llama_jax_instructions(index)) is not None:
        yield name.decode()
        index += 1
