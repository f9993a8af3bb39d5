"""Looks up a name on the Hugging Face hub, and which of its files are needed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llama_jax.checkpoint.format import TEMPLATES
from llama_jax.errors import NetworkError, UnsupportedModel
from llama_jax.library import network
from llama_jax.library.hub_errors import hub_errors
from llama_jax.library.transfer import RemoteFile

SMALL = ("*.json", "*.jinja", "tokenizer.model", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "README.md")
"""Configuration, tokenizer, templates, licence and model card, at the top of the repository or in `TEMPLATES`."""
WEIGHTS = (
    ("model.safetensors",),
    ("model-*.safetensors",),
    ("pytorch_model.bin",),
    ("pytorch_model-*.bin",),
    ("consolidated.*.pth",),
)
"""The first of these that a repository holds is downloaded: its other copies of the weights are not needed."""


@dataclass(frozen=True)
class Offer:
    """The model that the hub has under a name: what a download would fetch.

    Attributes:
      repo, revision: as requested; the revision is None for the main branch.
      commit: what the revision is at present.
      licence: as the model card states it.
      files: what is needed of the repository.
    """

    repo: str
    revision: str | None
    commit: str
    licence: str | None
    files: tuple[RemoteFile, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def offer(repo: str, revision: str | None) -> Offer:
    """Asks the hub what a model is; downloads nothing. Raises as `hub.snapshot` does."""
    where = f"{repo}@{revision}" if revision else repo
    network.check_online(where, otherwise="copy the hub's cache of a machine that has it, or give a local path")
    from huggingface_hub import HfApi, constants
    from huggingface_hub.hf_api import RepoFile

    with hub_errors(repo, revision):
        api = HfApi()
        info = api.model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        commit = _digits(info.sha, 40, f"commit of {repo}")
        entries = list(api.list_repo_tree(repo, revision=commit))
        if any(entry.path == TEMPLATES for entry in entries):
            entries += api.list_repo_tree(repo, TEMPLATES, revision=commit)
        files = [_remote_file(e) for e in entries if isinstance(e, RepoFile)]
    return Offer(repo, revision, commit, _licence(info), _needed(repo, files))


def _remote_file(entry: Any) -> RemoteFile:
    size = entry.lfs.size if entry.lfs is not None else entry.size
    if type(size) is not int or size < 0:
        raise NetworkError(f"the hub states the size {size!r:.40} of {entry.path!r:.200}", hint=_NO_HUB)
    if entry.lfs is None:
        return RemoteFile(entry.path, size, git_sha1=_digits(entry.blob_id, 40, f"hash of {entry.path!r:.200}"))
    sha256 = _digits(entry.lfs.sha256, 64, f"sha256 of {entry.path!r:.200}")
    return RemoteFile(entry.path, size, sha256, xet=bool(getattr(entry, "xet_hash", None)))


_NO_HUB = "run it again; if it stays, what answers is not a Hugging Face hub: check HF_ENDPOINT and the proxy"


def _digits(value: object, number: int, what: str) -> str:
    """A hash that the hub states. It becomes the name of a file or folder, so nothing else may pass."""
    if not isinstance(value, str) or not re.fullmatch(rf"[0-9a-f]{{{number}}}", value):
        raise NetworkError(f"the hub states {value!r:.80} as the {what}", hint=_NO_HUB)
    return value


def _licence(info: Any) -> str | None:
    card = info.card_data
    for value in (getattr(card, "license_name", None), getattr(card, "license", None)):
        if isinstance(value, str):
            return value
    tags = [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
    return tags[0] if tags else None


def _needed(repo: str, files: Sequence[RemoteFile]) -> tuple[RemoteFile, ...]:
    """The small files, and one copy of the weights."""
    # Imported here, since the second brings jax, which names of the hub that are here already do not need.
    from llama_jax.convert.adapters import is_adapter, merge_hint
    from llama_jax.convert.gguf_parts import first_part

    top = [file for file in files if "/" not in file.name]
    small = [file for file in files if _matches(file, SMALL) and file.name.rpartition("/")[0] in ("", TEMPLATES)]
    for patterns in WEIGHTS:
        if weights := [file for file in top if _matches(file, patterns)]:
            return (*small, *weights)
    gguf = [file for file in top if file.name.lower().endswith(".gguf")]
    if len({first_part(Path(file.name)) for file in gguf}) == 1:
        return (*small, *gguf)
    if gguf:
        names = ", ".join(file.name for file in gguf[:3])
        raise UnsupportedModel(
            f"{repo} holds {len(gguf)} GGUF files ({names}{', …' if len(gguf) > 3 else ''})",
            hint=f"choose one: `hf download {repo} {gguf[0].name}` prints a path that every command takes",
        )
    if is_adapter(file.name for file in top):
        raise UnsupportedModel(
            f"{repo} is an adapter (LoRA or its kin), not a model",
            hint=f"{merge_hint(repo)}; its page names the base model: https://huggingface.co/{repo}",
        )
    raise UnsupportedModel(
        f"{repo} holds no weights that can be read ({len(files)} files)",
        hint="safetensors, PyTorch .bin, Meta's consolidated .pth and GGUF can be",
    )


def _matches(file: RemoteFile, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(file.name, pattern) for pattern in patterns)
