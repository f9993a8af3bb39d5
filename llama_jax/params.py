"""The one table of parameters: names, shapes, logical axes, initialisers and the names other formats use.

`param_specs(config)` alone drives initialisation, abstract shapes, sharding, loading, saving and the memory plan.
Weights of projections are stored `[out, in]`, as in Hugging Face checkpoints, so that converting one is a copy of its
bytes. A weight of two or more dimensions may be stored in another form, by a `Scheme` (`llama_jax.schemes`):
`config.schemes` names it, leaf by leaf, and its members take the place of the leaf's "weight". `canonical_specs` is the
table without that.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig, MoeSpec
from llama_jax.errors import UnsupportedModel
from llama_jax.quantized import stored_layout
from llama_jax.schemes import PLAIN, Scheme, scheme_named
from llama_jax.sharding import Axes

Params = dict[str, Any]
"""Nested dict of arrays: `params["layers"]["0"]["attn"]["q_proj"]["weight"]`."""

Init = Literal["normal", "ones", "zeros"]

PROJECTION_AXES: Mapping[str, Axes] = MappingProxyType(
    {
        "q_proj": ("q_heads", "embed"),
        "k_proj": ("kv_heads", "embed"),
        "v_proj": ("kv_heads", "embed"),
        "o_proj": ("embed", "q_heads"),
        "gate_proj": ("mlp", "embed"),
        "up_proj": ("mlp", "embed"),
        "down_proj": ("embed", "mlp"),
        # The joint projections of `model.fuse`: a split of a named dimension never cuts through what is joint.
        "qkv_proj": ("kv_heads", None, "head_dim", "embed"),
        "gate_up_proj": (None, "mlp", "embed"),
    }
)
"""Logical axes of the weight of each projection; its bias lacks the last one."""

JOINT: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
)
"""The parts of each joint projection."""


@dataclass(frozen=True)
class ParamSpec:
    """One leaf of the parameter tree.

    Attributes:
      name: dotted path in the tree, e.g. "layers.0.attn.q_proj.weight".
      shape: canonical shape; projections are [out, in], expert stacks [expert, out, in].
      axes: logical axis of each dimension ("vocab", "embed", "q_heads", "kv_heads", "head_dim", "mlp", "expert"; None
        is never sharded). Sharding rules map them to mesh axes.
      init: "normal" (standard deviation `fan_in ** -0.5`), "ones" or "zeros".
      hf: name in a Hugging Face checkpoint; "{e}" stands for the expert where experts are separate tensors.
      gguf: name in a GGUF file, where experts are always stacked.
      dtype: numpy name of its fixed dtype; None means the compute dtype.
      scheme: the scheme of the weight that it is a member of.
    """

    name: str
    shape: tuple[int, ...]
    axes: Axes
    init: Init
    hf: str
    gguf: str
    dtype: str | None = None
    scheme: str = PLAIN.name

    @property
    def leaf(self) -> str:
        """Dotted path of the leaf that it is a member of, e.g. "layers.0.attn.q_proj"."""
        return self.name.rpartition(".")[0]

    @property
    def path(self) -> tuple[str, ...]:
        return tuple(self.name.split("."))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def itemsize(self, computed: int) -> int:
        """Bytes of one number in memory, where those of the dtype that the model computes in take `computed`."""
        return computed if self.dtype is None else jnp.dtype(self.dtype).itemsize


def param_specs(config: LlamaConfig) -> tuple[ParamSpec, ...]:
    """Every array of a model's parameter tree, in the order of the forward pass.

    Raises:
      UnsupportedModel: `config.schemes` names a scheme that is not registered, or a leaf that cannot have one.
    """
    if not config.schemes:
        return canonical_specs(config)
    schemes = _schemes(config)
    return tuple(member for spec in canonical_specs(config) for member in stored_as(spec, schemes))


def canonical_specs(config: LlamaConfig) -> tuple[ParamSpec, ...]:
    """The table as if every weight were stored plainly, as arithmetic and other formats see it."""
    return tuple(_specs(config))


def _schemes(config: LlamaConfig) -> dict[str, str]:
    schemes = dict(config.schemes)
    if strange := schemes.keys() - {s.leaf for s in canonical_specs(config) if len(s.shape) > 1}:
        raise UnsupportedModel(
            f"schemes are given for {', '.join(sorted(strange)[:5])}, which the model does not have",
            hint="weights of two or more dimensions can have one, e.g. layers.0.attn.q_proj",
        )
    for spec in canonical_specs(config):
        layout = stored_layout(schemes.get(spec.leaf, ""))
        if layout is not None and spec.path[-1] == "weight" and not layout.fits(spec.shape[-1]):
            raise UnsupportedModel(
                f"{spec.leaf} is said to be stored as {layout.name}, but its rows of {spec.shape[-1]} do not divide so",
                hint="quantise the model again with another group",
            )
    return schemes


def _scheme(spec: ParamSpec, schemes: Mapping[str, str]) -> Scheme | None:
    """The scheme that stores a leaf of the canonical table; None for a plain one, and for a bias."""
    return scheme_named(schemes[spec.leaf]) if spec.leaf in schemes and spec.path[-1] == "weight" else None


def stored_as(spec: ParamSpec, schemes: Mapping[str, str]) -> Iterator[ParamSpec]:
    """Yield the rows that a row of the canonical table is stored as: the members of its scheme, or itself.

    Args:
      schemes: of leaves that have one, as in `LlamaConfig.schemes`.
    """
    scheme = _scheme(spec, schemes)
    if scheme is None:
        yield spec
        return
    for name, member in scheme.members.items():
        yield replace(
            spec,
            name=f"{spec.leaf}.{name}",
            shape=member.shape(spec.shape),
            axes=member.axes(spec.axes),
            dtype=member.dtype,
            scheme=scheme.name,
        )


def _specs(c: LlamaConfig) -> Iterator[ParamSpec]:
    vocabulary, axes = (c.vocab_size, c.hidden_size), ("vocab", "embed")
    yield _weight("embed", vocabulary, axes, "model.embed_tokens", "token_embd")
    for i, layer in enumerate(c.layers):
        ours, hf, gguf = f"layers.{i}", f"model.layers.{i}", f"blk.{i}"
        yield _norm(c, f"{ours}.attn_norm", f"{hf}.input_layernorm", f"{gguf}.attn_norm")
        for name, out, bias, gguf_name in (
            ("q_proj", c.q_dim, c.qkv_bias, "attn_q"),
            ("k_proj", c.kv_dim, c.qkv_bias, "attn_k"),
            ("v_proj", c.kv_dim, c.qkv_bias, "attn_v"),
        ):
            shape = out, c.hidden_size
            yield from _linear(f"{ours}.attn.{name}", shape, bias, f"{hf}.self_attn.{name}", f"{gguf}.{gguf_name}")
        if layer.qk_norm == "rms":
            for name in ("q_norm", "k_norm"):
                names = f"{hf}.self_attn.{name}", f"{gguf}.attn_{name}"
                yield _weight(f"{ours}.attn.{name}", (c.head_dim,), ("head_dim",), *names, init="ones")
        shape = c.hidden_size, c.q_dim
        yield from _linear(f"{ours}.attn.o_proj", shape, c.o_bias, f"{hf}.self_attn.o_proj", f"{gguf}.attn_output")
        yield _norm(c, f"{ours}.mlp_norm", f"{hf}.post_attention_layernorm", f"{gguf}.ffn_norm")
        if isinstance(layer.mlp, MoeSpec):
            yield from _moe(c, layer.mlp, f"{ours}.moe", hf, gguf)
        else:
            yield from _mlp(c, layer.mlp, f"{ours}.mlp", f"{hf}.{c.hf_mlp_module}", f"{gguf}.ffn_{{}}", c.mlp_bias)
    yield _norm(c, "final_norm", "model.norm", "output_norm")
    if not c.tie_word_embeddings:
        yield _weight("lm_head", vocabulary, axes, "lm_head", "output")


def _weight(name: str, shape: tuple[int, ...], axes: Axes, hf: str, gguf: str, *, init: Init = "normal") -> ParamSpec:
    """The weight of a module, which has a name here, in Hugging Face checkpoints and in GGUF files."""
    return ParamSpec(f"{name}.weight", shape, axes, init, f"{hf}.weight", f"{gguf}.weight")


def _norm(c: LlamaConfig, name: str, hf: str, gguf: str) -> ParamSpec:
    return _weight(name, (c.hidden_size,), ("embed",), hf, gguf, init="ones")


def _linear(name: str, shape: tuple[int, int], bias: bool, hf: str, gguf: str) -> Iterator[ParamSpec]:
    axes = PROJECTION_AXES[name.rpartition(".")[2]]
    yield _weight(name, shape, axes, hf, gguf)
    if bias:
        yield ParamSpec(f"{name}.bias", shape[:1], axes[:1], "zeros", f"{hf}.bias", f"{gguf}.bias")


def _mlp(c: LlamaConfig, width: int, name: str, hf: str, gguf: str, bias: bool) -> Iterator[ParamSpec]:
    """gate, up and down of a dense MLP; "{}" in `gguf` is filled with each one's short name."""
    for short, shape in _mlp_shapes(c, width).items():
        yield from _linear(f"{name}.{short}_proj", shape, bias, f"{hf}.{short}_proj", gguf.format(short))


