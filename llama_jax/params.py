"""The one table of parameters: names, shapes, logical axes, initialisers and the names other formats use.

`param_specs(config)` alone drives initialisation, abstract shapes, sharding, conversion and the memory plan. Weights of
projections are stored `[out, in]`, as in Hugging Face checkpoints, so that converting one is a copy of its bytes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig, MoeSpec
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
    """

    name: str
    shape: tuple[int, ...]
    axes: Axes
    init: Init
    hf: str
    gguf: str

    @property
    def path(self) -> tuple[str, ...]:
        return tuple(self.name.split("."))

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def param_specs(config: LlamaConfig) -> tuple[ParamSpec, ...]:
    """Every leaf of a model's parameter tree, in the order of the forward pass."""
    return tuple(_specs(config))


def _specs(c: LlamaConfig) -> Iterator[ParamSpec]:
    yield ParamSpec(
        "embed.weight",
        (c.vocab_size, c.hidden_size),
        ("vocab", "embed"),
        "normal",
        "model.embed_tokens.weight",
        "token_embd.weight",
    )
    for i, layer in enumerate(c.layers):
        ours, hf, gguf = f"layers.{i}", f"model.layers.{i}", f"blk.{i}"
        yield _norm(c, f"{ours}.attn_norm", f"{hf}.input_layernorm", f"{gguf}.attn_norm")
        for name, out, bias, gguf_name in (
            ("q_proj", c.q_dim, c.qkv_bias, "attn_q"),
            ("k_proj", c.kv_dim, c.qkv_bias, "attn_k"),
            ("v_proj", c.kv_dim, c.qkv_bias, "attn_v"),
        ):
            yield from _linear(
                f"{ours}.attn.{name}",
                (out, c.hidden_size),
                bias,
                f"{hf}.self_attn.{name}",
                f"{gguf}.{gguf_name}",
            )
        if layer.qk_norm == "rms":
            for name in ("q_norm", "k_norm"):
                yield ParamSpec(
                    f"{ours}.attn.{name}.weight",
                    (c.head_dim,),
                    ("head_dim",),
                    "ones",
                    f"{hf}.self_attn.{name}.weight",
                    f"{gguf}.attn_{name}.weight",
                )
        yield from _linear(
            f"{ours}.attn.o_proj",
            (c.hidden_size, c.q_dim),
            c.o_bias,
            f"{hf}.self_attn.o_proj",
            f"{gguf}.attn_output",
        )
        yield _norm(c, f"{ours}.mlp_norm", f"{hf}.post_attention_layernorm", f"{gguf}.ffn_norm")
        if isinstance(layer.mlp, MoeSpec):
            yield from _moe(c, layer.mlp, f"{ours}.moe", hf, gguf)
        else:
            yield from _mlp(c, layer.mlp, f"{ours}.mlp", f"{hf}.{c.hf_mlp_module}", f"{gguf}.ffn_{{}}", c.mlp_bias)
    yield _norm(c, "final_norm", "model.norm", "output_norm")
    if not c.tie_word_embeddings:
        yield ParamSpec(
            "lm_head.weight",
            (c.vocab_size, c.hidden_size),
            ("vocab", "embed"),
            "normal",
            "lm_head.weight",
            "output.weight",
        )


def _norm(c: LlamaConfig, name: str, hf: str, gguf: str) -> ParamSpec:
    return ParamSpec(f"{name}.weight", (c.hidden_size,), ("embed",), "ones", f"{hf}.weight", f"{gguf}.weight")


def _linear(name: str, shape: tuple[int, int], bias: bool, hf: str, gguf: str) -> Iterator[ParamSpec]:
    axes = PROJECTION_AXES[name.rpartition(".")[2]]
    yield ParamSpec(f"{name}.weight", shape, axes, "normal", f"{hf}.weight", f"{gguf}.weight")
    if bias:
        yield ParamSpec(f"{name}.bias", shape[:1], axes[:1], "zeros", f"{hf}.bias", f"{gguf}.bias")


