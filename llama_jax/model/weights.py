"""The only access to the weights: no other functions read the leaves of the parameter tree.

Only this module knows whether a leaf is plain or stored by a scheme, with or without a bias, with or without
adapters. A leaf with members that no scheme has is refused, whatever uses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.errors import RequestError
from llama_jax.kernels.integer_matmul import integer_matmul, multiplies
from llama_jax.kernels.lora import add_lora
from llama_jax.kernels.lora.reference import Part, plus
from llama_jax.kernels.moe import routed_experts
from llama_jax.kernels.moe.reference import Activation
from llama_jax.kernels.norm import add_rms_norm, rms_norm
from llama_jax.kernels.precision import matmul_precision
from llama_jax.kernels.quantized_matmul import quantized_matmul
from llama_jax.kernels.quantized_matmul.fused import Normed, fused_matmul, is_fused
from llama_jax.kernels.quantized_moe import quantized_experts
from llama_jax.kernels.quantized_moe.reference import used_experts
from llama_jax.model.adapters import ATTACHED, MEMBERS, NO_ADAPTERS, Adapters
from llama_jax.params import JOINT, PROJECTION_AXES, Params
from llama_jax.quantized.codes import in_order
from llama_jax.quantized.layout import ORDER
from llama_jax.schemes import PLAIN, Members, Scheme, scheme_of
from llama_jax.sharding import Axes, in_use, local, split_over

FEW_ROWS = 16
"""On the CPU, products of at most this many rows multiply as weight @ x."""


def product(x: jax.Array, weight: jax.Array, *, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """x [..., in] times weight [*out, in]: [..., *out], accumulated in float32, in `dtype`."""
    if weight.ndim > 2 and not in_use():
        # The CPU's compiler would make a transposed copy of the weight. On a mesh this might join dimensions across
        # what the devices have.
        out = product(x, weight.reshape(-1, weight.shape[-1]), dtype=dtype)
        return out.reshape(*x.shape[:-1], *weight.shape[:-1])
    precision = matmul_precision(x.dtype)

    def contract(a: jax.Array, b: jax.Array) -> jax.Array:
        last = (((a.ndim - 1,), (b.ndim - 1,)), ((), ()))
        return jax.lax.dot_general(a, b, last, precision=precision, preferred_element_type=dtype)

    def weight_first(x: jax.Array, weight: jax.Array) -> jax.Array:
        # The barrier keeps XLA from swapping the operands back.
        out = jax.lax.optimization_barrier(contract(weight, x.reshape(-1, x.shape[-1])))
        return jnp.moveaxis(out, -1, 0).reshape(*x.shape[:-1], *weight.shape[:-1])

    # XLA's CPU library rearranges the right operand before it multiplies. Of a large weight and a few tokens (decoding
    # a batch) that should be the tokens: a step of SmolLM2-135M at batch 8 takes 51 ms so, 64 ms the other way.
    if 1 < math.prod(x.shape[:-1]) <= FEW_ROWS:
        return jax.lax.platform_dependent(x, weight, cpu=weight_first, default=contract)
    return contract(x, weight)


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in] times weight [*out, in], accumulated in float32, in x's dtype.

    The product itself is in that dtype: a float32 one would be written out, read and rounded by a second kernel (a
    tenth of a long prefill of bfloat16 on an H100), and its all-reduce would send twice the bytes.
    """
    return product(x, weight, dtype=x.dtype)


def _taken_apart(leaf: Params) -> tuple[Scheme, Members, jax.Array | None]:
    """The scheme of a leaf, the members of its weight, and its bias."""
    return scheme_of(leaf), {name: leaf[name] for name in leaf if name != "bias"}, leaf.get("bias")


def _unbiased(leaf: Params) -> tuple[Scheme, Members]:
    scheme, members, bias = _taken_apart(leaf)
    if bias is not None:
        raise RequestError(
            "a leaf of the parameters has a bias that nothing would add",
            param="params",
            hint="only projections can have one: neither embeddings, norms, routers nor routed experts",
        )
    return scheme, members


def _times(
    x: jax.Array, scheme: Scheme, members: Members, axes: Axes | None, dtype: DTypeLike, activations: str | None
) -> jax.Array:
    """x [..., in] times a weight [*out, in] with these logical axes: [..., *out] in `dtype`."""
    if (layout := scheme.layout) is not None:
        integers = activations is not None and multiplies(layout)
        x, members = in_order(x, members), {name: member for name, member in members.items() if name != ORDER}

        def multiply(x: jax.Array, members: Members) -> jax.Array:
            operation = integer_matmul if integers else quantized_matmul
            return operation(x, members, layout=layout, dtype=dtype)

        # A row of inputs in int8 has one scale, whose number every device would have to know.
        if axes is None or (integers and layout.group is None and split_over(axes[-1] or "", x.shape[-1])):
            return multiply(x, members)
        return _on_parts(multiply, x, members, scheme, axes)
    if scheme.product is not None:
        return scheme.product(x, members, dtype)
    return product(x, scheme.decode(members, x.dtype), dtype=dtype)


