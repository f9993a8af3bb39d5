"""Quantised parameters, and their dequantisation: `quantize` for a model, and the pure functions on trees behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from llama_jax import recipe as recipes
from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError
from llama_jax.layout import check_groups
from llama_jax.model.calibration import calibrated_params
from llama_jax.model.loaded import Model
from llama_jax.params import JOINT, PROJECTION_AXES, Params, flatten, unflatten
from llama_jax.quantized import layout_named
from llama_jax.quantized.methods import METHODS, encoder
from llama_jax.recipe import Recipe
from llama_jax.schemes import PLAIN, Members, scheme_named, scheme_of
from llama_jax.sharding import Axes, DeviceMesh, constrain, on


def quantize(
    model: Model,
    weights: str = "int4",
    *,
    group: int | None = None,
    symmetric: bool | None = None,
    lm_head: str = "int8",
    embed: str = recipes.PLAIN,
    ignore: str | Sequence[str] = (),
    method: str = recipes.NEAREST,
    calibration: np.ndarray | None = None,
) -> Model:
    """The quantised model, by default with each weight rounded to nearest; `model` is not changed.

    Args:
      model: with weights in floating point, fused or not, on a mesh or not.
      weights, group, symmetric, lm_head, embed, ignore, method: see `llama_jax.recipe.recipe`.
      calibration: int32 [rows, length], tokens of a text, for the methods that need one; the model is then not fused.

    Raises:
      RequestError: see `recipe` and `recipe.schemes`; or a mesh would cut through a group, or `ignore` names a part of
        a joint projection, or a method cannot be calibrated with what is given.
    """
    wanted = recipes.recipe(
        weights, group=group, symmetric=symmetric, lm_head=lm_head, embed=embed, ignore=ignore, method=method
    )
    config = model.config.replace(schemes=recipes.schemes(model.config, wanted))
    if model.mesh is not None:
        check_groups(config, model.mesh)
    params, config = quantize_params(model.params, model.config, wanted, calibration=calibration, mesh=model.mesh)
    return replace(model, params=params, config=config)


def quantize_params(
    params: Params,
    config: LlamaConfig,
    wanted: Recipe,
    *,
    calibration: np.ndarray | None = None,
    mesh: DeviceMesh | None = None,
    donate: bool = False,
) -> tuple[Params, LlamaConfig]:
    """Quantised parameters; other leaves are the same arrays, except norms if the method scales inputs.

    Args:
      params: plain, canonical or fused (canonical for a method that is calibrated).
      config: of the model.
      wanted: what becomes of which leaf, and how.
      calibration: int32 [rows, length], tokens of a text, for a method that needs one.
      mesh: that the parameters are split over.
      donate: frees each weight when its members are there, for a caller that owns it and will not use `params` again.

    Returns:
      The tree, in the same arrangement, and the config that says how its leaves are stored.

    Raises:
      RequestError: see `recipe.schemes`; or the parts of a joint projection would be stored in different ways.
    """
    config = config.replace(schemes=recipes.schemes(config, wanted))
    wanted.check_text(given=calibration is not None)
    if calibration is not None:
        return calibrated_params(params, config, METHODS[wanted.method], calibration, mesh), config
    schemes = dict(config.schemes)

    def encoded(leaf: str, members: Members) -> Members:
        name = _scheme_of_leaf(leaf, schemes)
        layout = layout_named(name or "")
        if name is None or layout is None:
            return members
        axes = scheme_named(name).axes(_axes(leaf))
        found = _encode(encoder(wanted.method, layout), members["weight"], _frozen(axes))
        if donate:
            jax.block_until_ready(found)
            members["weight"].delete()
        return found | {name: members[name] for name in members if name == "bias"}

    with on(mesh):
        return _each_leaf(params, encoded), config


def dequantize_params(
    params: Params, config: LlamaConfig, dtype: DTypeLike, *, donate: bool = False
) -> tuple[Params, LlamaConfig]:
    """Parameters with every weight plain, in `dtype`; leaves that are already plain are the same arrays.

    Args:
      params: canonical or fused.
      donate: frees what a leaf was made of when the leaf is there, so that one leaf at a time exists twice. For a
        caller that owns them, and will not use `params` again.
    """

    def decoded(leaf: str, members: Members) -> Members:
        scheme = scheme_of(members)
        if scheme is PLAIN:
            return members
        stored = {name: members[name] for name in scheme.members}
        weight = _decode(scheme.decode, stored, jnp.dtype(dtype), _axes(leaf))
        if donate:
            jax.block_until_ready(weight)
            for member in stored.values():
                member.delete()
        return {"weight": weight} | {name: members[name] for name in members if name == "bias"}

    return _each_leaf(params, decoded), config.replace(schemes=())


@partial(jax.jit, static_argnums=(0, 2, 3))
def _decode(decode: Callable[..., jax.Array], members: Members, dtype: jnp.dtype, axes: Axes) -> jax.Array:
    return constrain(decode(members, dtype), axes)


@partial(jax.jit, static_argnums=(0, 2))
def _encode(
    encode: Callable[[jax.Array], Members], weight: jax.Array, axes: tuple[tuple[str, Axes], ...]
) -> dict[str, jax.Array]:
    members = encode(weight)
    return {name: constrain(members[name], names) for name, names in axes}


def _frozen(axes: Mapping[str, Axes]) -> tuple[tuple[str, Axes], ...]:
    return tuple(axes.items())


def _each_leaf(params: Params, change: Callable[[str, Members], Members]) -> Params:
    """The tree with `change` applied to every leaf, a dict of members, and its dotted name."""
    leaves: dict[str, dict[str, jax.Array]] = {}
    for name, array in flatten(params).items():
        leaf, _, member = name.rpartition(".")
        leaves.setdefault(leaf, {})[member] = array
    changed = {leaf: change(leaf, members) for leaf, members in leaves.items()}
    return unflatten({f"{leaf}.{name}": array for leaf, members in changed.items() for name, array in members.items()})


def _axes(leaf: str) -> Axes:
    """Logical axes of the weight of a leaf that may be quantised, joint projections among them."""
    *_, block, name = ("", *leaf.split("."))
    if name in ("embed", "lm_head"):
        return ("vocab", "embed")
    return ("expert", *PROJECTION_AXES[name]) if block == "experts" else PROJECTION_AXES[name]


def _scheme_of_leaf(leaf: str, schemes: Mapping[str, str]) -> str | None:
    """The target scheme of a leaf; None for a plain one.

    Raises:
      RequestError: it is a joint projection whose parts have different ones.
    """
    block, _, name = leaf.rpartition(".")
    found = {schemes.get(f"{block}.{part}") for part in JOINT.get(name, ())} or {schemes.get(leaf)}
    if len(found) > 1:
        raise RequestError(
            f"{leaf} joins {', '.join(JOINT[name])}, of which some would be quantised and some not",
            param="ignore",
            hint="name all of them or none, or load the model with fuse=False",
        )
    return found.pop()