def _mlp_shapes(c: LlamaConfig, width: int) -> dict[str, tuple[int, int]]:
    return {"gate": (width, c.hidden_size), "up": (width, c.hidden_size), "down": (c.hidden_size, width)}


def _moe(c: LlamaConfig, moe: MoeSpec, name: str, hf: str, gguf: str) -> Iterator[ParamSpec]:
    if moe.router == "sigmoid":
        router = f"{hf}.feed_forward.router"
        experts = {s: f"{hf}.feed_forward.experts.{s}_proj" for s in ("gate", "up", "down")}
    else:
        router = f"{hf}.block_sparse_moe.gate"
        experts = {
            s: f"{hf}.block_sparse_moe.experts.{{e}}.{w}.weight"
            for s, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
        }
    shape = moe.num_experts, c.hidden_size
    yield _weight(f"{name}.router", shape, ("expert", "embed"), router, f"{gguf}.ffn_gate_inp")
    for short, matrix in _mlp_shapes(c, moe.intermediate_size).items():
        yield ParamSpec(
            f"{name}.experts.{short}_proj.weight",
            (moe.num_experts, *matrix),
            ("expert", *PROJECTION_AXES[f"{short}_proj"]),
            "normal",
            experts[short],
            f"{gguf}.ffn_{short}_exps.weight",
        )
    if moe.shared_intermediate_size:
        names = f"{name}.shared", f"{hf}.feed_forward.shared_expert", f"{gguf}.ffn_{{}}_shexp"
        yield from _mlp(c, moe.shared_intermediate_size, *names, False)


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Dotted names to the nested tree."""
    tree: Params = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The nested tree to dotted names; the inverse of `unflatten`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def by_leaf(tree: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The members of each leaf of a nested tree by dotted name."""
    found: dict[str, dict[str, Any]] = {}
    for path, x in flatten(tree).items():
        name, _, member = path.rpartition(".")
        found.setdefault(name, {})[member] = x
    return found


