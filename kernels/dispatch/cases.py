"""Sets of arguments of an operation: to check its backends with, to tune them, to compile them for other targets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Arrays = dict[str, jax.Array]


def as_it_is(results: Any) -> Any:
    """The results themselves."""
    return results


@dataclass(frozen=True)
class Case:
    """Arguments of one operation, by keyword.

    Attributes:
      name: unique among the operation's cases.
      arrays: makes the arrays from a random key; traceable, so that shapes are known without making them. With `numpy`
        it makes numpy arrays from a `numpy.random.Generator`: small ones, for which nothing is to be compiled.
      static: the other arguments.
      meaningful: bool array that broadcasts against each output: which of it is specified (rows of padding are not).
      quick: small enough for the check at start-up.
      differentiate: names of arrays whose gradients are compared as well, where all is checked.
      compared: of an operation's results, what all of its backends give in one form.
      call: takes the arrays and the static arguments by name; the keyword arguments of the operation.
      flops, bytes: the least arithmetic of a call, and the least that it reads and writes; 0 where that is not known.
    """

    name: str
    arrays: Callable[[Any], Mapping[str, Any]]
    static: Mapping[str, Any] = field(default_factory=dict)
    meaningful: Callable[[Arrays], jax.Array] | None = None
    quick: bool = False
    differentiate: tuple[str, ...] = ()
    flops: float = 0
    bytes: float = 0
    numpy: bool = False
    compared: Callable[[Any], Any] = as_it_is
    call: Callable[..., dict[str, Any]] = dict

    def example(self, seed: int = 0) -> Arrays:
        """Fresh random arrays on the default device."""
        if self.numpy:
            return {name: jnp.asarray(x) for name, x in self.arrays(np.random.default_rng(seed)).items()}
        made: Arrays = jax.jit(self.arrays)(jax.random.key(seed))
        return made

    def arguments(self, arrays: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The operation's keyword arguments with these arrays; by default with their shapes and dtypes."""
        return self.call(**(self.abstract() if arrays is None else arrays), **self.static)

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the arrays."""
        if self.numpy:
            made = self.arrays(np.random.default_rng(0))
            return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in made.items()}
        shapes: dict[str, jax.ShapeDtypeStruct] = jax.eval_shape(self.arrays, jax.random.key(0))
        return shapes


def neighbours(tiles: Any, **choices: Sequence[int]) -> Iterator[Any]:
    """Tiles to try: these, then those with one number changed, then with two, each once.

    Args:
      tiles: a dataclass of integers.
      choices: other numbers for some of its fields, the likelier ones first.
    """
    seen = {tiles}
    yield tiles
    for count in (1, 2):
        for names in itertools.combinations(choices, count):
            for numbers in itertools.product(*(choices[name] for name in names)):
                changed = replace(tiles, **dict(zip(names, numbers, strict=True)))
                if changed not in seen:
                    seen.add(changed)
                    yield changed
