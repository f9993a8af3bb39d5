"""Comparison of a checkpoint with another program: logits and greedy tokens, in float32.

The other program's numbers are in an npz file: `input_ids` and `attention_mask` [batch, seq], `logits`
[batch, seq, vocab], `greedy` [batch, n]. `compute` sees only the first two and the number n; `compare` reads the rest.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.adapters import load_adapter
from llama_jax.adapters.models import AdapterLike, with_adapter
from llama_jax.cache import DenseCache
from llama_jax.checkpoint import Progress, load_params
from llama_jax.config import LlamaConfig
from llama_jax.decode import loop
from llama_jax.disk import storage_errors
from llama_jax.errors import RequestError, VerificationError
from llama_jax.layout import check, param_sharding
from llama_jax.model import forward
from llama_jax.model.fuse import arrange
from llama_jax.model.loaded import Model
from llama_jax.model.quantization import dequantize_params
from llama_jax.params import Params
from llama_jax.plan import MeshRequest, resolve_mesh
from llama_jax.sampling import SamplingParams, make_sampler
from llama_jax.sharding import DeviceMesh, on, ways

TOLERANCE = 5e-5
"""Largest difference of a logit, as a share of the largest absolute logit."""
CHUNK = 512
"""Tokens per prefill call: bounds the logits on the device at a time."""
GREEDY_TO_SAVE = 16
"""Number of greedy tokens to save if the file requests none."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of the model.

    Attributes:
      tokens: int32 [batch, seq].
      mask: bool [batch, seq], False for padding.
      greedy: number of tokens to decode.
    """

    tokens: np.ndarray
    mask: np.ndarray
    greedy: int


@dataclass(frozen=True)
class Computed:
    """Outputs of the model.

    Attributes:
      logits: float32 [batch, seq, vocab], zero where the mask is False.
      greedy: int32 [batch, n], the most likely tokens after each row.
    """

    logits: np.ndarray
    greedy: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """Differences between computed and expected numbers.

    Attributes:
      max_abs_diff: largest difference of a logit where the mask is True; None if one of them is NaN or infinite, or if
        there are none to compare.
      max_rel_diff: the same as a share of the largest expected absolute logit.
      greedy_match: whether all tokens are equal; None if there are none to compare.
      reasons: one sentence per problem.
    """

    max_abs_diff: float | None
    max_rel_diff: float | None
    greedy_match: bool | None
    reasons: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.reasons


def read_inputs(path: str | Path) -> Inputs:
    """Reads `input_ids` and `attention_mask` of a file, and only the shape of `greedy`.

    Without a mask no token is padding; without `greedy` there is nothing to decode.

    Raises:
      RequestError: the file cannot be read, or holds no such arrays.
    """
    with _Npz(path) as file:
        tokens = file.array("input_ids")
        if tokens is None:
            raise _unusable(f"{path} has no input_ids")
        if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
            raise _unusable(
                f"{path}: input_ids is {tokens.dtype}{list(tokens.shape)}, integers [batch, seq] are needed"
            )
        mask = file.array("attention_mask")
        mask = np.ones(tokens.shape, bool) if mask is None else mask != 0
        if mask.shape != tokens.shape:
            raise _unusable(f"{path}: attention_mask has shape {list(mask.shape)}, input_ids {list(tokens.shape)}")
        if empty := [row for row in range(len(mask)) if not mask[row].any()]:
            raise _unusable(f"{path}: attention_mask hides all of row {empty[0]}", hint="leave the row out")
        greedy = file.shape("greedy")
    if greedy is not None and (len(greedy) != 2 or greedy[0] != len(tokens)):
        raise _unusable(f"{path}: greedy has shape {list(greedy)} for {len(tokens)} rows of input_ids")
    return Inputs(tokens.astype(np.int64), mask, greedy[1] if greedy else 0)


def load_float32(
    path: Path,
    config: LlamaConfig,
    mesh: MeshRequest = None,
    *,
    adapter: AdapterLike | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
) -> Model:
    """Loads a checkpoint with verified digests for `compute`: canonical, fully decoded to float32.

    Args:
      mesh, adapter, progress, notify: those of `load`; one adapter.

    Raises:
      RequestError, DoesNotFit: the mesh is unsuitable, or the model fits none.
    """
    decoded = config.replace(schemes=())
    opened = load_adapter(adapter, decoded) if isinstance(adapter, str | Path) else adapter
    devices = resolve_mesh(mesh, decoded, jnp.float32, notify)
    if devices is not None:
        check(decoded, devices)
    where = None if devices is None else param_sharding(config, devices)
    params = load_params(path, dtype="float32", sharding=where, verify=False, progress=progress)
    with on(devices):
        params, config = dequantize_params(params, config, jnp.float32, donate=True)
    params, config = arrange(params, config, devices, fuse=False, donate=True)
    model = Model(params, config, devices, name=str(path))
    return model if opened is None else with_adapter(model, opened)


def compute(params: Params, config: LlamaConfig, inputs: Inputs, mesh: DeviceMesh | None = None) -> Computed:
    """Runs the model: one pass over the tokens with a cache, then single steps with that cache.

    Args:
      params: parameter tree, in float32 for comparable numbers.
      mesh: the devices to use; None for one. The rows are padded to a multiple of "data".

    Raises:
      VerificationError: a token is outside the model's vocabulary.
    """
    batch = len(inputs.tokens)
    with on(mesh):
        # The first rows again: every row must have an unmasked token.
        rows = np.arange(-(-batch // ways("batch")) * ways("batch")) % batch
        computed = _compute(params, config, Inputs(inputs.tokens[rows], inputs.mask[rows], inputs.greedy))
    return Computed(computed.logits[:batch], computed.greedy[:batch])


def _compute(params: Params, config: LlamaConfig, inputs: Inputs) -> Computed:
    shown = inputs.tokens[inputs.mask]
    if shown.min() < 0 or shown.max() >= config.vocab_size:
        raise VerificationError(
            f"input_ids reach from {shown.min()} to {shown.max()}, the model's vocabulary has {config.vocab_size}",
            hint="the file belongs to another model",
        )
    batch, length = inputs.tokens.shape
    tokens = np.where(inputs.mask, inputs.tokens, 0).astype(np.int32)
    # Padding may be anywhere: a token's position counts only unmasked tokens.
    positions = np.where(inputs.mask, np.cumsum(inputs.mask, axis=1) - 1, -1).astype(np.int32)
    lengths = inputs.mask.sum(axis=1).astype(np.int32)

    cache = DenseCache.create(config, batch, length + max(inputs.greedy, 1), jnp.float32)
    logits = np.empty((batch, length, config.vocab_size), np.float32)
    for start in range(0, length, CHUNK):
        part = slice(start, start + CHUNK)
        chunk, cache = _prefill(params, cache, tokens[:, part], positions[:, part], lengths, config=config)
        logits[:, part] = jax.device_get(chunk)
    last = length - 1 - np.argmax(inputs.mask[:, ::-1], axis=1)
    after = logits[np.arange(batch), last]
    logits[~inputs.mask] = 0.0
    return Computed(logits, _greedy(params, config, cache, after, lengths, inputs.greedy))


@partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def _prefill(
    params: Params,
    cache: DenseCache,
    tokens: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    *,
    config: LlamaConfig,
) -> tuple[jax.Array, DenseCache]:
    return forward(params, config, tokens, positions, cache, rope_lengths=lengths)


def _greedy(
    params: Params, config: LlamaConfig, cache: DenseCache, logits: np.ndarray, lengths: np.ndarray, n: int
) -> np.ndarray:
    """The n most likely tokens after each row, by the decode step of `generate`; int32 [batch, n]."""
    batch = len(lengths)
    if n == 0:
        return np.empty((batch, 0), np.int32)
    wanted = SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True)
    profile, sampler = make_sampler([wanted] * batch, [[]] * batch, config.vocab_size)
    limits, adapter_ids = np.full((batch,), n, np.int32), np.zeros((batch,), np.int32)
    state, first = loop.begin(jnp.asarray(logits), cache, sampler, lengths, limits, adapter_ids, profile=profile)
    _, rest = loop.advance(params, state, np.int32(n), config=config, profile=profile, stride=n)
    return np.concatenate(jax.device_get((first.tokens, rest.tokens)), axis=1)[:, :n]


def compare(computed: Computed, inputs: Inputs, path: str | Path) -> Comparison:
    """Reads the expected logits and greedy tokens of a file and compares.

    Raises:
      RequestError: the file holds neither.
      VerificationError: the shapes of expected and computed arrays differ.
    """
    with _Npz(path) as file:
        logits, greedy = file.array("logits"), file.array("greedy")
    if logits is None and greedy is None:
        raise _unusable(f"{path} has neither logits nor greedy")
    for name, expected, found in (("logits", logits, computed.logits), ("greedy", greedy, computed.greedy)):
        if expected is not None and expected.shape != found.shape:
            raise VerificationError(
                f"{path}: {name} has shape {list(expected.shape)}, the model gives {list(found.shape)}",
                hint="the file belongs to another model",
            )
    reasons = []
    diff = scale = None
    if logits is not None:
        want = logits[inputs.mask].astype(np.float64)
        have = computed.logits[inputs.mask].astype(np.float64)
        for name, values in (("expected", want), ("computed", have)):
            if bad := int(np.count_nonzero(~np.isfinite(values))):
                reasons.append(f"{bad} of {values.size} {name} logits are NaN or infinite")
        if not reasons:
            diff, scale = float(np.abs(want - have).max()), float(np.abs(want).max())
            if not diff <= TOLERANCE * scale:
                reasons.append(f"logits differ by {diff:.3g}, at most {TOLERANCE * scale:.3g} is allowed")
    match = None
    if greedy is not None:
        differ = np.argwhere(greedy != computed.greedy)
        match = not len(differ)
        if not match:
            row, step = (int(i) for i in differ[0])
            reasons.append(
                f"{len(differ)} of {greedy.size} greedy tokens differ, the first in row {row} at step {step}: "
                f"{computed.greedy[row, step]} in place of {greedy[row, step]}"
            )
    relative = None if diff is None else diff / scale if scale else None if diff else 0.0
    return Comparison(diff, relative, match, tuple(reasons))


def save(path: str | Path, inputs: Inputs, computed: Computed) -> None:
    """Writes inputs, logits and greedy tokens as an npz file, for others to compare with.

    Raises:
      StorageError, DoesNotFit: it cannot be written.
    """
    path = Path(path)
    with storage_errors(path), path.open("wb") as file:
        np.savez(
            file,
            input_ids=inputs.tokens,
            attention_mask=inputs.mask.astype(np.int64),
            logits=computed.logits,
            greedy=computed.greedy,
        )


class _Npz:
    """An open npz file; arrays are read on demand, pickled objects never."""

    def __init__(self, path: str | Path):
        self._path = path

    def __enter__(self) -> _Npz:
        try:
            self._zip = zipfile.ZipFile(self._path)
        except (OSError, ValueError, zipfile.BadZipFile) as e:
            reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
            raise _unusable(f"cannot read {self._path}: {reason}") from e
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def array(self, name: str) -> np.ndarray | None:
        """The array, or None if the file has none with this name."""
        value = self._read(name, partial(np.lib.format.read_array, allow_pickle=False))
        if value is not None and value.dtype.kind not in "iufb":
            raise _unusable(f"{self._path}: {name} holds {value.dtype}")
        return value

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The array's shape, read only from its header."""
        return self._read(name, _read_shape)

    def _read[T](self, name: str, read: Callable[[IO[bytes]], T]) -> T | None:
        if f"{name}.npy" not in self._zip.namelist():
            return None
        try:
            with self._zip.open(f"{name}.npy") as member:
                return read(member)
        except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zipfile.LargeZipFile) as e:
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            raise _unusable(f"{self._path}: {name} cannot be read ({reason})") from e


def _read_shape(member: IO[bytes]) -> tuple[int, ...]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)[0]


def _unusable(
    message: str, hint: str = "the file has to be an npz with input_ids, attention_mask, logits and greedy"
) -> RequestError:
    return RequestError(message, param="expected", hint=hint)
