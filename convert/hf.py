"""Reading Hugging Face folders: config.json and weights in safetensors or .bin files, one or several with an index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoint.format import CONFIG, CORRECT, GENERATION_CONFIG, Source, read_generation_config, read_json
from llama_jax.checkpoint.small_files import copied_files
from llama_jax.checkpoint.source import DTYPES_BY_NAME, SourceTensor, check_names, check_vocabulary, some
from llama_jax.config import config_from_hf
from llama_jax.config.families import find_family
from llama_jax.config.multimodal import text_model
from llama_jax.convert.adapters import refuse_adapted
from llama_jax.convert.hf_files import AGAIN, check_promised, inside, licence, weight_shards
from llama_jax.convert.hf_names import CACHE_SCALE, Names, Recipe, recipe
from llama_jax.convert.hf_weights import MISMATCH, PlainWeight, Weight
from llama_jax.convert.members import Members
from llama_jax.convert.quantized import scheme_from_hf
from llama_jax.convert.quantized.weight import QuantizedWeight, take_quantized
from llama_jax.convert.safetensors_file import SafetensorsFile
from llama_jax.convert.torch_file import TorchFile
from llama_jax.convert.weight_file import WeightFile, closed_on_error
from llama_jax.errors import CheckpointError
from llama_jax.params import ParamSpec, param_specs
from llama_jax.quantized.layout import ORDER
from llama_jax.schemes import PLAIN


class HuggingFaceFolder:
    """An opened Hugging Face folder; see `checkpoint.source.ModelSource`.

    Args:
      dequantize: whether all weights that are stored quantised are read in the dtype that config.json names, or only
        those that no layout of `llama_jax.quantized` holds.

    Raises:
      CheckpointError: a file or tensor is missing, unknown, damaged or of the wrong shape; names it.
      UnsupportedModel: config.json or a dtype requires something unsupported, such as a way of quantising.
    """

    def __init__(self, path: Path, *, name: str | None = None, revision: str | None = None, dequantize: bool = True):
        self.path = path
        shards = weight_shards(path)
        hf = read_json(inside(path, CONFIG), hint=CORRECT)
        self.config = config_from_hf(hf)
        self._text = text_model(hf)
        self._scheme = scheme_from_hf(hf)
        label = self._scheme.label if self._scheme else None
        self.source = Source("huggingface", name or path.resolve().name, revision, licence(path), label)
        self._recipes: dict[str, Recipe] = {}
        self._weights: dict[str, Weight] = {}
        self._where: dict[str, tuple[WeightFile, str]] = {}
        self._files: list[WeightFile] = []
        self._cache_scales: list[str] = []
        self._decoded: list[str] = []
        self._rows: dict[str, int] = {}
        with closed_on_error(self.close):
            skipped = self._text.skipped_layers if self._text else frozenset()
            modules = {new: old for old, new in find_family(self.config.family).tensor_names.items()}
            self._open(shards, Names(self._text is not None, skipped, modules))
            self._find_weights()
            self._tie(certain=self._text is None or hf.get("tie_word_embeddings") is not None)
            self._plan()
            if not dequantize:
                self._keep()
        self._members = Members(self._read_members)

    def close(self) -> None:
        """Closes all files."""
        for file in self._files:
            file.close()

    @property
    def notes(self) -> Sequence[str]:
        """See `checkpoint.source.HasNotes`."""
        found = []
        if n := len(self._cache_scales):
            found.append(
                f"Left out: {n} scales of a quantised key/value cache ({some(self._cache_scales, 3)}); "
                "the cache is kept in the dtype of the computation"
            )
        if n := len(self._decoded):
            found.append(
                f"Decoded to {self.config.dtype}: {n} weights in {self.source.quantization}, a form that nothing here "
                f"computes with ({some(self._decoded, 3)})"
            )
        return found

    @property
    def generation_config(self) -> Mapping[str, Any]:
        file = self.path / GENERATION_CONFIG
        return read_generation_config(inside(self.path, GENERATION_CONFIG), hint=CORRECT) if file.exists() else {}

    @property
    def files(self) -> Mapping[str, bytes]:
        found = copied_files(self.path, inside)
        extra = self._text.extra_embeddings if self._text else 0
        check_vocabulary(found, self.config.vocab_size + extra, self.path)
        return found

    def dtype(self, spec: ParamSpec) -> np.dtype:
        return self._weights[self._recipe(spec).sources[0]].dtype if spec.scheme == PLAIN.name else np.dtype(spec.dtype)

    def provenance(self, spec: ParamSpec) -> list[SourceTensor]:
        return [tensor for source in self._recipe(spec).sources for tensor in self._weights[source].stored]

    def read(self, spec: ParamSpec) -> np.ndarray:
        if spec.scheme != PLAIN.name:
            return self._members.take(spec).reshape(spec.shape)
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
        """Returns whether the leaf is a tensor of the file as it is; see `checkpoint.source.RowSource`."""
        made = self._recipe(spec)
        plain = isinstance(self._weights[made.sources[0]], PlainWeight)
        return plain and len(made.sources) == 1 and made.part is None and not made.transposed

    def read_rows(self, spec: ParamSpec, start: int, out: np.ndarray) -> None:
        weight = self._weights[self._recipes[spec.name].sources[0]]
        assert isinstance(weight, PlainWeight)
        weight.read_into(out, row=start)

    def _recipe(self, spec: ParamSpec) -> Recipe:
        """The recipe for a leaf, or for the leaf that this is a member of."""
        return self._recipes[spec.name if spec.scheme == PLAIN.name else f"{spec.leaf}.weight"]

    def _keep(self) -> None:
        """Finds the weights that keep their own precision."""
        schemes = []
        for spec in param_specs(self.config):
            made = self._recipes[spec.name]
            weights = [self._weights[source] for source in made.sources]
            quantised = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
            if not quantised:
                continue
            found = {weight.kept_as for weight in quantised}
            kept = found.pop() if len(found) == 1 and len(quantised) == len(weights) else None
            # Groups of a stack that has to be turned around would run down its rows.
            if kept is None or (made.transposed and "_g" in kept):
                self._decoded.append(spec.leaf)
            else:
                schemes.append((spec.leaf, kept))
                self._rows[spec.leaf] = spec.shape[-2]
        self.config = self.config.replace(schemes=tuple(schemes))

    def _read_members(self, leaf: str) -> dict[str, np.ndarray]:
        made, rows = self._recipes[f"{leaf}.weight"], self._rows[leaf]
        weights = [weight for source in made.sources if isinstance(weight := self._weights[source], QuantizedWeight)]
        if len(made.shape) > 2:
            parts = [weights[0].members(expert, turned=made.transposed) for expert in range(made.shape[0])]
        else:
            parts = [weight.members() for weight in weights]
        own = slice((made.part or 0) * rows, ((made.part or 0) + 1) * rows)
        return {
            name: np.stack([part[name] if name == ORDER else part[name][own] for part in parts]) for name in parts[0]
        }

    def _read_experts(self, made: Recipe, out: np.ndarray) -> None:
        """Splits a stack of experts, one by one, so that no second copy of it is ever in memory."""
        weight, width = self._weights[made.sources[0]], out.shape[1]
        first = (made.part or 0) * width
        buffer = np.empty(made.shape[1:], out.dtype) if made.transposed else None
        for expert in range(out.shape[0]):
            if buffer is None:
                weight.read_into(out[expert], expert=expert, row=first)
            else:
                weight.read_into(buffer, expert=expert)
                out[expert] = buffer[:, first : first + width].T

    def _open(self, shards: Mapping[str, set[str]], names: Names) -> None:
        for shard, promised in shards.items():
            path = inside(self.path, shard)
            file = SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
            self._files.append(file)
            check_promised(path, promised, file.entries.keys(), shards)
            for name in file.entries:
                plain = names.plain(name)
                if plain is None:
                    continue
                if CACHE_SCALE.fullmatch(plain):
                    self._cache_scales.append(name)
                    continue
                if plain in self._where:
                    raise CheckpointError(
                        f"tensor {plain} stands both in {self._where[plain][0].path} and {file.path}", hint=AGAIN
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
        """Decides whether the embedding is also the output projection.

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
        refuse_adapted(self.path, self._weights.keys() - used)
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
