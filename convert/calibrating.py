"""Sources that quantise weights with a calibration text, layer by layer, while they are read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from llama_jax.checkpoint.source import ModelSource, SourceTensor, provenance
from llama_jax.convert.casting import cast
from llama_jax.convert.quantizing import QuantizedSource, Wrapped
from llama_jax.errors import RequestError
from llama_jax.model.calibration import Hidden, advanced, check_calibration, embedded, quantised_layer
from llama_jax.params import Params, ParamSpec, canonical_specs, flatten, param_specs, unflatten
from llama_jax.quantized.methods import METHODS
from llama_jax.recipe import Recipe, schemes
from llama_jax.schemes import PLAIN
from llama_jax.sharding import ONE_DEVICE, RowSplit
from llama_jax.text.tokenizer import tokenizer_from_files

WINDOW, WINDOWS = 512, 64
"""Tokens of a row of the calibration text, and the most rows that are taken, from its beginning: a method's error
hardly falls with more, and their hidden states are kept on the host."""

Written = Callable[[str], np.ndarray | None]
"""Returns a tensor that an earlier conversion has written; None if it has not."""


def rows_of_text(source: ModelSource, text: str) -> np.ndarray:
    """A text in the source's own tokens: int32 [rows, WINDOW].

    Raises:
      RequestError: it does not fill a row.
    """
    tokenizer = tokenizer_from_files(source.files, source.path).for_model(source.config.vocab_size)
    tokens = np.asarray(tokenizer.encode(text, parse_special=False), np.int32)
    rows = min(len(tokens) // WINDOW, WINDOWS)
    if not rows:
        raise RequestError(
            f"the calibration text has {len(tokens)} tokens",
            param="calibration",
            hint=f"give at least {WINDOW}; some ten thousand (50 KB of prose) are better",
        )
    return tokens[: rows * WINDOW].reshape(rows, WINDOW)


class CalibratedSource(Wrapped):
    """A source with its weights quantised by a calibrated method; see `checkpoint.source.InOrder`.

    Memory holds one layer in float32, and the text's hidden states before it. Embedding and head are rounded to the
    nearest.

    Args:
      source: with plain weights.
      recipe: what becomes of which leaf, and the method.
      tokens: int32 [rows, length], of the text.
      dtype: in which leaves that are not quantised are stored, so that the layers behind see them so.
      devices: those that share the rows of the text, and of each weight.

    Attributes:
      errors: of the leaves of the layers quantised so far, the root of the mean square by which their outputs differ,
        over that of the outputs; of embedding and head, that of their weights.

    Raises:
      RequestError: see `recipe.schemes` and `model.calibration.check_calibration`.
    """

    def __init__(
        self,
        source: ModelSource,
        recipe: Recipe,
        tokens: np.ndarray,
        dtype: np.dtype,
        devices: RowSplit = ONE_DEVICE,
    ):
        super().__init__(source)
        self.config = source.config.replace(schemes=schemes(source.config, recipe))
        self._method = METHODS[recipe.method]
        check_calibration(self.config, tokens)
        self._tokens, self._dtype, self._devices = tokens, dtype, devices
        ends = tuple(pair for pair in self.config.schemes if not pair[0].startswith("layers."))
        self._ends = QuantizedSource(source, ends, devices=devices)
        self.errors = self._ends.errors
        self._written: Written = lambda name: None
        self._one = threading.Lock()
        self._index, self._layer = 0, dict[str, np.ndarray]()
        self._hidden: Hidden = ()

    def resume(self, written: Written) -> None:
        """Reuses the layers that were written before, as long as they are complete."""
        self._written = written

    def dtype(self, spec: ParamSpec) -> np.dtype:
        return self._dtype if spec.scheme == PLAIN.name else np.dtype(spec.dtype)

    def read(self, spec: ParamSpec) -> np.ndarray:
        with self._one:
            if spec.path[0] != "layers":
                return self._end(spec)
            self._go_to(int(spec.path[1]))
            return self._layer[spec.name]

    def provenance(self, spec: ParamSpec) -> Sequence[SourceTensor]:
        return provenance(self._inner, spec if spec.scheme == PLAIN.name else self._weights[spec.leaf])

    def _end(self, spec: ParamSpec) -> np.ndarray:
        found = self._ends.read(spec)
        return found if spec.scheme != PLAIN.name else self._cast(spec.name, found)

    def _cast(self, name: str, array: np.ndarray) -> np.ndarray:
        return cast(name, np.ascontiguousarray(array), self._dtype, self.path)

    def _go_to(self, index: int) -> None:
        """Prepares a layer, after computing all layers before it."""
        if index < self._index:
            raise ValueError(f"layer {index} was asked for behind layer {self._index}")
        if not self._layer:
            embed = {s.path[-1]: self._end(s) for s in param_specs(self.config) if s.leaf == "embed"}
            self._hidden = embedded(embed, self._tokens, self._devices)
            self._layer = self._made()
        while self._index < index:
            self._hidden = advanced(self._tree(), self.config, self._index, self._hidden, self._devices)
            self._index += 1
            self._layer = self._made()

    def _made(self) -> dict[str, np.ndarray]:
        """The members of the current layer, as they are stored: from an earlier conversion, or quantised now."""
        prefix = f"layers.{self._index}."
        specs = [spec for spec in param_specs(self.config) if spec.name.startswith(prefix)]
        found = {spec.name: self._written(spec.name) for spec in specs}
        if all(array is not None for array in found.values()):
            return {name: array for name, array in found.items() if array is not None}
        plain = [spec for spec in canonical_specs(self.config) if spec.name.startswith(prefix)]
        layer = unflatten({spec.name.removeprefix(prefix): self._inner.read(spec) for spec in plain})
        made, errors = quantised_layer(layer, self.config, self._index, self._hidden, self._method, self._devices)
        self.errors.update(errors)
        arrays = {f"{prefix}{name}": np.asarray(array) for name, array in flatten(made).items()}
        return {s.name: arrays[s.name] if s.scheme != PLAIN.name else self._cast(s.name, arrays[s.name]) for s in specs}

    def _tree(self) -> Params:
        prefix = f"layers.{self._index}."
        return unflatten({name.removeprefix(prefix): array for name, array in self._layer.items()})
