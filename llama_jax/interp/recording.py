"""Runs texts through a model and writes their activations to disk, for more of them than memory holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint import Progress
from llama_jax.checkpoint.format import Digest, digest
from llama_jax.config import LlamaConfig
from llama_jax.decode.buckets import batch_bucket, prompt_bucket
from llama_jax.disk import file_lock, lock_of, storage_errors
from llama_jax.errors import RequestError
from llama_jax.generation import encode_prompt
from llama_jax.generation.request import Prompt
from llama_jax.interp.dataset import DESCRIPTION, TEXT_ENDS, TOKEN_IDS, Activations, Description, opened
from llama_jax.kernels.dispatch import using
from llama_jax.model import Patch, forward
from llama_jax.model.activations import ON_DEMAND, matching_names
from llama_jax.model.adapters import ATTACHED
from llama_jax.model.loaded import Model
from llama_jax.params import Params
from llama_jax.receipts import params_digest
from llama_jax.sharding import on
from llama_jax.text.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16", "float16")
BATCH_TOKENS = 4096
"""Tokens of a batch by default, padding included; a batch's activations are in memory twice."""


def record_activations(
    model: Model,
    tokenizer: Tokenizer | None,
    texts: Iterable[Prompt],
    names: Sequence[str],
    folder: str | Path,
    *,
    dtype: str | None = None,
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    patch: Patch | None = None,
    progress: Progress | None = None,
) -> Activations:
    """Writes the activations of every token of some texts to a folder, batch by batch.

    Memory holds two batches, whatever the number of texts. A run that was stopped resumes: called again with the same
    arguments, it skips the texts that are written, and more texts behind them are added.

    Args:
      tokenizer: None for texts of token ids.
      texts: in a fixed order; an iterator is read as it is needed.
      names: activations or patterns of them (`activation_names`); not "attn_probs", which has no row for each token.
      dtype: to write, "float32", "bfloat16" or "float16"; the model's by default.
      max_length: longer texts are cut to that many tokens; by default they are an error if the model's context is
        exceeded.
      batch_tokens: tokens of a batch, padding included; one text may have more.
      patch: as for `forward`; a folder is tied to the patterns it changes, but not to its functions.
      progress: called after each batch with the tokens written, 0 (their number is not known) and "tokens".

    Raises:
      RequestError: an unknown name, dtype or length; a text is empty, too long or has a token id that is not in the
        vocabulary; the folder holds something else, or was made with other arguments, texts or another model.
      StorageError, DoesNotFit: the folder cannot be written.
    """
    folder, config = Path(folder), model.config
    every = tuple(name for found in matching_names(config, names, param="names").values() for name in found)
    if any(name.endswith(ON_DEMAND) for name in every):
        raise RequestError(
            f"{ON_DEMAND} has no row for each token", param="names", hint="use attention_maps, text by text"
        )
    if max_length is not None and max_length < 1:
        raise RequestError(f"max_length={max_length}", param="max_length", hint="at least 1; None cuts no text")
    kept = dtype or model.dtype.name
    if kept not in DTYPES:
        raise RequestError(
            f"activations cannot be written in {kept!r}", param="dtype", hint=f"one of {', '.join(DTYPES)}"
        )
    settings = {
        "model": model.name,
        "config": digest(repr(config).encode()),
        "compute_dtype": model.dtype.name,
        "max_length": max_length,
        "patched": list(patch.patterns) if patch else [],
    }
    if ATTACHED in model.params:  # the name and the configuration are those of the base
        # All that is trained of some is in copies of the base's own weights: whole ones, and those of routed experts.
        settings["adapter"] = params_digest(model.params[ATTACHED] or model.params)
    shapes = _shapes(model, every, patch)
    start = Description(settings, {name: list(shape) for name, shape in shapes.items()}, kept, digest=str(Digest()))
    encoded = _encoded(texts, tokenizer, config, max_length)
    with file_lock(lock_of(folder)):
        writer = _Writer.at(folder, start, encoded)
        run = partial(_captured, model.params, config=config, names=every, dtype=kept, patch=patch)
        with on(model.mesh), using(**model.kernels):
            under_way: tuple[Sequence[list[int]], Any] | None = None
            for batch in _batches(encoded, batch_tokens):
                ahead = batch, run(*_padded(batch))  # the device computes it while the one before is written
                if under_way is not None:
                    writer.add(*under_way, progress)
                under_way = ahead
            if under_way is not None:
                writer.add(*under_way, progress)
    return Activations(folder, writer.description)


def _encoded(
    texts: Iterable[Prompt], tokenizer: Tokenizer | None, config: LlamaConfig, max_length: int | None
) -> Iterator[list[int]]:
    limit = config.context_length
    for number, text in enumerate(texts):
        ids = encode_prompt(tokenizer, text)[:max_length]
        if len(ids) > limit:
            raise RequestError(
                f"text {number} has {len(ids)} tokens, the model's context {limit}",
                param="texts",
                hint="cut texts by max_length=, or split them",
            )
        if (bad := next((t for t in (min(ids), max(ids)) if not 0 <= t < config.vocab_size), None)) is not None:
            raise RequestError(
                f"text {number} holds token id {bad}; the vocabulary has {config.vocab_size}",
                param="texts",
                hint="encode it with this model's tokenizer",
            )
        yield ids


