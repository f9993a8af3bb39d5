"""Finding the quantised weights of a checkpoint, and reading them as floats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.source import SourceTensor
from llama_jax.checkpoint.wrong_file import AGAIN
from llama_jax.convert.quantized.codes import Codes
from llama_jax.convert.quantized.members import members
from llama_jax.convert.quantized.scheme import DAMAGED, SAME, Bundle, Part, Scheme
from llama_jax.convert.weight_file import WeightFile, source_tensor
from llama_jax.errors import CheckpointError
from llama_jax.quantized import Layout
from llama_jax.quantized.layout import stored_name


class QuantizedWeight:
    """A weight that is stored quantised; see `convert.hf_weights.Weight`.

    Attributes:
      path: the file that holds it (one of them).
      name: what it would be called if it were not quantised.
      dtype: what it is dequantised to.
    """

    def __init__(self, scheme: Scheme, bundle: Bundle, dtype: np.dtype):
        self.path: Path = bundle.path
        self.name = bundle.weight
        self.dtype = dtype
        self._scheme = scheme
        self._bundle = bundle
        self._shape: tuple[int, ...] = ()
        self._parts: Mapping[str, Part] = {}

    @property
    def stored(self) -> Sequence[SourceTensor]:
        return [source_tensor(*stored) for stored in self._bundle.tensors.values()]

    def check(self, shape: tuple[int, ...]) -> None:
        """Checks all its tensors against the shape that the weight must have.

        Raises:
          CheckpointError: a tensor is missing, unknown, or of the wrong dtype or shape; names it.
          UnsupportedModel: a parameter of this tensor that is not supported.
        """
        module = self.name.removesuffix(".weight")
        if self._scheme.ignores(module):
            raise CheckpointError(
                f"{self.path}: {module} is quantised, but config.json lists it as not quantised", hint=DAMAGED
            )
        if len(shape) < 2:
            raise CheckpointError(f"{self.path}: {self.name} is quantised, but is not a matrix", hint=DAMAGED)
        self._shape, self._parts = shape, self._scheme.parts(self._bundle, shape)
        self._bundle.check(self._parts)

    def read_into(self, out: np.ndarray, *, expert: int | None = None, row: int = 0) -> None:
        """Fills `out` with rows of the matrix (that of `expert`, where experts are stacked), from `row` on.

        Raises:
          CheckpointError: a file ends too early, a scale is 0 or not finite, or an index is out of range.
        """
        self._codes(expert).dequantize_into(out, row)

    @property
    def kept_as(self) -> str | None:
        """The name (`quantized.layout.stored_name`) of what holds its codes as they are, after `check`; None if it has
        to be decoded."""
        layout = self._layout()
        return None if layout is None else stored_name(layout, ordered=self._scheme.order(self._bundle) is not None)

    def members(self, expert: int | None = None, *, turned: bool = False) -> dict[str, np.ndarray]:
        """Its members as `kept_as` names them, or those of one expert of a stack; raises as `read_into` does.

        Args:
          turned: whether it is stored [in, out].
        """
        layout, codes = self._layout(), self._codes(expert)
        assert layout is not None
        return members(codes.turned() if turned else codes, layout, self._scheme.order(self._bundle))

    def _layout(self) -> Layout | None:
        return self._scheme.layout(self._bundle, self._shape)

    def _codes(self, expert: int | None) -> Codes:
        tensors = {part: self._bundle.read(part, expert) for part in self._bundle.tensors}
        for part, array in tensors.items():
            self._check_scale(part, array)
        rows, cols = self._shape[-2:]
        return self._scheme.codes(self._bundle, tensors, (rows, cols))

    def _check_scale(self, part: str, array: np.ndarray) -> None:
        wanted = self._parts[part]
        if not wanted.scale:
            return
        values = array.astype(np.float32)
        bad = ~np.isfinite(values) | (values == 0 if wanted.nonzero else False)
        if count := int(np.count_nonzero(bad)):
            what = "0, NaN or infinite" if wanted.nonzero else "NaN or infinite"
            raise CheckpointError(
                f"{self._bundle.where(part)} holds {count} scales that are {what} (of {values.size})",
                hint=AGAIN,
            )


def take_quantized(
    scheme: Scheme, tensors: dict[str, tuple[WeightFile, str]], dtype: np.dtype
) -> dict[str, QuantizedWeight]:
    """Takes the tensors of quantised weights out of those of a checkpoint.

    Args:
      scheme: of the checkpoint.
      tensors: name to the file that holds it and its name there; changed.
      dtype: what the weights are to be dequantised to.

    Returns:
      The weights, by the names that they would have if they were not quantised.
    """
    bundles: dict[str, Bundle] = {}
    for name in list(tensors):
        named = scheme.part(name)
        if named is None:
            continue
        stored = tensors.pop(name)
        if named.weight is not None and named.part is not None:
            bundles.setdefault(named.weight, Bundle(named.weight)).tensors[named.part] = stored
    for weight, bundle in bundles.items():
        if weight in tensors:
            bundle.tensors[SAME] = tensors.pop(weight)
    return {weight: QuantizedWeight(scheme, bundle, dtype) for weight, bundle in bundles.items()}
