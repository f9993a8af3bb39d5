"""Sources that quantise or dequantise weights while they are read, leaf by leaf."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.source import HasNotes, ModelSource, SourceTensor, provenance
from llama_jax.convert.casting import row_blocks
from llama_jax.convert.members import Members
from llama_jax.params import ParamSpec, canonical_specs, stored_as
from llama_jax.quantized import layout_named
from llama_jax.quantized.methods import encoder
from llama_jax.recipe import NEAREST
from llama_jax.schemes import PLAIN, scheme_named
from llama_jax.sharding import ONE_DEVICE, RowSplit


class Wrapped:
    """A wrapper of a source that returns its weights in another form."""

    def __init__(self, source: ModelSource):
        self._inner = source
        self._weights = {spec.leaf: spec for spec in canonical_specs(source.config) if len(spec.shape) > 1}
        self.path: Path = source.path
        self.source = source.source

    @property
    def generation_config(self) -> Mapping[str, Any]:
        return self._inner.generation_config

    @property
    def files(self) -> Mapping[str, bytes | str]:
        return self._inner.files

    @property
    def notes(self) -> Sequence[str]:
        return self._inner.notes if isinstance(self._inner, HasNotes) else ()

    def close(self) -> None:
        self._inner.close()


class QuantizedSource(Wrapped):
    """A source with its weights quantised by a method that needs no data; see `checkpoint.source.ModelSource`.

    A leaf is encoded by blocks of its rows, so that the largest leaf bounds the memory that this takes, in whatever way
    it is stored.

    Args:
      source: with plain weights.
      schemes: pairs of a leaf and the layout that it gets, as `recipe.schemes` gives them.
      method: a key of `quantized.methods.METHODS`.
      devices: those that share the rows of a block; the result is the same on any number of them.

    Attributes:
      errors: of the leaves read so far, the root of the mean square of (weight - original), over that of the original.
    """

    def __init__(
        self,
        source: ModelSource,
        schemes: tuple[tuple[str, str], ...],
        method: str = NEAREST,
        devices: RowSplit = ONE_DEVICE,
    ):
        super().__init__(source)
        self.config = source.config.replace(schemes=schemes)
        self.errors: dict[str, float] = {}
        self._schemes = dict(self.config.schemes)
        self._method, self._devices = method, devices
        self._members = Members(self._encoded)
        self._one = threading.Lock()

    def dtype(self, spec: ParamSpec) -> np.dtype:
        return self._inner.dtype(spec) if spec.scheme == PLAIN.name else jnp.dtype(spec.dtype)

    def read(self, spec: ParamSpec) -> np.ndarray:
        return self._inner.read(spec) if spec.scheme == PLAIN.name else self._members.take(spec)

    def provenance(self, spec: ParamSpec) -> Sequence[SourceTensor]:
        return provenance(self._inner, spec if spec.scheme == PLAIN.name else self._weights[spec.leaf])

    def _encoded(self, leaf: str) -> dict[str, np.ndarray]:
        # One leaf at a time, however many threads read: its floats take more memory than its members.
        with self._one:
            return self._encode(leaf)

    def _encode(self, leaf: str) -> dict[str, np.ndarray]:
        spec, scheme = self._weights[leaf], scheme_named(self._schemes[leaf])
        layout = layout_named(scheme.name)
        encode = scheme.encode if layout is None else encoder(self._method, layout)
        weight = np.ascontiguousarray(self._inner.read(spec))
        found = {
            name: np.empty(
                (spec.size // spec.shape[-1], *member.shape(spec.shape)[len(spec.shape) - 1 :]), member.dtype
            )
            for name, member in scheme.members.items()
        }
        wrong = size = 0.0
        for first, rows in row_blocks(weight, self._devices.ways):
            block = self._devices.split(rows)
            members = {name: member[: len(rows)] for name, member in encode(block).items()}
            for name, member in members.items():
                found[name][first : first + len(rows)] = np.asarray(member)
            block_wrong, block_size = _squares(block[: len(rows)], scheme.decode(members, jnp.float32))
            wrong, size = wrong + float(block_wrong), size + float(block_size)
        self.errors[leaf] = (wrong / size) ** 0.5 if size else 0.0
        return {name: x.reshape(scheme.members[name].shape(spec.shape)) for name, x in found.items()}


@jax.jit
def _squares(weight: jax.Array, stored: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of squares: of the difference, and of the weight."""
    weight = weight.astype(jnp.float32)
    return jnp.sum(jnp.square(weight - stored)), jnp.sum(jnp.square(weight))


class DequantizedSource(Wrapped):
    """A source with every weight plain, as they are decoded from what it stores; see `checkpoint.source.ModelSource`.

    Args:
      source: of which some weights are stored by schemes.
      dtype: numpy name of what they are decoded to.
    """

    def __init__(self, source: ModelSource, dtype: str):
        super().__init__(source)
        self.config = source.config.replace(schemes=())
        self._dtype = jnp.dtype(dtype)
        self._schemes = dict(source.config.schemes)

    def dtype(self, spec: ParamSpec) -> np.dtype:
        return self._dtype if self._stored(spec) else self._inner.dtype(spec)

    def read(self, spec: ParamSpec) -> np.ndarray:
        members = self._stored(spec)
        if not members:
            return self._inner.read(spec)
        scheme, out = scheme_named(self._schemes[spec.leaf]), np.empty(spec.shape, self._dtype)
        read = {name: self._inner.read(member) for name, member in members.items()}
        if layout_named(scheme.name) is None:  # of which nothing says that rows can be decoded by themselves
            out[...] = np.asarray(scheme.decode(read, self._dtype))
            return out
        by_row = {name: x.reshape(-1, *x.shape[len(spec.shape) - 1 :]) for name, x in read.items()}
        for first, rows in row_blocks(out):
            part = {name: x[first : first + len(rows)] for name, x in by_row.items()}
            rows[...] = np.asarray(scheme.decode(part, self._dtype))
        return out

    def provenance(self, spec: ParamSpec) -> Sequence[SourceTensor]:
        return provenance(self._inner, next(iter(self._stored(spec).values()), spec))

    def _stored(self, spec: ParamSpec) -> dict[str, ParamSpec]:
        """The members that a weight is stored as, by name; none for a plain one."""
        stored = stored_as(spec, self._schemes)
        return {member.path[-1]: member for member in stored if member.scheme != PLAIN.name}
