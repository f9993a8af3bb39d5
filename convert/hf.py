"""Reading Hugging Face folders: config.json and safetensors files, one or several with an index."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoint.format import CONFIG, GENERATION_CONFIG, Source, read_json
from llama_jax.config import config_from_hf
from llama_jax.convert.hf_names import Recipe, recipe, text_name
from llama_jax.convert.model_source import some
from llama_jax.convert.safetensors_file import DTYPES, SafetensorsFile
from llama_jax.errors import CheckpointError, UnsupportedModel
from llama_jax.params import ParamSpec, param_specs

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
COPIED = re.compile(
    r"tokenizer\.(json|model)|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.json|"
    r"merges\.txt|chat_template\.(jinja|json)|(LICENSE|LICENCE|NOTICE|USE_POLICY)(\.(md|txt))?"
)
"""Files that go into the converted checkpoint as they are."""
MAX_COPIED_BYTES = 512 << 20
"""More than any tokenizer file has."""


class HuggingFaceFolder:
    """An opened Hugging Face folder; see `convert.model_source.ModelSource`.

    Raises:
      CheckpointError: a file or tensor is missing, unknown, damaged or of the wrong shape; names it.
      UnsupportedModel: config.json or a dtype asks for something that is not supported.
    """

    def __init__(self, path: Path, *, name: str | None = None, revision: str | None = None):
        self.path = path
        hf = read_json(_inside(path, CONFIG))
        self.config = config_from_hf(hf)
        self.source = Source("huggingface", name or path.resolve().name, revision, _licence(path))
        self._recipes: dict[str, Recipe] = {}
        self._where: dict[str, tuple[SafetensorsFile, str]] = {}
        self._files: list[SafetensorsFile] = []
        try:
            self._open(multimodal="text_config" in hf)
            self._plan()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes all files."""
        for file in self._files:
            file.close()

    @property
    def generation_config(self) -> Mapping[str, Any]:
        file = self.path / GENERATION_CONFIG
        return read_json(_inside(self.path, GENERATION_CONFIG)) if file.exists() else {}

    @property
    def files(self) -> Mapping[str, bytes]:
        found = {}
        for file in sorted(self.path.iterdir()):
            if COPIED.fullmatch(file.name) and file.is_file():
                inside = _inside(self.path, file.name)
                if inside.stat().st_size > MAX_COPIED_BYTES:
                    raise CheckpointError(
                        f"{file} has {inside.stat().st_size:,} bytes", hint="this is no tokenizer file"
                    )
                found[file.name] = inside.read_bytes()
        return found

    def dtype(self, spec: ParamSpec) -> np.dtype:
        file, name = self._where[self._recipes[spec.name].sources[0]]
        return DTYPES[file.entries[name].dtype]

    def read(self, spec: ParamSpec) -> np.ndarray:
        made, out = self._recipes[spec.name], np.empty(spec.shape, self.dtype(spec))
        if len(made.sources) > 1:
            for expert, source in enumerate(made.sources):
                self._read_into(source, out[expert])
        elif made.part is None and not made.transposed:
            self._read_into(made.sources[0], out)
        else:
            self._read_experts(made, out)
        return out

    def read_rows(self, spec: ParamSpec, start: int, out: np.ndarray) -> bool:
        """Reads some rows of a leaf that is a tensor of the file as it is; see `convert.model_source.RowSource`."""
        made = self._recipes[spec.name]
        if len(made.sources) > 1 or made.part is not None or made.transposed:
            return False
        self._read_into(made.sources[0], out, start * math.prod(spec.shape[1:]) * out.itemsize)
        return True

    def _read_experts(self, made: Recipe, out: np.ndarray) -> None:
        """Takes a fused tensor apart, expert by expert, so that no second copy of it is ever in memory."""
        width, rows = out.shape[1], made.shape[1]
        first = (made.part or 0) * width
        one = rows * made.shape[2] * out.itemsize
        buffer = np.empty(made.shape[1:], out.dtype) if made.transposed else None
        for expert in range(out.shape[0]):
            if buffer is None:
                self._read_into(made.sources[0], out[expert], expert * one + first * made.shape[2] * out.itemsize)
            else:
                self._read_into(made.sources[0], buffer, expert * one)
                out[expert] = buffer[:, first : first + width].T

    def _read_into(self, source: str, out: np.ndarray, skip: int = 0) -> None:
        file, name = self._where[source]
        file.read_into(name, out, skip)

    def _open(self, *, multimodal: bool) -> None:
        for shard, promised in _shards(self.path):
            file = SafetensorsFile(_inside(self.path, shard))
            self._files.append(file)
            if absent := promised - file.entries.keys():
                raise CheckpointError(f"{file.path} lacks tensor {some(absent)}, which {INDEX} promises", hint=_AGAIN)
            for name in file.entries:
                plain = text_name(name, multimodal=multimodal)
                if plain is None:
                    continue
                if plain in self._where:
                    raise CheckpointError(
                        f"tensor {plain} stands both in {self._where[plain][0].path} and {file.path}", hint=_AGAIN
                    )
                self._where[plain] = (file, name)

    def _plan(self) -> None:
        """Finds the tensors of every leaf; checks that none is missing, unknown, or of the wrong shape or dtype."""
        if self.config.tie_word_embeddings:
            self._drop_tied_head()
        for spec in param_specs(self.config):
            self._recipes[spec.name] = recipe(spec, self._where)
        used = {source for made in self._recipes.values() for source in made.sources}
        if missing := used - self._where.keys():
            raise CheckpointError(f"{self.path} lacks tensor {some(missing)}, which {CONFIG} asks for", hint=_MATCH)
        if unknown := self._where.keys() - used:
            file, name = self._where[min(unknown)]
            raise CheckpointError(
                f"{file.path} holds tensor {name}, which {CONFIG} does not ask for (unknown: {some(unknown)})",
                hint=_MATCH,
            )
        for made in self._recipes.values():
            self._check(made)

    def _check(self, made: Recipe) -> None:
        for source in made.sources:
            file, name = self._where[source]
            entry = file.entries[name]
            if entry.dtype not in DTYPES:
                raise UnsupportedModel(
                    f"{file.path}: tensor {name} has dtype {entry.dtype}", hint=f"supported: {', '.join(DTYPES)}"
                )
            if entry.shape != made.shape:
                raise CheckpointError(
                    f"{file.path}: tensor {name} has shape {list(entry.shape)}, {CONFIG} asks for {list(made.shape)}",
                    hint=_MATCH,
                )
            first, first_name = self._where[made.sources[0]]
            if entry.dtype != first.entries[first_name].dtype:
                raise CheckpointError(
                    f"{file.path}: tensor {name} has dtype {entry.dtype}, "
                    f"its sibling {made.sources[0]} {first.entries[first_name].dtype}",
                    hint=_MATCH,
                )

    def _drop_tied_head(self) -> None:
        """A tied model may still carry lm_head.weight: fine if it is the embedding, or stands for it."""
        head, embed = "lm_head.weight", "model.embed_tokens.weight"
        if head not in self._where:
            return
        if embed not in self._where:
            self._where[embed] = self._where.pop(head)
            return
        (a, a_name), (b, b_name) = self._where[head], self._where[embed]
        x, y = a.entries[a_name], b.entries[b_name]
        same = (x.dtype, x.shape) == (y.dtype, y.shape) and all(
            np.array_equal(p, q) for p, q in zip(_blocks(a, a_name), _blocks(b, b_name), strict=True)
        )
        if not same:
            raise CheckpointError(
                f"{a.path}: {CONFIG} says tie_word_embeddings, but tensor {a_name} differs from {b_name}",
                hint="set tie_word_embeddings to false in config.json if the model has its own output projection",
            )
        del self._where[head]


