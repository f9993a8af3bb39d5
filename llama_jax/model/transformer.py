"""The forward pass: one pure function for training, prefill and decode."""

from __future__ import annotations

from collections.abc import Container, Sequence
from functools import partial
from typing import Any, overload

import jax
import jax.numpy as jnp

from llama_jax.cache import KVCache, LayerCache
from llama_jax.cache.protocol import Queries
from llama_jax.config import LayerSpec, LlamaConfig, MoeSpec
from llama_jax.errors import RequestError
from llama_jax.kernels.attention import KeysValues, Places, Rule, Visibility, attention, is_batch_invariant
from llama_jax.model.activations import (
    LAYER_ACTIVATIONS,
    NO_PATCH,
    ON_DEMAND,
    Patch,
    Place,
    Tap,
    matching_names,
)
from llama_jax.model.adapters import Adapters, adapters_of
from llama_jax.model.attention_map import attention_probs, weighted_values
from llama_jax.model.head import unembed
from llama_jax.model.layers import (
    Dims,
    hidden_units,
    joint_heads,
    moe,
    position_queries_and_keys,
    project,
    project_qkv,
)
from llama_jax.model.remat import rematerialised
from llama_jax.model.rope import rope_angles
from llama_jax.model.weights import Pending, add_norm, compute_dtype, embedding
from llama_jax.params import Params
from llama_jax.sharding import constrain

ACTIVATION_AXES = ("batch", "length", "embed")
"""Axes of the hidden states between blocks: each device has all rows, so that a block ends in one all-reduce."""


@overload
def forward[MaybeCache: KVCache | None](
    params: Params,
    config: LlamaConfig,
    tokens: jax.Array | None,
    positions: jax.Array | None = None,
    cache: MaybeCache = None,  # type: ignore[assignment]
    *,
    inputs_embeds: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    rows: jax.Array | None = None,
    chunk_rows: int | None = None,
    rope_lengths: jax.Array | None = None,
    adapters: Params | None = None,
    adapter_ids: jax.Array | None = None,
    logits_at: jax.Array | None = None,
    remat: str = "none",
    patch: Patch | None = None,
    capture: None = None,
) -> tuple[jax.Array, MaybeCache]: ...


@overload
def forward[MaybeCache: KVCache | None](
    params: Params,
    config: LlamaConfig,
    tokens: jax.Array | None,
    positions: jax.Array | None = None,
    cache: MaybeCache = None,  # type: ignore[assignment]
    *,
    inputs_embeds: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    rows: jax.Array | None = None,
    chunk_rows: int | None = None,
    rope_lengths: jax.Array | None = None,
    adapters: Params | None = None,
    adapter_ids: jax.Array | None = None,
    logits_at: jax.Array | None = None,
    remat: str = "none",
    patch: Patch | None = None,
    capture: Sequence[str],
) -> tuple[jax.Array, MaybeCache, dict[str, jax.Array]]: ...


