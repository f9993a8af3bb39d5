"""Reading Meta's own checkpoints: params.json, tokenizer.model, and consolidated.00.pth, consolidated.01.pth, ...

A model in several files was split for model parallelism: each holds a part of every matrix. How a matrix is split
follows from the layers in https://github.com/meta-llama/llama-models, models/llama3/model.py: `ColumnParallelLinear`
and `VocabParallelEmbedding` split the rows, `RowParallelLinear` and the embedding of Llama 1 and 2
(`ParallelEmbedding`) the columns. Every file has all norms in full.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoint.format import CORRECT, Source, read_json
from llama_jax.checkpoint.small_files import copied_files
from llama_jax.checkpoint.source import SourceTensor, check_names, check_vocabulary, some
from llama_jax.config import config_from_hf
from llama_jax.convert.folders import MISSING
from llama_jax.convert.gguf import half_rotation, rotated_heads
from llama_jax.convert.hf_files import inside
from llama_jax.convert.meta_config import NAMES, PARAMS, config_dict
from llama_jax.convert.meta_tokenizer import (
    MAX_BYTES,
    SPECIAL_TOKENS,
    is_rank_file,
    read_ranks,
    special_tokens,
    tokenizer_files,
)
from llama_jax.convert.safetensors_file import DTYPES
from llama_jax.convert.torch_file import TorchFile
from llama_jax.convert.weight_file import closed_on_error, same_tensor, source_tensor
from llama_jax.errors import CheckpointError, TokenizerError, UnsupportedModel
from llama_jax.params import ParamSpec, param_specs

TOKENIZER = "tokenizer.model"
_SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
_EMBED, _HEAD = "tok_embeddings.weight", "output.weight"

_ROWS, _COLUMNS, _WHOLE = 0, 1, None
# The part of a dotted name -> Meta's, and the dimension along which files hold parts of it.
_NAMES: Mapping[str, tuple[str, int | None]] = {
    "attn_norm": ("attention_norm", _WHOLE),
    "attn.q_proj": ("attention.wq", _ROWS),
    "attn.k_proj": ("attention.wk", _ROWS),
    "attn.v_proj": ("attention.wv", _ROWS),
    "attn.o_proj": ("attention.wo", _COLUMNS),
    "mlp_norm": ("ffn_norm", _WHOLE),
    "mlp.gate_proj": ("feed_forward.w1", _ROWS),
    "mlp.up_proj": ("feed_forward.w3", _ROWS),
    "mlp.down_proj": ("feed_forward.w2", _COLUMNS),
    "final_norm": ("norm", _WHOLE),
    "lm_head": ("output", _ROWS),
}
# Frequencies that old checkpoints carry although they follow from params.json.
_BUFFERS = re.compile(r"(layers\.\d+\.attention\.inner_attention\.)?rope\.freqs")
_BLOCK_BYTES = 16 << 20
"""Bytes read at a time from a matrix that is split along its columns."""


class MetaFolder:
    """An opened folder of Meta; see `checkpoint.source.ModelSource`.

    Raises:
      CheckpointError: a file or tensor is missing, unknown, damaged or of the wrong shape; names it.
      TokenizerError: tokenizer.model is missing, damaged, or of another model.
      UnsupportedModel: params.json or a dtype requires something unsupported.
    """

    def __init__(self, path: Path, *, name: str | None = None, revision: str | None = None):
        self.path = path
        self.source = Source("meta", name or path.resolve().name, revision)
        params = read_json(inside(path, PARAMS), hint=CORRECT)
        self._tokenizer = _read_tokenizer(path)
        self._files: list[TorchFile] = []
        with closed_on_error(self.close):
            for shard in _shards(path):
                self._files.append(TorchFile(inside(path, shard)))
            self._embed_dim, vocab_size = self._embedding(params)
            self._ranked = _ranked(self._tokenizer, vocab_size)
            self.config = config_from_hf(
                config_dict(
                    params,
                    vocab_size=vocab_size,
                    tied=self._tied(),
                    dtype=self._dtype(_EMBED).name,
                    bos=1 if self._ranked is None else len(self._ranked),
                    byte_level=self._ranked is not None,
                ),
                file=PARAMS,
                names=NAMES,
            )
            self._check()

    def close(self) -> None:
        """Closes all files."""
        for file in self._files:
            file.close()

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """The tokens at which Meta's own program stops: for Llama 3 those that end a turn too."""
        bos, stop = self.config.bos_token_id, list(self.config.eos_token_ids)
        if self._ranked is not None:
            names = special_tokens(llama31=self._llama31)
            stop += [len(self._ranked) + names.index(n) for n in ("<|eom_id|>", "<|eot_id|>") if n in names]
        return {"bos_token_id": bos, "eos_token_id": stop if len(stop) > 1 else stop[0]}

    @property
    def files(self) -> Mapping[str, bytes | str]:
        found: dict[str, bytes | str] = {**copied_files(self.path, inside), TOKENIZER: self._tokenizer}
        if self._ranked is not None:
            del found[TOKENIZER]
            context = self.config.max_position_embeddings
            found |= tokenizer_files(self._ranked, llama31=self._llama31, context=context)
        check_vocabulary(found, self.config.vocab_size, self.path)
        return found

    def dtype(self, spec: ParamSpec) -> np.dtype:
        return self._dtype(self._name(spec)[0])

    def provenance(self, spec: ParamSpec) -> Sequence[SourceTensor]:
        name, axis = self._name(spec)
        return [source_tensor(file, name) for file in (self._files[:1] if axis is _WHOLE else self._files)]

    def read(self, spec: ParamSpec) -> np.ndarray:
        name, axis = self._name(spec)
        out = np.empty(spec.shape, self.dtype(spec))
        if axis is _WHOLE:
            self._files[0].read_into(name, out)
        else:
            for file, part in zip(self._files, np.split(out, len(self._files), axis), strict=True):
                _read_part(file, name, part)
        heads = rotated_heads(spec.leaf, self.config)
        return out if heads is None else half_rotation(out, heads)

    @property
    def _llama31(self) -> bool:
        return self.config.rope.kind == "llama3"

    def _dtype(self, name: str) -> np.dtype:
        dtype = self._files[0].entries[name].dtype
        if dtype not in DTYPES:
            raise UnsupportedModel(
                f"{self._files[0].path}: tensor {name} has dtype {dtype}", hint=f"supported: {', '.join(DTYPES)}"
            )
        return DTYPES[dtype]

    def _name(self, spec: ParamSpec) -> tuple[str, int | None]:
        """Meta's name of a leaf, and the dimension along which the files hold parts of it."""
        if spec.name == "embed.weight":
            return _EMBED, self._embed_dim
        match = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", spec.name)
        assert match is not None
        name, axis = _NAMES[match[2]]
        return f"{match[1] or ''}{name}.weight", axis

    def _embedding(self, params: Mapping[str, Any]) -> tuple[int, int]:
        """The dimension along which the files hold parts of the embedding, and the size of the vocabulary.

        Llama 1 and 2 cut its columns, Llama 3 its rows; the shape says which.
        """
        file, n = self._files[0], len(self._files)
        entry = file.entries.get(_EMBED)
        if entry is None:
            raise CheckpointError(f"{file.path} lacks tensor {_EMBED}", hint=_MATCH)
        dim = params.get("dim")
        if len(entry.shape) == 2 and entry.shape[1] == dim:
            return _ROWS, n * entry.shape[0]
        if len(entry.shape) == 2 and entry.shape[1] * n == dim:
            return _COLUMNS, entry.shape[0]
        raise CheckpointError(
            f"{file.path}: tensor {_EMBED} has shape {list(entry.shape)}, one of {n}, {PARAMS} says dim={dim!r:.80}",
            hint=_MATCH,
        )

    def _tied(self) -> bool:
        """Whether the output projection is the embedding: left out, the same place in the file, or equal to it."""
        return all(
            _HEAD not in file.entries or same_tensor(file, _HEAD, file, _EMBED)
            for file in self._files
            if _EMBED in file.entries
        )

    def _check(self) -> None:
        """Checks that no tensor is missing, unknown, or of the wrong shape or dtype."""
        expected = {self._name(spec): spec.shape for spec in param_specs(self.config)}
        names = {name for name, _ in expected}
        for file in self._files:
            found = {n for n in file.entries if n in names or not (n == _HEAD or _BUFFERS.fullmatch(n))}
            check_names(file.path, found, names, hint=_MATCH, asks=PARAMS)
            for (name, axis), shape in expected.items():
                parts = [len(self._files) if i == axis else 1 for i in range(len(shape))]
                entry = file.entries[name]
                if tuple(n * k for n, k in zip(entry.shape, parts, strict=False)) != shape or entry.shape[len(shape) :]:
                    raise CheckpointError(
                        f"{file.path}: tensor {name} has shape {list(entry.shape)}, {PARAMS} asks for {list(shape)} "
                        f"in {len(self._files)} files",
                        hint=_MATCH,
                    )
                if DTYPES.get(entry.dtype) != self._dtype(name):
                    raise CheckpointError(
                        f"{file.path}: tensor {name} has dtype {entry.dtype}, "
                        f"in {self._files[0].path.name} {self._files[0].entries[name].dtype}",
                        hint=_MATCH,
                    )


