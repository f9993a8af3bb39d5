"""Fingerprints of what measurements and checks of kernels depend on: their source, and the versions beneath them."""

from __future__ import annotations

import functools
import hashlib
import io
import tokenize
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llama_jax.kernels.registry import OPERATIONS
from llama_jax.targets import rocm

_CHANGE_NO_KERNEL = {"cases.py", "packed.py"}
"""Files of an operation that decide what is called, not what a call computes."""
_ROOT = Path(__file__).parents[1]
_LAYOUT = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
_SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}


def sources(operation: str) -> list[Path]:
    """The files that an operation's kernels are made of: its folder without those of other operations in it, and the
    files beside it and above it.

    The choice among backends (`kernels/dispatch`, `registry.py`, `cases.py`) and the cutting of packed tokens
    (`packed.py`) change no kernel and are not among them.
    """
    folder = _folder(operation)
    within = [other for other in map(_folder, OPERATIONS) if folder in other.parents]
    files = {p for p in folder.rglob("*.py") if not any(other in p.parents for other in within)}
    while folder != _ROOT:
        folder = folder.parent
        files |= set(folder.glob("*.py"))
    return sorted(p for p in files - {_ROOT / "__init__.py", _ROOT / "registry.py"} if p.name not in _CHANGE_NO_KERNEL)


def _folder(operation: str) -> Path:
    module = OPERATIONS[operation].partition(":")[0]
    return _ROOT.joinpath(*module.split(".")[2:])


@functools.cache
def source_hash(operation: str) -> str:
    """16 hexadecimal digits; comments, docstrings and formatting do not change it."""
    hasher = hashlib.sha256()
    for file in sources(operation):
        hasher.update(file.relative_to(_ROOT).as_posix().encode() + b"\0")
        hasher.update(code_only(file.read_text(encoding="utf-8")).encode() + b"\0")
    return hasher.hexdigest()[:16]


def code_only(source: str) -> str:
    """The tokens of Python code without comments, docstrings and layout."""
    kept: list[tuple[int, str]] = []
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in _SKIPPED]
    begins = True  # whether the next token begins a statement
    for i, token in enumerate(tokens):
        alone = begins and token.type == tokenize.STRING and tokens[i + 1].type == tokenize.NEWLINE
        after_alone = token.type == tokenize.NEWLINE and begins
        if not alone and not after_alone:
            kept.append((token.type, "" if token.type in _LAYOUT else token.string))
        begins = alone or token.type in _LAYOUT
    return repr(kept)


def versions() -> dict[str, Any]:
    """Versions of what compiles and runs kernels."""
    found = {}
    for name in ("jax", "jaxlib", *rocm.PACKAGES, "jax-cuda13-plugin", "jax-cuda13-pjrt"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
