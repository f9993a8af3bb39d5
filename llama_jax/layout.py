"""What the rules come to for one model on one mesh: where each parameter goes, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from llama_jax.config import LlamaConfig, MoeSpec
from llama_jax.errors import RequestError
from llama_jax.params import ParamSpec
from llama_jax.sharding.axes import RULES, Rules
from llama_jax.sharding.mesh import automatic_mesh

type Sizes = Mapping[str, int] | Mesh | AbstractMesh
"""A mesh, or the sizes of its axes by name."""


def _sizes(mesh: Sizes) -> Mapping[str, int]:
    return mesh if isinstance(mesh, Mapping) else mesh.shape


def partition_spec(spec: ParamSpec, config: LlamaConfig, mesh: Sizes, rules: Rules = RULES) -> PartitionSpec:
    """How one canonical parameter is split.

    A dimension that does not divide stays whole. Heads are split whole: what has to divide is their number too, not
    only the rows that hold them.

    Raises:
      RequestError: the rules split two dimensions of the parameter over the same axis of the mesh.
    """
    sizes = _sizes(mesh)
    heads = {"q_heads": config.num_heads, "kv_heads": config.num_kv_heads}
    split: list[str | None] = []
    for axis, size in zip(spec.axes, spec.shape, strict=True):
        over = rules.get(axis or "", "")
        divides = over in sizes and heads.get(axis or "", size) % sizes[over] == 0 and size % sizes[over] == 0
        split.append(over if divides else None)
    used = [over for over in split if over is not None]
    if len(used) > len(set(used)):
        raise RequestError(
            f"the rules split two dimensions of {spec.name} {spec.shape} over one axis of the mesh: {split}",
            param="rules",
            hint="give each of its logical axes, " + ", ".join(a for a in spec.axes if a) + ", an axis of its own",
        )
    return PartitionSpec(*split)


def param_sharding(config: LlamaConfig, mesh: Mesh, rules: Rules = RULES) -> Callable[[ParamSpec], NamedSharding]:
    """The sharding of every parameter of a model, for the argument `sharding` of `load_params`.

    A mesh that lacks the axes of the rules holds a whole copy on every device.
    """
    automatic = automatic_mesh(mesh)
    return lambda spec: NamedSharding(automatic, partition_spec(spec, config, automatic, rules))


def split_config(config: LlamaConfig, mesh: Sizes | None) -> LlamaConfig:
    """The model as it is computed on a mesh: with more key/value heads where there are fewer than devices.

    Each key/value head is repeated for the query heads that use it, until every device has what its own query heads
    need. The repeated model computes the same numbers. Heads that divide, and query heads that do not, leave the model
    as it is.
    """
    over = 1 if mesh is None else _sizes(mesh).get(RULES["q_heads"], 1)
    if config.num_heads % over:
        return config
    # Both divide the number of query heads, so their least common multiple does too.
    return config.replace(num_kv_heads=math.lcm(config.num_kv_heads, over))


@dataclass(frozen=True)
class Split:
    """What became of one logical axis.

    Attributes:
      axis: its name, with what it belongs to where that differs between layers.
      size: of the model; None for the rows of a batch.
      over: axis of the mesh.
      ways: size of that axis.
      parts: into how many parts it is split; 1 is whole.
      note: why it is not simply split, or "".
    """

    axis: str
    size: int | None
    over: str
    ways: int
    parts: int
    note: str = ""

    def __str__(self) -> str:
        what = self.axis if self.size is None else f"{self.axis} {self.size}"
        how = "split over" if self.parts > 1 else "whole on each device of"
        return f"{what}: {how} {self.over}={self.ways}{', ' if self.note else ''}{self.note}"


def explain(config: LlamaConfig, mesh: Sizes) -> tuple[Split, ...]:
    """What is split over which axis of the mesh, what stays whole, and why; axes of one device are left out."""
    sizes, splits = _sizes(mesh), []
    if (data := sizes.get(RULES["batch"], 1)) > 1:
        splits.append(Split("batch", None, RULES["batch"], data, data, "rows are filled up to a multiple"))
    for axis, size in _split_sizes(config):
        over = RULES[axis.split()[0]]
        if (ways := sizes.get(over, 1)) == 1:
            continue
        divides, note = size % ways == 0, f"{ways} does not divide {size}"
        if axis == "q_heads" and not divides:
            note += ", so every device computes all of attention"
        if axis == "kv_heads" and not divides and config.num_heads % ways == 0:
            repeats = math.lcm(size, ways) // size
            divides, note = True, f"each head is held {repeats} times, since {note}"
        splits.append(Split(axis, size, over, ways, ways if divides else 1, note if size % ways else ""))
    return tuple(splits)


def _split_sizes(config: LlamaConfig) -> list[tuple[str, int]]:
    widths: dict[tuple[str, int], None] = {}
    for layer in config.layers:
        if not isinstance(layer.mlp, MoeSpec):
            widths["mlp", layer.mlp] = None
            continue
        widths["mlp of each expert", layer.mlp.intermediate_size] = None
        if layer.mlp.shared_intermediate_size:
            widths["mlp of the shared expert", layer.mlp.shared_intermediate_size] = None
    return [("q_heads", config.num_heads), ("kv_heads", config.num_kv_heads), *widths, ("vocab", config.vocab_size)]


def check(config: LlamaConfig, mesh: Sizes) -> None:
    """Refuses a mesh over whose axis "tensor" nothing of the model can be split.

    Raises:
      RequestError: with the numbers.
    """
    tensor = [split for split in explain(config, mesh) if split.over == "tensor"]
    if tensor and all(split.parts == 1 for split in tensor):
        numbers = ", ".join(f"{split.axis} {split.size}" for split in tensor)
        raise RequestError(
            f"tensor={tensor[0].ways} divides nothing of this model ({numbers}): every device would compute everything",
            param="mesh",
            hint="choose a number that divides the heads, or data=N, which splits the batch",
        )