def _on_parts(
    multiply: Callable[[jax.Array, Members], jax.Array], x: jax.Array, members: Members, scheme: Scheme, axes: Axes
) -> jax.Array:
    """The product by each device with its part of the weight, rows or columns of it, which no kernel could be split
    into by XLA. Parts of columns end in an all-reduce, in the dtype of the product."""
    *out, inner = axes
    lead = ("batch", *[None] * (x.ndim - 2)) if x.ndim > 1 else ()
    of_members = {name: found for name, found in scheme.axes(axes).items() if name in members}
    arguments = {"x": x, "members": dict(members)}
    result: jax.Array = local(
        multiply, arguments, {"x": (*lead, inner), "members": of_members}, (*lead, *out), summed=inner
    )
    return result


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pending:
    """A projection of x [..., in] by the weight of a leaf, left to the residual sum and the norm that follow it."""

    x: jax.Array
    leaf: Params

    def value(self) -> jax.Array:
        """The projection itself: [..., out]."""
        return linear(self.x, self.leaf)


def pending(
    x: jax.Array, leaf: Params, residual: jax.Array, adapters: Adapters = NO_ADAPTERS, activations: str | None = None
) -> Pending | None:
    """The projection of x [..., in], where a kernel computes it together with the sum with the residual [..., out] and
    what the norm of that needs (`add_norm`); else None."""
    gain = jax.ShapeDtypeStruct(residual.shape[-1:], residual.dtype)
    fused = _fusible(x, leaf, adapters, activations, residual=residual, gain=gain)
    return Pending(x, leaf) if fused else None


def _fusible(x: jax.Array, leaf: Params, adapters: Adapters, activations: str | None, **around: Any) -> bool:
    """Whether a kernel multiplies by the weight of a leaf and does what is `around` it (`kernels...fused`)."""
    scheme, members, bias = _taken_apart(leaf)
    if bias is not None or adapters.tree or in_use() or not (scheme is PLAIN or scheme.layout):
        return False
    if activations is not None and scheme.layout is not None and multiplies(scheme.layout):
        return False
    return is_fused(x, members, layout=scheme.layout, **around)


def _fused(x: jax.Array, leaf: Params, **around: Any) -> Any:
    scheme, members, _ = _taken_apart(leaf)
    x = x if scheme.layout is None else in_order(x, members)
    return fused_matmul(x, members, layout=scheme.layout, **around)


def add_norm(
    x: jax.Array, delta: jax.Array | Pending | None, leaf: Params, eps: float, *, whole: bool = False
) -> tuple[jax.Array, jax.Array | Normed]:
    """x + delta and its norm; without delta x itself.

    Args:
      leaf: of the norm.
      whole: the norm itself is wanted, of which the product that follows would else do a part.
    """
    weight = norm_weight(leaf)
    if delta is None:
        return x, rms_norm(x, weight, eps)
    if isinstance(delta, Pending) and not whole:
        total, gained, squares = _fused(delta.x, delta.leaf, residual=x, gain=weight)
        return total, Normed(gained, squares, eps)
    return add_rms_norm(x, delta.value() if isinstance(delta, Pending) else delta, weight, eps=eps)


def compute_dtype(params: Params) -> jnp.dtype:
    """The compute dtype of a model: that of its embedding, or, if a scheme stores that, of its last norm."""
    plain = scheme_of(params["embed"]) is PLAIN
    return params["embed" if plain else "final_norm"]["weight"].dtype


def linear(
    x: jax.Array | Normed,
    leaf: Params,
    adapters: Adapters = NO_ADAPTERS,
    activations: str | None = None,
    *,
    axes: Axes | None = None,
) -> jax.Array:
    """Every projection of the model: x [..., in] -> [..., out].

    Args:
      leaf: the members of a weight [out, in], {"weight"} of a plain one, and, if the projection has one, "bias" [out].
        Joint projections (`llama_jax.model.fuse`) have several dimensions in place of `out`.
      adapters: of this projection.
      activations: of `LlamaConfig`.
      axes: logical axes of the weight, for a quantised one on a mesh: each device then multiplies by its own part,
        x being [batch, ..., in]. None leaves that to XLA.
    """
    if isinstance(x, Normed):
        around = {"squares": x.squares, "eps": x.eps}
        if _fusible(x.gained, leaf, adapters, activations, **around):
            out: jax.Array = _fused(x.gained, leaf, **around)
            return out
        x = x.value()
    scheme, members, bias = _taken_apart(leaf)
    out = _times(x, scheme, members, axes, x.dtype, activations)
    if bias is not None:
        out = out + bias.astype(x.dtype)
    return _adapted(out, x, adapters)