_AGAIN = "the folder is damaged or was not downloaded completely; get it again"
_MATCH = "config.json and the weights do not belong together, or the download is incomplete"


def _blocks(file: SafetensorsFile, name: str, size: int = 16 << 20) -> Iterator[np.ndarray]:
    nbytes = file.entries[name].nbytes
    for start in range(0, nbytes, size):
        block = np.empty(min(size, nbytes - start), np.uint8)
        file.read_into(name, block, start)
        yield block


def _shards(path: Path) -> list[tuple[str, set[str]]]:
    """The safetensors files of a folder, each with the tensors that the index promises in it."""
    if (path / SINGLE).exists():
        return [(SINGLE, set())]
    if (path / INDEX).exists():
        index = read_json(_inside(path, INDEX)).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(f, str) for f in index.values()):
            raise CheckpointError(f"{path / INDEX} has no valid weight_map", hint=_AGAIN)
        shards: dict[str, set[str]] = {}
        for tensor, file in index.items():
            shards.setdefault(file, set()).add(tensor)
        return sorted(shards.items())
    others = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".pth", ".pt", ".gguf"))
    hint = f"it holds {some(others)}; " if others else ""
    raise CheckpointError(
        f"{path} has neither {SINGLE} nor {INDEX}",
        hint=f"{hint}a folder of safetensors or a GGUF file can be converted",
    )


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder. Refuses names and links that lead out of it.

    In the cache of huggingface_hub the files of a snapshot are links to `blobs` of the same model, which is fine.
    """
    path = folder / name
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        allowed.append(root.parent.parent / "blobs")
    if (
        not any(path.resolve().is_relative_to(a) for a in allowed)
        or Path(name).is_absolute()
        or ".." in Path(name).parts
    ):
        raise CheckpointError(
            f"{folder}: {name!r} leads out of the folder", hint="a model's files must lie in its own folder"
        )
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", hint="the folder is incomplete; get it again")
    return path


def _licence(path: Path) -> str | None:
    """The licence that the model card (README.md, YAML between two lines of dashes) names."""
    try:
        with (path / "README.md").open(encoding="utf-8") as card:
            head = card.read(20_000)
    except (OSError, ValueError):
        return None
    parts = head.split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    found = re.search(r"^license(?:_name)?:\s*([\w.\-]+)\s*$", parts[1], re.MULTILINE)
    return found[1] if found else None


def is_huggingface(path: Path) -> bool:
    """Whether a folder looks like a Hugging Face model."""
    return (path / CONFIG).is_file()


def required_files(path: Path) -> list[Path]:
    """The weight files of a folder, there or not; of use to see whether a download is complete."""
    try:
        return [path / name for name, _ in _shards(path)]
    except CheckpointError:
        return [path / SINGLE]