_MATCH = f"{PARAMS} and the weights do not belong together, or a file is missing or damaged"


def is_meta(path: Path) -> bool:
    """Returns whether a folder looks like one of Meta's checkpoints."""
    return (path / PARAMS).is_file() and not (path / "config.json").is_file()


def _read_part(file: TorchFile, name: str, out: np.ndarray) -> None:
    """Reads the part of a tensor that a file holds into its place, which need not be contiguous."""
    if out.flags.c_contiguous:
        file.read_into(name, out)
        return
    row = out.shape[1] * out.itemsize
    step = max(1, _BLOCK_BYTES // row)
    for start in range(0, len(out), step):
        block = np.empty(out[start : start + step].shape, out.dtype)
        file.read_into(name, block, start * row)
        out[start : start + step] = block


def _shards(path: Path) -> list[str]:
    """The weight files in their order."""
    found = sorted(p.name for p in path.iterdir() if _SHARD.fullmatch(p.name))
    if not found:
        others = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".pth", ".pt"))
        raise CheckpointError(
            f"{path} has {PARAMS}, but no consolidated.00.pth" + (f"; it holds {some(others)}" if others else ""),
            hint="the folder is incomplete, or of another maker's format; use the model's Hugging Face weights",
        )
    for i, name in enumerate(found):
        if name != f"consolidated.{i:02}.pth":
            raise CheckpointError(f"{path / f'consolidated.{i:02}.pth'} is missing", hint=MISSING)
    return found