def _batches(texts: Iterator[list[int]], budget: int) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    for ids in texts:
        longest = max(len(ids), *map(len, batch)) if batch else len(ids)
        if batch and batch_bucket(len(batch) + 1) * prompt_bucket(longest) > budget:
            yield batch
            batch = []
        batch.append(ids)
    if batch:
        yield batch


def _padded(batch: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and positions, padded to the right."""
    shape = batch_bucket(len(batch)), prompt_bucket(max(map(len, batch)))
    tokens, positions = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    for row, ids in enumerate(batch):
        tokens[row, : len(ids)] = ids
        positions[row, : len(ids)] = np.arange(len(ids))
    return tokens, positions


@partial(jax.jit, static_argnames=("config", "names", "dtype"))
def _captured(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    *,
    config: LlamaConfig,
    names: tuple[str, ...],
    dtype: str,
    patch: Patch | None,
) -> dict[str, jax.Array]:
    _, _, seen = forward(params, config, tokens, positions, patch=patch, capture=names)
    return {name: x.astype(dtype) for name, x in seen.items()}


def _shapes(model: Model, names: tuple[str, ...], patch: Patch | None) -> dict[str, tuple[int, ...]]:
    """The shape of a token's activation, by name."""
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    run = partial(_captured, config=model.config, names=names, dtype="float32", patch=patch)
    with on(model.mesh):
        shapes = jax.eval_shape(run, model.params, one, one)
    return {name: shapes[name].shape[2:] for name in names}


@dataclass
class _Writer:
    """The folder of a run."""

    folder: Path
    description: Description
    digest: Digest
    arrays: dict[str, Any]

    @classmethod
    def at(cls, folder: Path, start: Description, texts: Iterator[list[int]]) -> _Writer:
        """Makes the folder, or continues one; texts that it holds are taken from the iterator."""
        seen = Digest()
        if (folder / DESCRIPTION).exists():
            found = Description.read(folder)
            for what in ("settings", "shapes", "dtype"):
                if (was := asdict(found)[what]) != (asked := asdict(start)[what]):
                    raise RequestError(
                        f"{folder} was begun with {what} {was}, now they are {asked}",
                        param=what,
                        hint="choose another folder, or remove this one",
                    )
            skipped = 0
            for ids in islice(texts, found.texts):
                seen.update(np.asarray(ids, np.int32).tobytes())
                skipped += 1
            if skipped < found.texts or str(seen) != found.digest:
                raise RequestError(
                    f"{folder} holds {found.texts} other texts than those given",
                    param="texts",
                    hint="give the same texts in the same order; new ones may follow them",
                )
            start = found
        else:
            if folder.exists() and any(folder.iterdir()):
                raise RequestError(
                    f"{folder} holds something else", param="folder", hint="choose a folder that is empty or new"
                )
            with storage_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
        shapes = {name: (tuple(shape), start.dtype) for name, shape in start.shapes.items()}
        shapes |= {TOKEN_IDS: ((), "int32"), TEXT_ENDS: ((), "int64")}
        start.write(folder)
        arrays = {
            name: opened(folder, name, *kind, create=not (folder / name / "zarr.json").exists())
            for name, kind in shapes.items()
        }
        return cls(folder, start, seen, arrays)

    def add(self, batch: Sequence[list[int]], activations: Any, progress: Progress | None) -> None:
        """Appends a batch's rows; they count once all of them are on the disk."""
        lengths = [len(ids) for ids in batch]
        texts, tokens = self.description.texts, self.description.tokens
        rows: dict[str, np.ndarray] = {
            TOKEN_IDS: np.concatenate([np.asarray(ids, np.int32) for ids in batch]),
            TEXT_ENDS: tokens + np.cumsum(lengths, dtype=np.int64),
        }
        for name, x in jax.device_get(activations).items():
            rows[name] = np.concatenate([x[row, :n] for row, n in enumerate(lengths)])
        with storage_errors(self.folder):
            writes = []
            for name, new in rows.items():
                first = texts if name == TEXT_ENDS else tokens
                size = [first + len(new), *new.shape[1:]]
                self.arrays[name] = grown = self.arrays[name].resize(exclusive_max=size).result()
                writes.append(grown[first:].write(new))
            for write in writes:
                write.result()
        for ids in batch:
            self.digest.update(np.asarray(ids, np.int32).tobytes())
        self.description = replace(
            self.description,
            texts=texts + len(batch),
            tokens=tokens + sum(lengths),
            digest=str(self.digest),
        )
        self.description.write(self.folder)
        if progress is not None:
            progress(self.description.tokens, 0, "tokens")
