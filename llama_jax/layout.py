"""Layout of a model's parameters on a mesh under the rules, with the reasons."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.config import LlamaConfig, MoeSpec
from llama_jax.errors import RequestError
from llama_jax.params import ParamSpec, canonical_specs, param_specs
from llama_jax.quantized.layout import ORDER
from llama_jax.schemes import PLAIN
from llama_jax.sharding import RULES, AnyMesh, RuledMesh, ruled
from llama_jax.sharding.axes import refuse_unused


def partition_spec(spec: ParamSpec, config: LlamaConfig, mesh: AnyMesh) -> PartitionSpec:
    """The split of one canonical parameter by the mesh's rules.

    A dimension that does not divide stays whole. Heads are never cut: their number must divide too, not
    only the rows that hold them.

    Raises:
      RequestError: the rules split two dimensions of the parameter over the same axis of the mesh.
    """
    return ruled(mesh).spec(spec.axes, _units(spec, config), f"{spec.name} {spec.shape}")


def local_heads(config: LlamaConfig, mesh: AnyMesh) -> tuple[int, int]:
    """The query heads and key/value heads of one device: both are split, or neither is."""
    ways = ruled(mesh).ways("kv_heads", config.num_kv_heads)
    return config.num_heads // ways, config.num_kv_heads // ways


def local_shape(spec: ParamSpec, config: LlamaConfig, mesh: AnyMesh) -> tuple[int, ...]:
    """The shape of the part of a parameter that each device holds."""
    parts = map(ruled(mesh).ways, spec.axes, _units(spec, config))
    return tuple(size // ways for size, ways in zip(spec.shape, parts, strict=True))


def local_size(spec: ParamSpec, config: LlamaConfig, mesh: AnyMesh) -> int:
    """The number of a parameter's elements that each device holds."""
    return math.prod(local_shape(spec, config, mesh))


def _units(spec: ParamSpec, config: LlamaConfig) -> tuple[int, ...]:
    """The parameter's shape, with the number of heads where a dimension is made of heads."""
    heads = {"q_heads": config.num_heads, "kv_heads": config.num_kv_heads}
    units = ((heads.get(axis or "", size), size) for axis, size in zip(spec.axes, spec.shape, strict=True))
    return tuple(math.gcd(*unit) for unit in units)


def param_sharding(config: LlamaConfig, mesh: AnyMesh) -> Callable[[ParamSpec], NamedSharding]:
    """The sharding of every parameter of a model, for the argument `sharding` of `load_params`.

    A mesh that lacks the axes of its rules holds a whole copy on every device.
    """
    by = ruled(mesh)
    return lambda spec: NamedSharding(by.automatic, partition_spec(spec, config, by))


def split_config(config: LlamaConfig, mesh: AnyMesh) -> LlamaConfig:
    """The config of the model as computed on a mesh: with more key/value heads where there are fewer than devices.

    Key/value heads are repeated until every device has those that its own query heads need. The repeated model
    computes the same numbers. If key/value heads divide, or query heads do not, the model stays as it is.
    """
    ways = ruled(mesh).ways("kv_heads")
    if config.num_heads % ways:
        return config
    # Both divide the number of query heads, so their least common multiple does too.
    return config.replace(num_kv_heads=math.lcm(config.num_kv_heads, ways))


@dataclass(frozen=True)
class Split:
    """The placement of one logical axis.

    Attributes:
      axis: its name, with what it belongs to where that differs between layers.
      size: of the model; None for the rows of a batch.
      over: axes of the mesh.
      ways: the product of their sizes, and how they make it up, e.g. "tensor=8" or "data=2 x tensor=4".
      parts: number of parts it is split into: all of `ways`, or 1, which is whole.
      note: why it is not simply split, or "".
    """

    axis: str
    size: int | None
    over: tuple[str, ...]
    ways: str
    parts: int
    note: str = ""

    def __str__(self) -> str:
        what = self.axis if self.size is None else f"{self.axis} {self.size}"
        how = "split over" if self.parts > 1 else "whole on each device of"
        return f"{what}: {how} {self.ways}{', ' if self.note else ''}{self.note}"