def gated(
    x: jax.Array | Normed,
    params: Params,
    activation: Activation,
    adapters: Adapters = NO_ADAPTERS,
    activations: str | None = None,
) -> jax.Array:
    """activation(gate(x)) * up(x): x [..., in] -> [..., mlp]. Arguments as for `joint`."""
    leaf, own = params.get("gate_up_proj"), [adapters.of(part) for part in JOINT["gate_up_proj"]]
    if leaf is not None and isinstance(x, Normed) and not any(each.tree for each in own):
        around = {"squares": x.squares, "eps": x.eps, "activation": activation}
        if _fusible(x.gained, leaf, NO_ADAPTERS, activations, **around):
            out: jax.Array = _fused(x.gained, leaf, **around)
            return out
    if leaf is not None and all(each.mixed for each in own):
        return joined(x, params, "gate_up_proj", adapters, activations, activation=activation)
    gate, up = joint(x, params, "gate_up_proj", adapters, activations)
    return activation(gate) * up


def joint(
    x: jax.Array | Normed, params: Params, name: str, adapters: Adapters = NO_ADAPTERS, activations: str | None = None
) -> tuple[jax.Array, ...]:
    """Projections that share their input: x [..., in] -> [..., out] of each of `JOINT[name]`.

    Args:
      params: holds either these, or the joint one `name` that `llama_jax.model.fuse` made of them.
      activations: of `LlamaConfig`.
    """
    parts = JOINT[name]
    if name not in params:
        x = x.value() if isinstance(x, Normed) else x
        return tuple(
            linear(x, params[part], adapters.of(part), activations, axes=PROJECTION_AXES[part]) for part in parts
        )
    out = joined(x, params, name, adapters, activations)
    lead = (x.gained if isinstance(x, Normed) else x).shape[:-1]
    split = (out[..., first:last, :].reshape(*lead, -1) for first, last in _places(name, out))
    return tuple(_changed(y, adapters.of(part)) for y, part in zip(split, parts, strict=True))


def joined(
    x: jax.Array | Normed,
    params: Params,
    name: str,
    adapters: Adapters = NO_ADAPTERS,
    activations: str | None = None,
    *,
    activation: Activation | None = None,
) -> jax.Array:
    """The projections of `joint` in one array, by the leaf that `llama_jax.model.fuse` made: queries, keys and values
    [..., kv_heads, group + 2, head_dim], of each key/value head its queries, its key, its value; gate and up [..., 2,
    mlp]. Of adapters it has the low-rank terms, neither gains nor shifts.

    Args:
      activation: for gate and up that both have slots: the result is activation(gate) * up, [..., mlp].
    """
    own = [adapters.of(part) for part in JOINT[name]]
    if isinstance(x, Normed) and any(each.tree for each in own):
        x = x.value()
    out = linear(x, params[name], activations=activations, axes=PROJECTION_AXES[name])
    if isinstance(x, Normed):
        return out
    return _with_low_rank(out, x, dict(zip(_places(name, out), own, strict=True)), activation)


def _places(name: str, out: jax.Array) -> tuple[Part, ...]:
    """Where on the next to last axis of `joined` the projections are."""
    n = out.shape[-2]
    return ((0, n - 2), (n - 2, n - 1), (n - 1, n)) if name == "qkv_proj" else ((0, 1), (1, 2))


def _adapted(out: jax.Array, x: jax.Array, adapters: Adapters) -> jax.Array:
    """`out` [..., out] of a projection of `x` [..., in], as adapters change it (`model.adapters`), in its own dtype."""
    return _changed(_with_low_rank(out[..., None, :], x, {(0, 1): adapters})[..., 0, :], adapters)


def _changed(out: jax.Array, adapters: Adapters) -> jax.Array:
    """A projection [..., out] with the gain and the shift of its adapters, in its own dtype."""
    dtype = out.dtype
    if "gain" in adapters.tree:
        out = out * adapters.own("gain", 1.0)
    if "shift" in adapters.tree:
        out = out + adapters.own("shift", 0.0)
    return out.astype(dtype)


def _with_low_rank(
    out: jax.Array, x: jax.Array, adapters: Mapping[Part, Adapters], activation: Activation | None = None
) -> jax.Array:
    """Projections of `x` [..., in] in one array, with what low-rank adapters of its parts add (`kernels.lora`)."""
    adapters = {part: each for part, each in adapters.items() if each.tree}
    slots = tuple({name: each.tree[name] for name in MEMBERS} for each in adapters.values())
    ids = next((each.ids for each in adapters.values()), None)
    if ids is not None:
        return add_lora(out, x, slots, ids, parts=tuple(adapters), activation=activation)
    for part, one in zip(adapters, slots, strict=True):  # of all tokens, without the axis of slots
        a, b = (one[name].astype(x.dtype) for name in ("a", "b"))
        out = plus(out, matmul((matmul(x, a) * one["scale"]).astype(x.dtype), b), part)
    return out


