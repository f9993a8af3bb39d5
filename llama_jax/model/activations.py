"""Activations by name: which there are, and functions that change them on the way.

steer = lj.patch({"layers.12.out": lambda x, place, vector: x + vector}, vector)
logits, _ = lj.forward(params, config, tokens, patch=steer)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import jax

from llama_jax.config import LlamaConfig, MoeSpec
from llama_jax.errors import RequestError, did_you_mean

LAYER_ACTIVATIONS = ("attn_in", "q", "k", "v", "attn_heads", "attn_out", "mlp_in", "mlp_hidden", "mlp_out", "out")
"""Of a block: what comes out of its norms and projections. "attn_heads" is each head's output and goes into o_proj,
"mlp_hidden" goes into down_proj; a mixture of experts has none of the latter."""
ON_DEMAND = "attn_probs"
"""Attention's weights, which no kernel keeps: a layer in which they are named computes attention by the reference."""


def activation_names(config: LlamaConfig) -> tuple[str, ...]:
    """Every name that `capture=` and `patch` accept, in the order of the forward pass.

    One is left out: "layers.0.attn_probs", float32 [batch, num_heads, len, len], attention's weights of a layer. It is
    available without a cache, and matched only by patterns that end with this word, since computing it takes attention
    out of its kernel.
    """
    layers = (
        f"layers.{i}.{name}"
        for i, spec in enumerate(config.layers)
        for name in LAYER_ACTIVATIONS
        if name != "mlp_hidden" or not isinstance(spec.mlp, MoeSpec)
    )
    return ("embed", *layers, "final_norm")


def matching_names(config: LlamaConfig, patterns: Iterable[str], *, param: str) -> dict[str, tuple[str, ...]]:
    """The activations that each pattern names, e.g. "layers.*.out", "layers.[3-5].attn_heads".

    Raises:
      RequestError: a pattern names none; `param` is the argument it was given in.
    """
    every = activation_names(config)
    maps = tuple(f"layers.{i}.{ON_DEMAND}" for i in range(config.num_layers))
    found = {}
    for pattern in patterns:
        known = maps if pattern.endswith(f".{ON_DEMAND}") else every
        found[pattern] = tuple(name for name in known if fnmatchcase(name, pattern))
        if not found[pattern]:
            raise RequestError(
                f"no activation matches {pattern!r}",
                param=param,
                hint=did_you_mean(pattern, (*every, *maps))
                or "activation_names(config) lists them, e.g. embed, layers.0.attn_out, layers.*.out, final_norm",
            )
    return found


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Place:
    """Where in the model and in the texts an activation is: the second argument of a patch's function.

    Attributes:
      layer: int32 [], the block's index; None outside of blocks. An array, so that blocks share one trace.
      positions: int32 [batch, len], each token's position in its text; negative for padding.
      segments: int32 [batch, len] or None, the text of each token where several are packed (`segment_ids`).
    """

    layer: jax.Array | None
    positions: jax.Array
    segments: jax.Array | None = None


Edit = Callable[..., jax.Array]
"""function(activation, place, *arrays) that returns an activation of the same shape."""


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["patterns", "functions"])
@dataclass(frozen=True)
class Patch:
    """Functions to apply to activations: a pytree whose leaves are the functions' arrays, made by `patch`.

    Attributes:
      patterns: names of activations, each with its function and that function's arrays; applied in this order.
    """

    patterns: tuple[str, ...]
    functions: tuple[Edit, ...]
    arrays: tuple[tuple[Any, ...], ...]

    def __or__(self, other: Patch) -> Patch:
        """Both; this one's functions come first."""
        return Patch(self.patterns + other.patterns, self.functions + other.functions, self.arrays + other.arrays)

    def by_name(self, config: LlamaConfig) -> dict[str, Patch]:
        """Its part for each activation that it changes.

        Raises:
          RequestError: a pattern names no activation.
        """
        found: dict[str, Patch] = {}
        named = matching_names(config, self.patterns, param="patch")
        for pattern, function, arrays in zip(self.patterns, self.functions, self.arrays, strict=True):
            for name in named[pattern]:
                found[name] = found.get(name, NO_PATCH) | Patch(("",), (function,), (arrays,))
        return found

    def __call__(self, name: str, x: jax.Array, place: Place) -> jax.Array:
        """The activation after all functions, in its own dtype.

        Raises:
          RequestError: a function returned another shape; `name` is the activation's in the message.
        """
        for function, arrays in zip(self.functions, self.arrays, strict=True):
            new = jax.numpy.asarray(function(x, place, *arrays))
            if new.shape != x.shape:
                raise RequestError(
                    f"the patch of {name!r} returned {list(new.shape)} for an activation {list(x.shape)}",
                    param="patch",
                    hint="return an array of the activation's shape; use jnp.where or x.at[...].set for a part of it",
                )
            x = new.astype(x.dtype)
        return x


NO_PATCH = Patch((), (), ())


def patch(changes: Mapping[str, Edit], *arrays: Any) -> Patch:
    """Functions that change activations in `forward(patch=)`: steering vectors, ablations, activations of other texts.

        lj.patch({"layers.12.out": lambda x, place, vector: x + vector}, vector)
        lj.patch({"layers.*.attn_heads": lambda x, place: x.at[:, :, 3].set(0)})

    `a | b` applies both. A patch is a pytree: it can be an argument of a jitted function, and one may differentiate
    with respect to its arrays. Blocks that get the same function share one trace, and so do those that get none.

    Args:
      changes: names or patterns of activations (`activation_names`), and a function of each: function(x, place,
        *arrays) gets the activation and its `Place`, and returns one of the same shape, which is cast to x's dtype. It
        is part of jit's cache key by its identity, so define it once, and pass what varies as arrays.
      arrays: pytrees of arrays, passed to every function of this patch.
    """
    for name, function in changes.items():
        if not callable(function):
            raise RequestError(
                f"the patch of {name!r} is not a function",
                param="changes",
                hint="give a function of (activation, place, *arrays), e.g. lambda x, place: x * 0",
            )
    return Patch(tuple(changes), tuple(changes.values()), (arrays,) * len(changes))


class Tap:
    """The activations of a part of the model while it is traced: changes them, and keeps those that are wanted.

    Attributes:
      seen: the wanted ones so far, after their changes.
    """

    def __init__(self, wanted: Sequence[str], patches: Mapping[str, Patch], place: Place):
        self.seen: dict[str, jax.Array] = {}
        self._wanted, self._patches, self._place = wanted, patches, place

    def needs(self, *names: str) -> bool:
        """Whether one of the activations is wanted or changed."""
        return any(name in self._wanted or self.changes(name) for name in names)

    def changes(self, name: str) -> bool:
        return name in self._patches

    def __call__(self, name: str, x: Any) -> Any:
        """The activation as the rest of the model gets it: an array where it is wanted or changed, else anything."""
        if self.changes(name):
            x = self._patches[name](name, x, self._place)
        if name in self._wanted:
            self.seen[name] = x
        return x