def abstract_params(config: LlamaConfig, dtype: Any = None) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves; dtype defaults to the config's."""
    dtype = jnp.dtype(dtype or config.dtype)
    return unflatten({s.name: jax.ShapeDtypeStruct(s.shape, s.dtype or dtype) for s in param_specs(config)})


def init_leaf(spec: ParamSpec, key: jax.Array, dtype: Any) -> jax.Array:
    """One freshly initialised leaf of the canonical table."""
    if spec.init == "normal":
        scale = spec.shape[-1] ** -0.5
        return (jax.random.normal(key, spec.shape, jnp.float32) * scale).astype(dtype)
    return (jnp.ones if spec.init == "ones" else jnp.zeros)(spec.shape, dtype)


def init_params(config: LlamaConfig, key: jax.Array, dtype: Any = None) -> Params:
    """Random parameters, each leaf from a key derived from its name, so that adding a leaf changes no other."""
    dtype = jnp.dtype(dtype or config.dtype)

    schemes, flat = _schemes(config), {}
    for spec in canonical_specs(config):
        leaf = init_leaf(spec, jax.random.fold_in(key, zlib.crc32(spec.name.encode())), dtype)
        scheme = _scheme(spec, schemes)
        members = {spec.path[-1]: leaf} if scheme is None else scheme.encode(leaf)
        flat.update({f"{spec.leaf}.{name}": member for name, member in members.items()})
    return unflatten(flat)


def projection_names(config: LlamaConfig) -> tuple[str, ...]:
    """Dotted names of the projections that can carry a low-rank adapter, e.g. "layers.0.attn.q_proj"; routed experts,
    which are stacks of matrices, cannot."""
    return tuple(s.leaf for s in canonical_specs(config) if len(s.shape) == 2 and s.name.endswith("_proj.weight"))


def count_params(config: LlamaConfig) -> int:
    """Number of weights, tied ones counted once, however they are stored."""
    return sum(s.size for s in canonical_specs(config))
