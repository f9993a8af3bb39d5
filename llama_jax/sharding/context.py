"""Activations and caches while a program is traced. Without a mesh in use (`on`, `jax.set_mesh`) nothing happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from llama_jax.sharding.axes import RULES, Axes


def _mesh_in_use() -> AbstractMesh | None:
    """The mesh that the program is traced for, unless this is a part of it that runs on each device for itself."""
    mesh = jax.sharding.get_abstract_mesh()
    automatic = [kind == AxisType.Auto for kind in mesh.axis_types]
    return mesh if mesh.size > 1 and automatic and all(automatic) else None


def in_use() -> bool:
    """Whether the program is traced for several devices, and the compiler deals it out to them."""
    return _mesh_in_use() is not None


def parts(logical: str) -> int:
    """Into how many parts a logical axis is split if its size divides."""
    mesh = _mesh_in_use()
    return 1 if mesh is None else mesh.shape.get(RULES.get(logical, ""), 1)


def split_over(logical: str, size: int) -> str | None:
    """The axis of the mesh in use over which a dimension of this name and size is split, or None."""
    ways = parts(logical)
    return RULES[logical] if ways > 1 and size % ways == 0 else None


def local_size(logical: str, size: int) -> int:
    """How much of a dimension of this name and size each device of the mesh in use has."""
    return size if split_over(logical, size) is None else size // parts(logical)


def constrain[Tree](x: Tree, axes: Any) -> Tree:
    """`x`, laid out over the mesh in use by the rules; a dimension that does not divide stays whole.

    Args:
      x: an array, or a tree of arrays.
      axes: the logical name of each dimension, of which those at the end may be left out; or a tree of these, of the
        structure of `x` or a shorter one.
    """
    if not in_use():
        return x

    def place(axes: Axes, x: jax.Array) -> jax.Array:
        over = (None if axis is None else split_over(axis, size) for axis, size in zip(axes, x.shape, strict=False))
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*over))

    return jax.tree.map(place, _broadcast(axes, x), x, is_leaf=_is_axes)


def local(
    run: Callable[..., Any], arguments: dict[str, Any], axes: dict[str, Any], out: Any, *, summed: str | None = None
) -> Any:
    """Calls `run(**arguments)`; on a mesh, on every device with its own parts of the arguments.

    What the compiler cannot deal out by itself, such as a Pallas kernel, runs so. A logical axis is split only if all
    dimensions of that name divide.

    Args:
      arguments: trees of arrays.
      axes: for each argument a tree of the same shape, or of a shorter one, that holds `Axes`.
      out: likewise for what `run` returns.
      summed: the logical axis over whose parts the results have to be added up.
    """
    mesh = _mesh_in_use()
    if mesh is None:
        return run(**arguments)
    full = {name: _broadcast(axes[name], value) for name, value in arguments.items()}
    whole = {
        axis
        for name, value in arguments.items()
        for axis, size in _dimensions(full[name], value)
        if split_over(axis, size) is None
    }

    def spec(names: Axes) -> PartitionSpec:
        return PartitionSpec(*(None if n is None or n in whole or parts(n) == 1 else RULES[n] for n in names))

    def specs(tree: Any) -> Any:
        return jax.tree.map(spec, tree, is_leaf=_is_axes)

    adds = summed is not None and summed not in whole and parts(summed) > 1

    def part(arguments: dict[str, Any]) -> Any:
        result = run(**arguments)
        return jax.lax.psum(result, RULES[summed]) if adds and summed else result

    return jax.shard_map(part, mesh=mesh, in_specs=(specs(full),), out_specs=specs(out), check_vma=False)(arguments)


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple) and all(n is None or isinstance(n, str) for n in x)


def _broadcast(axes: Any, value: Any) -> Any:
    """`axes` in the tree structure of `value`."""
    return jax.tree.map(lambda a, v: jax.tree.map(lambda _: a, v), axes, value, is_leaf=_is_axes)


def _dimensions(axes: Any, value: Any) -> Iterator[tuple[str, int]]:
    for names, leaf in zip(jax.tree.leaves(axes, is_leaf=_is_axes), jax.tree.leaves(value), strict=True):
        yield from ((n, size) for n, size in zip(names, leaf.shape, strict=False) if n is not None)