def forward(
    params: Params,
    config: LlamaConfig,
    tokens: jax.Array | None,
    positions: jax.Array | None = None,
    cache: Any = None,
    *,
    inputs_embeds: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    rows: jax.Array | None = None,
    chunk_rows: int | None = None,
    rope_lengths: jax.Array | None = None,
    adapters: Params | None = None,
    adapter_ids: jax.Array | None = None,
    logits_at: jax.Array | None = None,
    remat: str = "none",
    patch: Patch | None = None,
    capture: Sequence[str] | None = None,
) -> Any:
    """Runs the model over tokens, after those that a cache already holds.

    Pure and differentiable in `params`, `inputs_embeds`, `adapters` and `patch`. It computes in
    `weights.compute_dtype(params)`.

    Args:
      params: parameter tree (`llama_jax.params`), canonical or fused; with an adapter for all tokens, if one is
        attached (`llama_jax.adapters.attach`).
      tokens: int32 [batch, len], or None with `inputs_embeds`.
      positions: int32 [batch, len], each token's position in its own text; negative marks padding, which no other
        token sees. Default: 0, 1, 2, ... (from the start of each segment with `segment_ids`).
      cache: a `KVCache` with room for `len` more tokens, or None.
      inputs_embeds: [batch, len, hidden_size] in place of the tokens' embeddings.
      segment_ids: int32 [batch, len] of several texts packed in one row; they do not see each other. Not with a cache.
      rows: int32 [1, len], the row of the cache that each token belongs to, if `tokens` [1, len] packs any number of
        tokens of several rows. Only with a cache that takes packed tokens.
      chunk_rows: a guarantee that at most N of these rows have more than one token, which saves memory in attention. If
        it is broken, logits may be NaN.
      rope_lengths: int32 [batch], or with `rows` [rows of the cache]: the text lengths that fix the frequencies of
        dynamic rope, constant over the calls with a cache. By default, without a cache, the length of each text.
      adapters: low-rank adapters in slots (`llama_jax.model.adapters`), a tree shaped like the canonical `params` with
        {"a" [slots, rank, in], "b" [slots, rank, out], "scale" [slots]} in place of projections.
      adapter_ids: int32 [batch, len], the slot that each token uses, or [batch, 1] for whole rows; 0 is none.
      logits_at: int32 [batch, n] (with `rows` [1, n]), indices in 0..len-1 to compute logits for; by default all.
        In the last layer, other tokens are computed up to their keys and values only.
      remat: what gradients keep of each layer and what they recompute, a name in `remat.REMAT`.
      patch: functions that change activations (`model.activations.patch`).
      capture: names from `activation_names(config)`, or patterns of them ("layers.*.out"), of activations to return as
        a third result, after any patch.

    Returns:
      logits float32 [batch, len or n, vocab_size], the cache with the tokens in it (None without one), and with
      `capture` a dict of the named activations.

    Raises:
      RequestError: arguments that contradict each other, adapters that do not fit, an unknown name in `capture`,
        `patch`, `adapters` or `remat`, a patch that changes a shape, or a leaf of `params` with members that no scheme
        has.
    """
    x = _embed(params, tokens, inputs_embeds)
    if rows is not None and (cache is None or rows.shape != x.shape[:2] or len(rows) != 1):
        raise RequestError(
            "packed tokens are int32 [1, len], with a row for each of them and a cache",
            param="rows",
            hint="without a cache pack texts with segment_ids",
        )
    in_order = positions is None and segment_ids is None
    positions = _positions(x, positions, segment_ids, cache)
    wanted = {name for names in matching_names(config, capture or (), param="capture").values() for name in names}
    patches = (patch or NO_PATCH).by_name(config)
    if cache is not None and any(name.endswith(ON_DEMAND) for name in (*wanted, *patches)):
        raise RequestError(
            f"{ON_DEMAND} cannot be had with a cache, which gives no attention weights",
            param="capture",
            hint="run the whole text without a cache",
        )
    captured, changed = [_of_layers(config, names) for names in (wanted, patches)]
    outside = Tap(tuple(wanted), patches, Place(None, positions, segment_ids))
    x = outside("embed", x)
    seen = dict(outside.seen)

    lengths = _rope_lengths(config, positions, segment_ids, rows, rope_lengths, cached=cache is not None)
    angles = rope_angles(config.rope, config.head_dim, positions, lengths)
    slots = None
    if cache is not None:
        cache, slots = cache.extend(positions, rows)

    adapted = adapters_of(params, adapters, adapter_ids, config, *x.shape[:2])
    of_layers = adapted.of("layers")
    views = []
    delta = None
    # Behind the keys and values of the last layer nothing is needed of the other tokens.
    only_last = logits_at is not None and not captured[-1] and not changed[-1]
    for i, spec in enumerate(config.layers):
        # Around the call and not within: what names the layer must not keep equal layers from sharing a trace.
        with jax.named_scope(f"layers.{i}"):
            layer = partial(
                _layer,
                spec=spec,
                dims=Dims.of(config),
                capture=captured[i],
                in_order=in_order,
                chunk_rows=chunk_rows,
            )
            x, delta, view, activations = rematerialised(layer, remat)(
                x,
                delta,
                params["layers"][str(i)],
                None if cache is None else cache.layer(i),
                slots,
                Queries(positions, rows, segment_ids),
                angles,
                of_layers.of(str(i)),
                logits_at if only_last and i == config.num_layers - 1 else None,
                {name: patches[f"layers.{i}.{name}"] for name in changed[i]},
                jnp.int32(i) if changed[i] else None,
            )
        views.append(view)
        seen |= {f"layers.{i}.{name}": value for name, value in activations.items()}
    if cache is not None:
        cache = cache.with_layers(views)

    if not only_last:
        x, delta = _tokens((x, delta), logits_at)
    with jax.named_scope("final_norm"):
        _, h = add_norm(x, delta, params["final_norm"], config.rms_norm_eps, whole=True)
    queries = Queries(positions, None, segment_ids)
    last = _tokens(queries, logits_at)
    behind = Tap(tuple(wanted), patches, Place(None, last.positions, last.segments))
    h = behind("final_norm", h)
    out = unembed(params, config, h, adapters=adapted.of("lm_head").at(logits_at))
    return (out, cache) if capture is None else (out, cache, seen | behind.seen)


