"""Reading Hugging Face folders: config.json and weights in safetensors or .bin files, one or several with an index."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoint.format import CONFIG, GENERATION_CONFIG, Source, read_generation_config, read_json
from llama_jax.checkpoint.small_files import copied_files
from llama_jax.checkpoint.source import DTYPES_BY_NAME, SourceTensor, check_names, check_vocabulary, some
from llama_jax.config import config_from_hf
from llama_jax.config.families import find_family
from llama_jax.config.multimodal import text_model
from llama_jax.convert.hf_names import Names, Recipe, recipe
from llama_jax.convert.hf_weights import MISMATCH, PlainWeight, Weight
from llama_jax.convert.quantized import scheme_from_hf
from llama_jax.convert.quantized.weight import QuantizedWeight, take_quantized
from llama_jax.convert.safetensors_file import SafetensorsFile
from llama_jax.convert.torch_file import TorchFile
from llama_jax.convert.weight_file import WeightFile, closed_on_error
from llama_jax.errors import CheckpointError
from llama_jax.params import ParamSpec, param_specs

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LAYOUTS = ((SINGLE, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
"""One file of weights, or the index of several, by format; the first that is there wins."""


class HuggingFaceFolder:
    """An opened Hugging Face folder; see `checkpoint.source.ModelSource`.

    Weights that are stored quantised are read in the dtype that config.json names.

    Raises:
      CheckpointError: a file or tensor is missing, unknown, damaged or of the wrong shape; names it.
      UnsupportedModel: config.json or a dtype asks for something that is not supported, a way of quantising among it.
    """

    def __init__(self, path: Path, *, name: str | None = None, revision: str | None = None):
        self.path = path
        hf = read_json(inside(path, CONFIG))
        self.config = config_from_hf(hf)
        self._text = text_model(hf)
        self._scheme = scheme_from_hf(hf)
        label = self._scheme.label if self._scheme else None
        self.source = Source("huggingface", name or path.resolve().name, revision, licence(path), label)
        self._recipes: dict[str, Recipe] = {}
        self._weights: dict[str, Weight] = {}
        self._where: dict[str, tuple[WeightFile, str]] = {}
        self._files: list[WeightFile] = []
        with closed_on_error(self.close):
            skipped = self._text.skipped_layers if self._text else frozenset()
            modules = {new: old for old, new in find_family(self.config.family).tensor_names.items()}
            self._open(Names(self._text is not None, skipped, modules))
            self._find_weights()
            self._tie(certain=self._text is None or hf.get("tie_word_embeddings") is not None)
            self._plan()

    def close(self) -> None:
        """Closes all files."""
        for file in self._files:
            file.close()

    @property
    def generation_config(self) -> Mapping[str, Any]:
        file = self.path / GENERATION_CONFIG
        return read_generation_config(inside(self.path, GENERATION_CONFIG)) if file.exists() else {}

    @property
    def files(self) -> Mapping[str, bytes]:
        found = copied_files(self.path, inside)
        extra = self._text.extra_embeddings if self._text else 0
        check_vocabulary(found, self.config.vocab_size + extra, self.path)
        return found

    def dtype(self, spec: ParamSpec) -> np.dtype:
        return self._weights[self._recipes[spec.name].sources[0]].dtype

    def provenance(self, spec: ParamSpec) -> list[SourceTensor]:
        return [tensor for source in self._recipes[spec.name].sources for tensor in self._weights[source].stored]

    def read(self, spec: ParamSpec) -> np.ndarray:
        made, out = self._recipes[spec.name], np.empty(spec.shape, self.dtype(spec))
        if len(made.sources) > 1:
            for expert, source in enumerate(made.sources):
                self._weights[source].read_into(out[expert])
        elif out.ndim < 3:
            self._weights[made.sources[0]].read_into(out)
        else:
            self._read_experts(made, out)
        return out

    def has_rows(self, spec: ParamSpec) -> bool:
        """Whether the leaf is a tensor of the file as it is; see `checkpoint.source.RowSource`."""
        made = self._recipes[spec.name]
        plain = isinstance(self._weights[made.sources[0]], PlainWeight)
        return plain and len(made.sources) == 1 and made.part is None and not made.transposed

    def read_rows(self, spec: ParamSpec, start: int, out: np.ndarray) -> None:
        weight = self._weights[self._recipes[spec.name].sources[0]]
        assert isinstance(weight, PlainWeight)
        weight.read_into(out, row=start)

    def _read_experts(self, made: Recipe, out: np.ndarray) -> None:
        """Takes a stack of experts apart, one by one, so that no second copy of it is ever in memory."""
        weight, width = self._weights[made.sources[0]], out.shape[1]
        first = (made.part or 0) * width
        buffer = np.empty(made.shape[1:], out.dtype) if made.transposed else None
        for expert in range(out.shape[0]):
            if buffer is None:
                weight.read_into(out[expert], expert=expert, row=first)
            else:
                weight.read_into(buffer, expert=expert)
                out[expert] = buffer[:, first : first + width].T

    def _open(self, names: Names) -> None:
        for shard, promised in _shards(self.path):
            path = inside(self.path, shard)
            file = SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
            self._files.append(file)
            if absent := promised - file.entries.keys():
                raise CheckpointError(f"{file.path} lacks tensor {some(absent)}, which the index promises", hint=_AGAIN)
            for name in file.entries:
                plain = names.plain(name)
                if plain is None:
                    continue
                if plain in self._where:
                    raise CheckpointError(
                        f"tensor {plain} stands both in {self._where[plain][0].path} and {file.path}", hint=_AGAIN
                    )
                self._where[plain] = (file, name)

    def _find_weights(self) -> None:
        """Tells quantised weights from plain ones."""
        if self._scheme is not None:
            self._weights |= take_quantized(self._scheme, self._where, DTYPES_BY_NAME[self.config.dtype])
        self._weights |= {name: PlainWeight(*stored) for name, stored in self._where.items()}
        # AutoGPTQ once gave every layer that it quantised a bias, of zeros where the model has none.
        wanted = {spec.hf for spec in param_specs(self.config)}
        for name, weight in list(self._weights.items()):
            if name.endswith(".bias") and name not in wanted and isinstance(weight, PlainWeight):
                quantised = self._weights.get(f"{name.removesuffix('bias')}weight")
                if isinstance(quantised, QuantizedWeight) and weight.all_zero():
                    del self._weights[name]

    def _tie(self, *, certain: bool) -> None:
        """Decides whether the embedding is the output projection as well.

        A tied model may still carry lm_head.weight: fine if it is the embedding, or stands for it. The config.json of
        a multimodal model often does not say, or says it wrongly; then the weights decide, as in transformers.
        """
        head, embed = self._weights.get(_HEAD), self._weights.get(_EMBED)
        if not self.config.tie_word_embeddings:
            if not certain and head is None and not (self._text and self._text.extra_embeddings):
                self.config = self.config.replace(tie_word_embeddings=True)
            return
        if head is None:
            return
        if embed is None:
            self._weights[_EMBED] = self._weights.pop(_HEAD)
        elif isinstance(head, PlainWeight) and isinstance(embed, PlainWeight) and head.equals(embed):
            del self._weights[_HEAD]
        elif self._text is not None:
            self.config = self.config.replace(tie_word_embeddings=False)
        else:
            raise CheckpointError(
                f"{head.path}: {CONFIG} says tie_word_embeddings, but tensor {head.name} differs from {embed.name}",
                hint="set tie_word_embeddings to false in config.json if the model has its own output projection",
            )

    def _plan(self) -> None:
        """Finds the tensors of every leaf; checks that none is missing, unknown, or of the wrong shape or dtype."""
        extra = self._text.extra_embeddings if self._text else 0
        for spec in param_specs(self.config):
            self._recipes[spec.name] = recipe(spec, self._weights, extra_embeddings=extra)
        used = {source for made in self._recipes.values() for source in made.sources}
        check_names(self.path, self._weights, used, hint=MISMATCH, holder=lambda name: self._weights[name].path)
        for made in self._recipes.values():
            first = self._weights[made.sources[0]]
            for source in made.sources:
                weight = self._weights[source]
                weight.check(made.shape)
                if weight.dtype != first.dtype:
                    raise CheckpointError(
                        f"{weight.path}: tensor {weight.name} has dtype {weight.dtype.name}, "
                        f"its sibling {first.name} {first.dtype.name}",
                        hint=MISMATCH,
                    )


_HEAD, _EMBED = "lm_head.weight", "model.embed_tokens.weight"
_AGAIN = "the folder is damaged or was not downloaded completely; get it again"


def _shards(path: Path) -> list[tuple[str, set[str]]]:
    """The weight files of a folder, each with the tensors that the index promises in it."""
    for single, index in LAYOUTS:
        if (path / single).exists():
            return [(single, set())]
        if (path / index).exists():
            return _indexed(path, index)
    others = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".pth", ".pt", ".gguf"))
    hint = f"it holds {some(others)}; " if others else ""
    *names, last = (name for layout in LAYOUTS for name in layout)
    raise CheckpointError(
        f"{path} has neither {', '.join(names)} nor {last}",
        hint=f"{hint}a Hugging Face folder, a folder of Meta or a GGUF file can be converted",
    )


def _indexed(path: Path, index: str) -> list[tuple[str, set[str]]]:
    where = read_json(inside(path, index)).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(f, str) for f in where.values()):
        raise CheckpointError(f"{path / index} has no valid weight_map", hint=_AGAIN)
    shards: dict[str, set[str]] = {}
    for tensor, file in where.items():
        shards.setdefault(file, set()).add(tensor)
    return sorted(shards.items())


def inside(folder: Path, name: str) -> Path:
    """A file of the folder. Refuses names and links that lead out of it.

    In the cache of huggingface_hub the files of a snapshot are links to `blobs` of the same model, which is fine; so is
    the store of contents that its models share.
    """
    path = folder / name
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        allowed += [root.parent.parent / "blobs", root.parents[2] / "blobs"]
    try:
        resolved, there = path.resolve(), path.is_file()
    except (OSError, RuntimeError, ValueError) as e:  # too long, a loop of links, a NUL or lone surrogate in it
        raise CheckpointError(f"{folder}: {name!r} cannot be looked up ({type(e).__name__})", hint=_AGAIN) from e
    if not any(resolved.is_relative_to(a) for a in allowed) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(
            f"{folder}: {name!r} leads out of the folder", hint="a model's files must lie in its own folder"
        )
    if not there:
        raise CheckpointError(f"{path} is missing", hint="the folder is incomplete; get it again")
    return path


def licence(path: Path) -> str | None:
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