def embedding(params: Params, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Embeddings of tokens int32 [batch, len]: [batch, len, hidden]."""
    out = lookup(params["embed"], tokens, dtype)
    adapter = params.get(ATTACHED, {}).get("embed")
    if adapter is None:
        return out
    inner = jnp.moveaxis(adapter["a"][:, tokens], 0, -1) * adapter["scale"]
    return out + matmul(inner.astype(dtype), adapter["b"].astype(dtype))


def lookup(leaf: Params, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rows `tokens` int32 [batch, len] of a table [vocab, hidden]: [batch, len, hidden].

    Where the vocabulary is split, each device looks up what it has and the results are added up: for a single token XLA
    would rather send the whole table to all devices.
    """
    scheme, table = _unbiased(leaf)
    axes = scheme.axes(("vocab", "embed"))
    (member, *_) = (name for name, names in axes.items() if names[0] == "vocab")

    def rows(table: Members, tokens: jax.Array) -> jax.Array:
        return scheme.decode(table, dtype)[tokens] if scheme.lookup is None else scheme.lookup(table, tokens, dtype)

    axis = split_over("vocab", table[member].shape[0])
    if axis is None:
        return rows(table, tokens)

    def own(table: Members, tokens: jax.Array) -> jax.Array:
        size = table[member].shape[0]
        row = tokens - jax.lax.axis_index(axis) * size
        here = (row >= 0) & (row < size)
        return jnp.where(here[..., None], rows(table, jnp.where(here, row, 0)), 0)

    arguments = {"table": table, "tokens": tokens}
    return local(own, arguments, {"table": axes, "tokens": ("batch",)}, ("batch",), summed="vocab")


def logits(
    x: jax.Array,
    params: Params,
    *,
    tied: bool,
    adapters: Adapters = NO_ADAPTERS,
    activations: str | None = None,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """x [..., hidden] -> [..., vocab], by the output projection, or by the embedding that it is tied to.

    Args:
      adapters: in slots, of the output projection; an adapter that `params` hold needs none.
    """
    out = _times(x, *_unbiased(params["embed" if tied else "lm_head"]), ("vocab", "embed"), dtype, activations)
    adapter = adapters if adapters.tree else Adapters(params.get(ATTACHED, {}), None).of("lm_head")
    return _adapted(out, x, adapter)


def router(x: jax.Array, leaf: Params) -> jax.Array:
    """x [tokens, hidden] -> logits float32 [tokens, experts], multiplied in float32 whatever the dtypes."""
    scheme, members = _unbiased(leaf)
    weight = scheme.decode(members, jnp.float32).astype(jnp.float32)
    return jnp.einsum("nh,eh->ne", x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)


def experts(
    x: jax.Array,
    expert_ids: jax.Array,
    leaves: Params,
    *,
    activation: Activation,
    input_scale: jax.Array | None,
    output_scale: jax.Array | None,
) -> jax.Array:
    """Routed experts (`kernels.moe.routed_experts`) with the weights of "gate_proj", "up_proj" and "down_proj".

    Weights in a layout of `llama_jax.quantized` go to `kernels.quantized_moe`. Of weights that another scheme stores,
    or whose columns have an order, only the used experts' are decoded, where a few tokens use fewer than there are.
    """
    schemes, stored = zip(*(_unbiased(leaves[name]) for name in ("gate_proj", "up_proj", "down_proj")), strict=True)
    how: dict[str, Any] = {"activation": activation, "input_scale": input_scale, "output_scale": output_scale}
    gate, up, down = (scheme.layout for scheme in schemes)
    if gate is not None and gate == up and down is not None and not any(ORDER in members for members in stored):
        return quantized_experts(x, expert_ids, *stored, layouts=(gate, down), **how)
    if any(scheme is not PLAIN for scheme in schemes):
        expert_ids, stored = used_experts(expert_ids, *stored)
    weights = [scheme.decode(members, x.dtype) for scheme, members in zip(schemes, stored, strict=True)]
    return routed_experts(x, expert_ids, *weights, **how)


def norm_weight(leaf: Params) -> jax.Array:
    """The weight of a norm, which is always plain."""
    if _unbiased(leaf)[0] is not PLAIN:
        raise RequestError(
            f"a norm has the members {sorted(leaf)}", param="params", hint='norms are plain: give {"weight"}'
        )
    return leaf["weight"]