def _mlp(c: LlamaConfig, width: int, name: str, hf: str, gguf: str, bias: bool) -> Iterator[ParamSpec]:
    """gate, up and down of a dense MLP; "{}" in `gguf` is filled with each one's short name."""
    for short in ("gate", "up", "down"):
        shape = (c.hidden_size, width) if short == "down" else (width, c.hidden_size)
        yield from _linear(f"{name}.{short}_proj", shape, bias, f"{hf}.{short}_proj", gguf.format(short))


def _moe(c: LlamaConfig, moe: MoeSpec, name: str, hf: str, gguf: str) -> Iterator[ParamSpec]:
    if moe.router == "sigmoid":
        router = f"{hf}.feed_forward.router.weight"
        experts = {s: f"{hf}.feed_forward.experts.{s}_proj" for s in ("gate", "up", "down")}
    else:
        router = f"{hf}.block_sparse_moe.gate.weight"
        experts = {
            s: f"{hf}.block_sparse_moe.experts.{{e}}.{w}.weight"
            for s, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
        }
    yield ParamSpec(
        f"{name}.router.weight",
        (moe.num_experts, c.hidden_size),
        ("expert", "embed"),
        "normal",
        router,
        f"{gguf}.ffn_gate_inp.weight",
    )
    for short in ("gate", "up", "down"):
        width = moe.intermediate_size
        shape = (c.hidden_size, width) if short == "down" else (width, c.hidden_size)
        yield ParamSpec(
            f"{name}.experts.{short}_proj.weight",
            (moe.num_experts, *shape),
            ("expert", *PROJECTION_AXES[f"{short}_proj"]),
            "normal",
            experts[short],
            f"{gguf}.ffn_{short}_exps.weight",
        )
    if moe.shared_intermediate_size:
        yield from _mlp(
            c,
            moe.shared_intermediate_size,
            f"{name}.shared",
            f"{hf}.feed_forward.shared_expert",
            f"{gguf}.ffn_{{}}_shexp",
            False,
        )


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


def abstract_params(config: LlamaConfig, dtype: Any = None) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves; dtype defaults to the config's."""
    dtype = jnp.dtype(dtype or config.dtype)
    return unflatten({s.name: jax.ShapeDtypeStruct(s.shape, dtype) for s in param_specs(config)})


def init_leaf(spec: ParamSpec, key: jax.Array, dtype: Any) -> jax.Array:
    """One freshly initialised leaf."""
    if spec.init == "normal":
        scale = spec.shape[-1] ** -0.5
        return (jax.random.normal(key, spec.shape, jnp.float32) * scale).astype(dtype)
    return (jnp.ones if spec.init == "ones" else jnp.zeros)(spec.shape, dtype)


def init_params(config: LlamaConfig, key: jax.Array, dtype: Any = None) -> Params:
    """Random parameters, each leaf from a key that its name gives, so that adding a leaf changes no other."""
    dtype = jnp.dtype(dtype or config.dtype)

    def leaf(spec: ParamSpec) -> jax.Array:
        return init_leaf(spec, jax.random.fold_in(key, zlib.crc32(spec.name.encode())), dtype)

    return unflatten({spec.name: leaf(spec) for spec in param_specs(config)})


def projection_names(config: LlamaConfig) -> tuple[str, ...]:
    """Dotted names of the projections that can carry a low-rank adapter, e.g. "layers.0.attn.q_proj"; routed experts,
    which are stacks of matrices, cannot."""
    names = (s.name for s in param_specs(config) if len(s.shape) == 2)
    return tuple(name.removesuffix(".weight") for name in names if name.endswith("_proj.weight"))


def count_params(config: LlamaConfig) -> int:
    """Number of weights, tied ones counted once."""
    return sum(s.size for s in param_specs(config))