def explain(config: LlamaConfig, mesh: AnyMesh) -> tuple[Split, ...]:
    """The dimensions split over each axis of the mesh, those left whole, and why; axes of one device are left out."""
    by, splits = ruled(mesh), []
    for axis, size in _split_sizes(config):
        name = axis.split()[0]
        if not (over := by.over(name)):
            continue
        ways = by.ways(name)
        text = " x ".join(f"{a}={by.shape[a]}" for a in over)
        if size is None:
            splits.append(Split(axis, size, over, text, ways, "rows are filled up to a multiple"))
            continue
        parts, note = by.ways(name, size), "" if size % ways == 0 else f"{ways} does not divide {size}"
        if note and axis == "q_heads":
            note += ", so every device computes all of attention"
        if note and axis == "kv_heads" and config.num_heads % ways == 0:
            repeats = math.lcm(size, ways) // size
            parts, note = ways, f"each head is held {repeats} times, since {note}"
        splits.append(Split(axis, size, over, text, parts, note))
    return tuple(splits)


def _split_sizes(config: LlamaConfig) -> list[tuple[str, int | None]]:
    widths: dict[tuple[str, int | None], None] = {}
    for layer in config.layers:
        if not isinstance(layer.mlp, MoeSpec):
            widths["mlp", layer.mlp] = None
            continue
        widths["mlp of each expert", layer.mlp.intermediate_size] = None
        if layer.mlp.shared_intermediate_size:
            widths["mlp of the shared expert", layer.mlp.shared_intermediate_size] = None
    heads = [("q_heads", config.num_heads), ("kv_heads", config.num_kv_heads)]
    return [("batch", None), *heads, *widths, ("vocab", config.vocab_size)]


def check(config: LlamaConfig, mesh: AnyMesh) -> None:
    """Refuses a mesh with an axis that splits nothing of the model, and rules that programs cannot follow.

    Raises:
      RequestError: with the numbers, or the rules.
    """
    by = ruled(mesh)
    if by.rules is not RULES:
        refuse_unused(by.shape, by.rules)
        _check_rules(by)
    check_groups(config, by)
    splits = [split for split in explain(config, mesh) if split.size is not None]
    for axis in dict.fromkeys(a for split in splits for a in split.over):
        over = [split for split in splits if axis in split.over]
        if all(split.parts == 1 for split in over):
            numbers = ", ".join(f"{split.axis} {split.size}" for split in over)
            raise RequestError(
                f"{over[0].ways} divides nothing of this model ({numbers}): every device would compute everything",
                param="mesh",
                hint="choose a number that divides the heads, or data=N, which splits the batch",
            )


def check_groups(config: LlamaConfig, mesh: AnyMesh) -> None:
    """Refuses a mesh that would split a weight through groups that share a scale.

    Raises:
      RequestError: with the numbers.
    """
    if not config.schemes:
        return
    by, plain = ruled(mesh), {spec.leaf: spec for spec in canonical_specs(config) if len(spec.shape) > 1}
    for spec in param_specs(config):
        if spec.scheme == PLAIN.name:
            continue
        weight = plain[spec.leaf]
        ways = by.ways(weight.axes[-1])
        if spec.path[-1] == ORDER and ".moe." in spec.name and ways > 1:
            raise RequestError(
                f"{spec.leaf} has columns in an order of their own, which {ways} devices cannot share",
                param="mesh",
                hint="choose a mesh that does not split experts, or the weights in floating point",
            )
        wanted = dict(zip(weight.axes, map(by.ways, weight.axes, _units(weight, config)), strict=True))
        for axis, size, units in zip(spec.axes, spec.shape, _units(spec, config), strict=True):
            parts = wanted.get(axis, 1)
            if by.ways(axis, units) != parts and by.over(axis or ""):
                whole = weight.shape[weight.axes.index(axis)]
                raise RequestError(
                    f"{spec.leaf} is stored as {spec.scheme}, {whole // size} of its {whole} numbers together: "
                    f"{parts} devices would have {whole / parts:g} each, {size / parts:g} groups",
                    param="mesh",
                    hint="choose fewer devices for the tensor axis, a smaller group, or the weights in floating point",
                )


def _check_rules(mesh: RuledMesh) -> None:
    """Raises RequestError for rules under which programs would give other numbers, or none."""

    def refuse(what: str, hint: str) -> RequestError:
        return RequestError(f"rules {dict(mesh.rules)}: {what}", param="rules", hint=hint)

    if other := sorted(mesh.rules.keys() - RULES.keys()):
        raise refuse(f"{', '.join(other)} cannot be split", f"there are {', '.join(RULES)}")
    if mesh.over("q_heads") != mesh.over("kv_heads"):
        raise refuse("query heads are computed beside their key/value heads", "split q_heads and kv_heads alike")
    for over in mesh.over("batch"):
        if beside := [axis for axis in RULES if axis != "batch" and over in mesh.over(axis)]:
            raise refuse(
                f"batch and {', '.join(beside)} are both split over {over}", "rows of a batch need axes of their own"
            )
