"""Sharding of activations and caches at trace time. Without a mesh in use (`on`, `jax.set_mesh`) nothing happens."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from llama_jax.errors import RequestError
from llama_jax.sharding.axes import RULES, Axes, MeshAxes
from llama_jax.sharding.mesh import AnyMesh, RuledMesh, ruled, spec_entry

# Part of jit's cache key, as the mesh in use is: programs traced under other rules are traced again.
_rules = jax.make_user_context(RULES)

_ONE_DEVICE = RuledMesh({})


@contextlib.contextmanager
def on(mesh: AnyMesh) -> Iterator[None]:
    """Shards everything traced inside over `mesh` by its rules; None changes nothing.

    A mesh of sizes only is enough to query shapes (`ways`, `share`) where there are no such devices.
    """
    if mesh is None:
        yield
        return
    given = ruled(mesh)
    automatic = given.automatic
    enter = jax.set_mesh(automatic) if isinstance(automatic, Mesh) else jax.sharding.use_abstract_mesh(automatic)
    with enter, _rules(given.rules):
        yield


def current() -> RuledMesh:
    """The mesh that the program is traced for, with its rules: that of one device where there is none, and in a part of
    the program that runs on each device for itself."""
    mesh = jax.sharding.get_abstract_mesh()
    automatic = [kind == AxisType.Auto for kind in mesh.axis_types]
    return RuledMesh(mesh, _rules.value) if mesh.size > 1 and automatic and all(automatic) else _ONE_DEVICE


def in_use() -> bool:
    """Returns whether the program is traced for several devices, and the compiler partitions it over them."""
    return current() is not _ONE_DEVICE


def ways(axis: str) -> int:
    """The number of parts that a logical axis is split into on the mesh in use, if its size divides."""
    return current().ways(axis)


def share(axis: str, size: int) -> int:
    """The size of each device's part of a dimension of this name and size, on the mesh in use."""
    return current().share(axis, size)


def split_over(axis: str, size: int) -> MeshAxes | None:
    """The axes of the mesh in use that a dimension of this name and size is split over, as collectives take them; None
    if it is whole."""
    return spec_entry(current().over(axis, size))


def constrain[Tree](x: Tree, axes: Any) -> Tree:
    """`x`, laid out over the mesh in use by the rules; a dimension that does not divide stays whole.

    Args:
      x: an array, or a tree of arrays.
      axes: the logical name of each dimension; trailing ones may be left out; or a tree of these, of the
        structure of `x` or a shorter one.

    Raises:
      RequestError: the rules split two dimensions of an array over the same axis of the mesh.
    """
    if not in_use():
        return x
    mesh = current()

    def lay_out(axes: Axes, x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, mesh.spec(axes, x.shape))

    return jax.tree.map(lay_out, _broadcast(axes, x), x, is_leaf=_is_axes)


def local(
    run: Callable[..., Any], arguments: dict[str, Any], axes: dict[str, Any], out: Any, *, summed: str | None = None
) -> Any:
    """Calls `run(**arguments)`; on a mesh, on every device with its own parts of the arguments.

    This is for what the compiler cannot partition by itself, such as a Pallas kernel. A logical axis is split only if
    all dimensions of that name divide.

    Args:
      arguments: trees of arrays.
      axes: for each argument a tree of the same shape, or of a shorter one, that holds `Axes`.
      out: likewise for what `run` returns.
      summed: the logical axis over which the results must be all-reduced.

    Raises:
      RequestError: the rules split two logical axes over the same axis of the mesh, so that no device has every
        combination of their parts.
    """
    if not in_use():
        return run(**arguments)
    mesh = current()
    full = {name: _broadcast(axes[name], value) for name, value in arguments.items()}
    dimensions = [d for name, value in arguments.items() for d in _dimensions(full[name], value)]
    whole = {axis for axis, size in dimensions if not mesh.over(axis, size)}
    split = {axis: mesh.over(axis) for axis, _ in dimensions if axis not in whole}
    for (a, over), (b, other) in itertools.combinations(split.items(), 2):
        if common := set(over) & set(other):
            raise RequestError(
                f"the rules split both {a} and {b} over {', '.join(sorted(common))}, and one operation needs all "
                "combinations of their parts",
                param="rules",
                hint=f"give {a} and {b} axes of their own",
            )

    def spec(names: Axes) -> PartitionSpec:
        return PartitionSpec(*(None if n in whole else spec_entry(mesh.over(n)) for n in names))

    def specs(tree: Any) -> Any:
        return jax.tree.map(spec, tree, is_leaf=_is_axes)

    def part(arguments: dict[str, Any]) -> Any:
        result = run(**arguments)
        return jax.lax.psum(result, split[summed]) if summed in split else result

    return jax.shard_map(part, in_specs=(specs(full),), out_specs=specs(out), check_vma=False)(arguments)


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple) and all(n is None or isinstance(n, str) for n in x)


def _broadcast(axes: Any, value: Any) -> Any:
    """`axes` in the tree structure of `value`."""
    return jax.tree.map(lambda a, v: jax.tree.map(lambda _: a, v), axes, value, is_leaf=_is_axes)


def _dimensions(axes: Any, value: Any) -> Iterator[tuple[str, int]]:
    for names, leaf in zip(jax.tree.leaves(axes, is_leaf=_is_axes), jax.tree.leaves(value), strict=True):
        yield from ((n, size) for n, size in zip(names, leaf.shape, strict=False) if n is not None)
