"""Pure functions that look into one forward pass; all of them can be jitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError
from llama_jax.kernels.precision import matmul_precision
from llama_jax.model import Patch, forward, patch, unembed
from llama_jax.model.activations import NO_PATCH, ON_DEMAND, matching_names
from llama_jax.model.adapters import ATTACHED
from llama_jax.params import Params, flatten
from llama_jax.schemes import scheme_of


def attention_maps(
    params: Params,
    config: LlamaConfig,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    *,
    layers: Sequence[int] | None = None,
    patch: Patch | None = None,
) -> jax.Array:
    """Attention's weights: how much each token takes from each other one.

    Kernels never hold them, so these layers compute attention by the float32 reference.

    Args:
      tokens, positions: as for `forward`.
      layers: indices; all by default. Each needs batch * num_heads * len * len * 4 bytes.

    Returns:
      float32 [layers, batch, num_heads, len, len]; a row adds up to 1, or is 0 for padding.

    Raises:
      RequestError: there is no such layer.
    """
    names = [f"layers.{i}.{ON_DEMAND}" for i in _layers(config, layers)]
    _, _, seen = forward(params, config, tokens, positions, patch=patch, capture=names)
    return jnp.stack([seen[name] for name in names])


def logit_lens(
    params: Params,
    config: LlamaConfig,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    *,
    layers: Sequence[int] | None = None,
    at: jax.Array | None = None,
    patch: Patch | None = None,
) -> jax.Array:
    """Predictions of the model if it ended behind each layer (nostalgebraist, "interpreting GPT: the logit lens").

    Args:
      tokens, positions: as for `forward`.
      layers: indices; all by default. The last one gives the model's own logits.
      at: int32 [batch, n], indices of the tokens to predict from; by default the last, [batch, 1].

    Returns:
      logits float32 [layers, batch, n, vocab_size].

    Raises:
      RequestError: there is no such layer.
    """
    names = [f"layers.{i}.out" for i in _layers(config, layers)]
    _, _, seen = forward(params, config, tokens, positions, patch=patch, capture=names)
    if at is None:
        at = jnp.full((tokens.shape[0], 1), tokens.shape[1] - 1, jnp.int32)
    hidden = jnp.stack([jnp.take_along_axis(seen[name], at[:, :, None], axis=1) for name in names])
    return jax.lax.map(lambda x: unembed(params, config, x, norm=True), hidden)


def head_outputs(params: Params, config: LlamaConfig, layer: int, heads: jax.Array) -> jax.Array:
    """The contribution of each head of a layer to the residual stream; their sum, and any bias, is "attn_out".

    An adapter that is attached to the parameters is part of it.

    Args:
      heads: activation "layers.{layer}.attn_heads", [batch, len, num_heads, head_dim].

    Returns:
      float32 [batch, len, num_heads, hidden_size].

    Raises:
      RequestError: there is no such layer.
    """
    _layers(config, [layer])
    leaf = params["layers"][str(layer)]["attn"]["o_proj"]
    scheme = scheme_of(leaf)
    weight = scheme.decode({name: leaf[name] for name in scheme.members}, jnp.float32).astype(jnp.float32)
    precision = matmul_precision(jnp.float32)
    if adapter := flatten(params.get(ATTACHED, {})):
        its = {name.rpartition(".")[2]: x for name, x in adapter.items() if f"layers.{layer}.attn.o_proj." in name}
        if its:
            moved = jnp.matmul(*(its[m].astype(jnp.float32) for m in ("b", "a")), precision=precision)
            weight = (weight + its["scale"] * moved) * its.get("gain", jnp.ones(1))[:, None]
    each = weight.reshape(config.hidden_size, *heads.shape[2:])
    return jnp.einsum("blhd,ehd->blhe", heads.astype(jnp.float32), each, precision=precision)


def activation_gradients(
    loss: Callable[[jax.Array], jax.Array],
    params: Params,
    config: LlamaConfig,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    *,
    names: Sequence[str],
    patch: Patch | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A loss of the logits, and its gradient with respect to activations.

    Args:
      loss: function of logits float32 [batch, len, vocab_size] that returns a scalar.
      tokens, positions: as for `forward`.
      names: activations, or patterns of them; gradients are with respect to them as they are after `patch`.

    Returns:
      The loss, and a gradient of each activation's shape and dtype, by its name.

    Raises:
      RequestError: a name matches no activation.
    """
    every = [name for found in matching_names(config, names, param="names").values() for name in found]

    def run(given: Params, tokens: jax.Array) -> dict[str, jax.Array]:
        return forward(given, config, tokens, positions, patch=patch, capture=every)[2]

    shapes = jax.eval_shape(run, params, tokens)

    def moved(by: dict[str, jax.Array]) -> jax.Array:
        changes = patch or NO_PATCH
        for name, x in by.items():
            changes |= _added(name, x)
        return loss(forward(params, config, tokens, positions, patch=changes)[0])

    return jax.value_and_grad(moved)({name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()})


def _added(name: str, x: jax.Array) -> Patch:
    return patch({name: _plus}, x)


def _plus(x: jax.Array, _: object, by: jax.Array) -> jax.Array:
    return x + by


def _layers(config: LlamaConfig, layers: Sequence[int] | None) -> Sequence[int]:
    found = range(config.num_layers) if layers is None else layers
    if not found:
        raise RequestError("no layer is named", param="layers", hint="leave layers out for all of them")
    for i in found:
        if not 0 <= i < config.num_layers:
            raise RequestError(
                f"layer {i} of a model with {config.num_layers}",
                param="layers",
                hint=f"give indices from 0 to {config.num_layers - 1}",
            )
    return found
