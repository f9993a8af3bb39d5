"""Reading GGUF files as models: Llama, Mistral, Mixtral, SmolLM2 (all "llama"), Llama 4, Qwen2, Qwen3 and SmolLM3."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoint.format import Source
from llama_jax.checkpoint.source import SourceTensor, check_names, check_vocabulary
from llama_jax.config import LlamaConfig, config_from_hf
from llama_jax.convert.gguf_config import METADATA, PERMUTED, ROPE_FACTORS, config_dict, key_names
from llama_jax.convert.gguf_layouts import layout_of, members
from llama_jax.convert.gguf_parts import GgufParts
from llama_jax.convert.members import Members
from llama_jax.convert.weight_file import closed_on_error
from llama_jax.errors import CheckpointError
from llama_jax.params import ParamSpec, param_specs
from llama_jax.schemes import PLAIN


class GgufModel:
    """An opened GGUF file, or several; see `checkpoint.source.ModelSource`.

    Args:
      dequantize: whether all quantised tensors become float32, or only those that no layout of `llama_jax.quantized`
        holds.

    Raises:
      CheckpointError: the file is damaged, or a tensor is missing, unknown or of the wrong shape; names it.
      UnsupportedModel: an architecture, key or tensor type that is not supported; names it.
    """

    def __init__(self, path: Path, *, name: str | None = None, revision: str | None = None, dequantize: bool = True):
        self._file = GgufParts(path)
        self.path = path = self._file.path
        with closed_on_error(self.close):
            metadata, tensors = self._file.metadata, self._file.tensors
            factors = self._file.read(ROPE_FACTORS) if ROPE_FACTORS in tensors else None
            keys = _config_dict(path, metadata, tensors, factors)
            self.config = config_from_hf(keys, file=METADATA, names=key_names(metadata))
            self._recipes = {spec.name: _tensors_of(spec, tensors) for spec in param_specs(self.config)}
            self._check()
            if not dequantize:
                self.config = self.config.replace(schemes=self._schemes())
        self._members = Members(self._read_members)
        licence = metadata.get("general.license")
        licence = licence if isinstance(licence, str) else None
        self.source = Source("gguf", name or path.name, revision, licence, self._file.label())
        self._permuted = metadata["general.architecture"] in PERMUTED

    def close(self) -> None:
        """Closes all files."""
        self._file.close()

    @property
    def generation_config(self) -> Mapping[str, Any]:
        eos = list(self.config.eos_token_ids)
        ids = {
            "bos_token_id": self.config.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else eos,
            "pad_token_id": self.config.pad_token_id,
        }
        return {key: value for key, value in ids.items() if value not in (None, [])}

    @property
    def files(self) -> Mapping[str, bytes | str]:
        from llama_jax.convert.gguf_tokenizer import tokenizer_files

        found = tokenizer_files(self._file.metadata)
        check_vocabulary(found, self.config.vocab_size, self.path)
        return found

    def dtype(self, spec: ParamSpec) -> np.dtype:
        return self._file.dtype(self._tensors(spec)[0]) if spec.scheme == PLAIN.name else np.dtype(spec.dtype)

    def provenance(self, spec: ParamSpec) -> list[SourceTensor]:
        return [self._file.stored(name) for name in self._tensors(spec)]

    def read(self, spec: ParamSpec) -> np.ndarray:
        if spec.scheme != PLAIN.name:
            return self._members.take(spec).reshape(spec.shape)
        names = self._recipes[spec.name]
        array = np.empty(spec.shape, self.dtype(spec))
        for name, part in zip(names, array if len(names) > 1 else array[None], strict=True):
            self._file.read_into(name, part)
        return self._in_order(spec.leaf, array)

    def _tensors(self, spec: ParamSpec) -> tuple[str, ...]:
        """The tensors that hold a leaf, or a member of one."""
        return self._recipes[spec.name if spec.scheme == PLAIN.name else f"{spec.leaf}.weight"]

    def _schemes(self) -> tuple[tuple[str, str], ...]:
        """The leaves that keep their precision, and their layouts."""
        found = []
        for spec in param_specs(self.config):
            kinds = {self._file.tensors[name].kind for name in self._recipes[spec.name]}
            layout = layout_of(kinds.pop()) if len(kinds) == 1 and len(spec.shape) > 1 else None
            if layout is not None:
                found.append((spec.leaf, layout.name))
        return tuple(found)

    def _read_members(self, leaf: str) -> dict[str, np.ndarray]:
        names = self._recipes[f"{leaf}.weight"]
        parts = [members(self._file.read_raw(name), self._file.tensors[name].kind) for name in names]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {name: self._in_order(leaf, member) for name, member in joined.items()}

    def _in_order(self, leaf: str, array: np.ndarray) -> np.ndarray:
        """The rows of a leaf, in the order in which the model rotates them."""
        heads = rotated_heads(leaf, self.config) if self._permuted else None
        return array if heads is None else half_rotation(array, heads)

    def _check(self) -> None:
        shapes = {
            name: spec.shape if len(self._recipes[spec.name]) == 1 else spec.shape[1:]
            for spec in param_specs(self.config)
            for name in self._recipes[spec.name]
        }
        tensors = self._file.tensors
        found = {name for name in tensors if name in shapes or not _UNUSED.fullmatch(name)}
        check_names(self.path, found, shapes, hint=_HINT, asks="the metadata")
        for name, shape in shapes.items():
            if tensors[name].shape != shape:
                raise CheckpointError(
                    f"{self.path}: tensor {name} has shape {list(tensors[name].shape)}, "
                    f"the metadata asks for {list(shape)}",
                    hint=_HINT,
                )
        for names in self._recipes.values():
            if len({self._file.dtype(name) for name in names}) > 1:
                raise CheckpointError(f"{self.path}: {names[0]} and its siblings differ in type", hint=_HINT)
        self._file.check_decodable()


# Read for the config, or not at all: llama.cpp computes rotations itself.
_UNUSED = re.compile(rf"{re.escape(ROPE_FACTORS)}|blk\.\d+\.attn_rot_embd\.weight")


def _tensors_of(spec: ParamSpec, names: Container[str]) -> tuple[str, ...]:
    """The tensor of a leaf; or those of its experts, which the first files of Mixtral hold one by one."""
    if spec.gguf not in names and "_exps." in spec.gguf:
        single = tuple(spec.gguf.replace("_exps.", f".{e}.") for e in range(spec.shape[0]))
        if single[0] in names:
            return single
    return (spec.gguf,)


def _config_dict(path: Path, *parts: Any) -> dict[str, Any]:
    try:
        return config_dict(*parts)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as e:
        # A key whose value has another type than llama.cpp gives it.
        raise CheckpointError(f"{path}: the metadata is malformed ({type(e).__name__}: {e})", hint=_HINT) from e


_HINT = "the file is damaged, or the model has parts that are not supported; try its safetensors weights"


def rotated_heads(leaf: str, config: LlamaConfig) -> int | None:
    """The number of heads stacked in a projection whose output is rotated; None for other leaves."""
    if leaf.endswith(".attn.q_proj"):
        return config.num_heads
    return config.num_kv_heads if leaf.endswith(".attn.k_proj") else None


def half_rotation(array: np.ndarray, heads: int) -> np.ndarray:
    """Permutes the rows of a query or key projection to the order in which rope rotates halves.

    llama.cpp stores them for interleaved rope: row 2i of a head is our row i, row 2i + 1 is our row head_dim / 2 + i
    (`LlamaModel.permute` in its convert_hf_to_gguf.py; `_reverse_permute_weights` in transformers).

    Args:
      array: [heads * head_dim, ...], a weight or a bias.
      heads: how many heads stand one below the other.
    """
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


def pair_rotation(array: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `half_rotation`."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