def _read_tokenizer(path: Path) -> bytes:
    """tokenizer.model of the folder or, as Meta's download script lays them out, of the one above it."""
    if (path / TOKENIZER).exists():
        file = inside(path, TOKENIZER)
    else:
        file = path.resolve().parent / TOKENIZER
        if not file.is_file():
            raise TokenizerError(
                f"{path} has no {TOKENIZER}, and neither has the folder above", hint=f"copy {TOKENIZER} there"
            )
    try:
        if file.stat().st_size > MAX_BYTES:
            raise TokenizerError(f"{file} has {file.stat().st_size:,} bytes", hint="this is not a tokenizer of Llama")
        return file.read_bytes()
    except OSError as e:
        raise TokenizerError(f"cannot read {file}: {e.strerror}", hint="check its permissions") from e


def _ranked(tokenizer: bytes, vocab_size: int) -> list[bytes] | None:
    """The tokens of Llama 3's tokenizer.model; None if the file is SentencePiece's."""
    if not is_rank_file(tokenizer):
        return None
    ranked = read_ranks(tokenizer, name=TOKENIZER)
    if len(ranked) + SPECIAL_TOKENS > vocab_size:
        raise TokenizerError(
            f"{TOKENIZER} has {len(ranked)} tokens and {SPECIAL_TOKENS} control tokens, the model {vocab_size}",
            hint="the files of two models may be mixed; get them again",
        )
    return ranked
