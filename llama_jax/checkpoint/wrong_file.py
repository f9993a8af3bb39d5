"""Identifies files that are not what their names promise: a Git LFS pointer, a web page, an empty file, another format.

A parser would call all of these damaged, but downloading such a file again would give the same file.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Literal, NamedTuple

from llama_jax.errors import CheckpointError

AGAIN = "the file is damaged or was not downloaded completely; get it again"
"""The hint where a file's format is violated in a way that has no better name."""

GGUF = b"GGUF"
"""The first bytes of a GGUF file."""
_HEAD_BYTES = 1024

type Kind = Literal["binary", "json", "any"]
"""Expected contents: weights, in which words are out of place; JSON, where a byte order mark is; something else."""


class WrongFile(NamedTuple):
    """A description of a file, to follow its name in a message, and what to do."""

    what: str
    hint: str


_POINTER = "in the clone run `git lfs install` and `git lfs pull`, or download the model with `hf download ORG/NAME`"
_PAGE = (
    "the page of a file was saved, or a login page, in place of the file: download the model with "
    "`hf download ORG/NAME` (links to a file itself hold /resolve/, not /blob/)"
)
_EMPTY = "a download or a copy was interrupted, or the disk was full; get the file again"
_BOM = "save it as UTF-8 without a byte order mark: `sed -i '1s/^\\xEF\\xBB\\xBF//' FILE` removes it"
_UTF16 = "save it as UTF-8 without a byte order mark: `iconv -f UTF-16 -t UTF-8 OLD > NEW`"
_UNPACK = "unpack it first, and give the folder or file that was in it"
_OLD_GGML = (
    "llama.cpp replaced this format by GGUF in August 2023: use a GGUF file or the safetensors weights of the model "
    "(llama.cpp's convert_llama_ggml_to_gguf.py converts some)"
)

_FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (GGUF, "a GGUF file", "give it a name that ends in .gguf, alone in its folder or by its path"),
    (b"PK\x03\x04", "a zip archive, perhaps one of torch.save", "if torch.save made it, name it pytorch_model.bin"),
    (b"\x1f\x8b", "compressed (gzip)", _UNPACK),
    (b"\xfd7zXZ", "compressed (xz)", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd)", _UNPACK),
    (b"BZh", "compressed (bzip2)", _UNPACK),
    (b"7z\xbc\xaf", "compressed (7z)", _UNPACK),
    (b"\x89HDF\r\n", "an HDF5 file of TensorFlow", "use the model's safetensors or PyTorch weights"),
    *((magic, "a file of llama.cpp's old format GGML", _OLD_GGML) for magic in (b"lmgg", b"fmgg", b"tjgg", b"algg")),
)
"""First bytes, what they say, and what to do."""


def wrong_file(head: bytes, size: int, kind: Kind) -> WrongFile | None:
    """Identifies a file that is not a model's; None where its first bytes show nothing of the kind.

    Args:
      head: its first bytes, 1024 of them or all.
      size: of the whole file, in bytes.
      kind: what it should be.
    """
    if size == 0:
        return WrongFile("is empty (0 bytes)", _EMPTY)
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        found = re.search(rb"^size (\d{1,15})$", start, re.MULTILINE)
        stands = f", which stands for a file of {int(found[1]):,} bytes" if found else ""
        return WrongFile(f"is a pointer of Git LFS{stands}, not the file itself", _POINTER)
    if re.match(rb"(?i)<(!doctype html|html|head|\?xml)", start):
        return WrongFile("is a web page (HTML or XML), not the file itself", _PAGE)
    if kind == "json":
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return WrongFile("is UTF-16, with a byte order mark (BOM)", _UTF16)
        if head.startswith(codecs.BOM_UTF8):
            return WrongFile("begins with a byte order mark (BOM)", _BOM)
    if kind == "binary" and re.fullmatch(rb"[\t\n\r -~]+", head[:64]):
        shown = head[:80].decode("ascii", "replace").strip()
        return WrongFile(f"is a text of {size:,} bytes, not weights: {shown!r}", _TEXT)
    if len(head) >= 64 and not any(head):
        return WrongFile(f"begins with {len(head)} zeros: its contents never arrived", _EMPTY)
    return None


def wrong_small_file(name: str, data: bytes) -> WrongFile | None:
    """The same for a tokenizer's file, a template or a licence, by its name; templates and licences may be empty."""
    if not data and not name.endswith((".json", ".model")):
        return None
    return wrong_file(data[:_HEAD_BYTES], len(data), "json" if name.endswith(".json") else "any")


_TEXT = "the server's answer was saved in place of the file, if that is one; download the model with `hf download`"


def other_format(head: bytes) -> WrongFile | None:
    """The format that a file has in place of the one that its name promises, if its first bytes tell."""
    return next((WrongFile(f"is {what}", hint) for magic, what, hint in _FORMATS if head.startswith(magic)), None)


def read_head(path: Path) -> tuple[bytes, int]:
    """The first bytes of a file, and its size."""
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES), path.stat().st_size


def refuse(path: Path, found: WrongFile | None, cause: BaseException | None = None) -> None:
    """Raises CheckpointError for what `wrong_file` or `other_format` has found; nothing for None."""
    if found is not None:
        raise CheckpointError(f"{path} {found.what}", hint=found.hint) from cause