def _of_layers(config: LlamaConfig, names: Container[str]) -> list[tuple[str, ...]]:
    """Those of the names that are of each layer, without its number."""
    kinds = (*LAYER_ACTIVATIONS, ON_DEMAND)
    return [tuple(kind for kind in kinds if f"layers.{i}.{kind}" in names) for i in range(config.num_layers)]


@jax.named_scope("embed")
def _embed(params: Params, tokens: jax.Array | None, inputs_embeds: jax.Array | None) -> jax.Array:
    dtype = compute_dtype(params)
    if (tokens is None) == (inputs_embeds is None):
        raise RequestError("give either tokens or inputs_embeds", param="tokens", hint="pass None for the other one")
    if tokens is None:
        assert inputs_embeds is not None
        return constrain(inputs_embeds.astype(dtype), ACTIVATION_AXES)
    return constrain(embedding(params, tokens, dtype), ACTIVATION_AXES)


def _positions(x: jax.Array, positions: jax.Array | None, segment_ids: jax.Array | None, cache: Any) -> jax.Array:
    batch, length = x.shape[:2]
    if segment_ids is not None and cache is not None:
        raise RequestError(
            "segment_ids cannot be combined with a cache",
            param="segment_ids",
            hint="give each text a row of its own when decoding",
        )
    if positions is not None:
        return positions
    if cache is not None:
        raise RequestError("a cache needs positions", param="positions", hint="pass int32 [batch, len]")
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if segment_ids is None:
        return index
    starts = jnp.concatenate([jnp.ones((batch, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def _rope_lengths(
    config: LlamaConfig,
    positions: jax.Array,
    segment_ids: jax.Array | None,
    rows: jax.Array | None,
    given: jax.Array | None,
    *,
    cached: bool,
) -> jax.Array:
    """Length of the text that each token belongs to: int32 [batch, 1] or [batch, len]."""
    if given is not None:
        return given[:, None] if rows is None else given.at[rows].get(mode="fill", fill_value=0)
    if cached and config.rope.kind == "dynamic":
        raise RequestError(
            "dynamic rope with a cache needs the length that fixes its frequencies: cached keys were rotated by it",
            param="rope_lengths",
            hint="pass the length of each whole prompt, the same in every call",
        )
    if segment_ids is None:
        return jnp.max(positions, axis=1, keepdims=True).astype(jnp.int32) + 1
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.max(jnp.where(same, positions[:, None, :], -1), axis=2).astype(jnp.int32) + 1


# A separate jitted function: equal layers are traced and lowered once, not once each. XLA inlines the calls.
@partial(jax.jit, static_argnames=("spec", "dims", "capture", "in_order", "chunk_rows"))
def _layer(
    x: jax.Array,
    delta: jax.Array | Pending | None,
    params: Params,
    cache: LayerCache | None,
    slots: Any,
    tokens: Queries,
    angles: tuple[jax.Array, jax.Array],
    adapters: Adapters,
    at: jax.Array | None,
    patches: dict[str, Patch],
    index: jax.Array | None,
    *,
    spec: LayerSpec,
    dims: Dims,
    capture: tuple[str, ...],
    in_order: bool,
    chunk_rows: int | None,
) -> tuple[jax.Array, jax.Array | Pending, LayerCache | None, dict[str, jax.Array]]:
    """One block.

    Args:
      x, delta: what goes in is their sum, which the norm makes on the way; of the first block delta is None. What comes
        out is so too. Delta may be a projection whose kernel adds the sum and begins the norm.
      at: int32 [batch, n], the tokens that are wanted of what comes out; None is all of them.
      patches: what changes its activations; index: int32 [], the layer's, given only with patches.
      in_order: positions are 0, 1, 2, ... in every row.
      chunk_rows: of `forward`.
    """
    tap = Tap(capture, patches, Place(index, tokens.positions, tokens.segments))
    of_attn = adapters.of("attn")
    tapped = bool(capture or patches)

    with jax.named_scope("attn_norm"):
        x, h = add_norm(x, delta, params["attn_norm"], dims.rms_norm_eps, whole=tapped)
    h = tap("attn_in", h)
    with jax.named_scope("attn"):
        k: jax.Array | None = None
        v: jax.Array | None = None
        append: Any = None if tap.needs("q", "k", "v") else getattr(cache, "append", None)
        qkv = None if append is None else joint_heads(h, params["attn"], dims, spec, of_attn)
        if qkv is not None:
            q, cache = append(qkv, angles, slots, interleaved=dims.interleaved)
        else:
            q, k, v = project_qkv(h, params["attn"], dims, of_attn)
            q, k = position_queries_and_keys(q, k, params["attn"], dims, spec, tokens.positions, angles)
            q, k, v = tap("q", q), tap("k", k), tap("v", v)
        x, q, queries = _tokens((x, q, tokens), at)
        adapters, of_attn = adapters.at(at), of_attn.at(at)
        rule = Rule(
            Visibility(spec.attention, spec.window or 0),
            dims.head_dim**-0.5,
            in_order=cache is None and in_order and at is None,
            chunk_rows=chunk_rows if at is None else None,  # `at` may name a token more than once
            batch_invariant=is_batch_invariant(),
        )
        if cache is None:
            assert k is not None and v is not None
            kv = KeysValues(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))
            places = Places(queries.positions, tokens.positions, queries.segments, tokens.segments)
            if tap.needs(ON_DEMAND):
                out = weighted_values(tap(ON_DEMAND, attention_probs(q, kv.k, places, rule)), kv.v)
            else:
                out = attention(q, kv, places, rule)
        else:
            out, cache = cache.attend(q, k, v, slots, queries, rule)
        out = tap("attn_heads", out).reshape(*x.shape[:2], -1)
        delta = project(out, params["attn"], "o_proj", dims, of_attn, None if tapped else x)
        delta = tap("attn_out", constrain(delta, ACTIVATION_AXES))

    experts = isinstance(spec.mlp, MoeSpec)
    with jax.named_scope("mlp_norm"):
        x, h = add_norm(x, delta, params["mlp_norm"], dims.rms_norm_eps, whole=tapped or experts)
    h = tap("mlp_in", h)
    if isinstance(spec.mlp, MoeSpec):
        delta = moe(h, params["moe"], dims, spec.mlp, adapters.of("moe"))
    else:
        of_mlp = adapters.of("mlp")
        with jax.named_scope("mlp"):
            hidden = tap("mlp_hidden", hidden_units(h, params["mlp"], dims, of_mlp))
            delta = project(hidden, params["mlp"], "down_proj", dims, of_mlp, None if tapped else x)
    delta = tap("mlp_out", constrain(delta, ACTIVATION_AXES))
    if tap.needs("out"):
        assert not isinstance(delta, Pending)  # nothing is left to others where something is watched
        total = tap("out", x + delta)
        if tap.changes("out"):
            x, delta = total, jnp.zeros_like(total)
    return x, delta, cache, tap.seen


def _tokens[Tree](tree: Tree, at: jax.Array | None) -> Tree:
    """Tokens `at` int32 [batch, n] of arrays [batch, len, ...]; all of them for None."""
    if at is None:
        return tree
    return jax.tree.map(lambda x: jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1), tree)
