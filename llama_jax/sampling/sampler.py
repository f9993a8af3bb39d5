"""The pure sampler: logits in, tokens out."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.sampling import token_mask
from llama_jax.sampling.logprobs import Logprobs, token_logprobs
from llama_jax.sampling.params import GREEDY_BELOW, MAX_LOGPROBS
from llama_jax.sampling.state import SamplerProfile, SamplerState, sampler_axes
from llama_jax.sampling.truncation import truncate
from llama_jax.sharding import Axes, MeshAxes, constrain, local, reductions, split_over

_UNLIKELY = -1e30
"""A finite logit so low that its token is drawn only if no other is allowed."""
_ROWS, _WIDE = ("batch",), ("batch", "vocab")


def sample(
    logits: jax.Array, state: SamplerState, profile: SamplerProfile, *, drawing: jax.Array | None = None
) -> tuple[jax.Array, SamplerState, Logprobs | None]:
    """Draws each row's next token.

    A token that a row's mask forbids is never drawn if the mask allows another; `failed` tells which rows have no next
    token.

    Args:
      logits: float32 [batch, vocab].
      drawing: bool [batch], rows whose token counts; the state of others is unchanged, and nothing is computed because
        of what they ask for. All by default.

    Returns:
      tokens int32 [batch], the state after the draw, and the log-probabilities if the profile has them: zeros if no
      row that draws requests any.
    """
    drawing = jnp.ones(len(logits), bool) if drawing is None else drawing
    vocab = logits.shape[1]
    noisy = drawing & (state.temperature >= GREEDY_BELOW)
    limited = noisy & ((state.top_p < 1) | (state.top_k < vocab) | (state.min_p > 0))

    # Skips what no row needs. Branches return tokens, not logits: logits would be copied even if nothing changes.
    # One switch with three branches, since on some GPUs the host waits at each switch.
    ways = (_draw_greedy, partial(_draw, state=state, limited=False), partial(_draw, state=state, limited=True))
    way = jnp.any(noisy).astype(jnp.int32) + jnp.any(limited)

    def draw(logits: jax.Array) -> jax.Array:
        tokens: jax.Array = ways[0](logits) if profile.kind == "greedy" else jax.lax.switch(way, ways, logits)
        return tokens

    if profile.kind == "full":
        changed = jnp.any(drawing & _changed(state))
        tokens = jax.lax.cond(changed, lambda: draw(_change(logits, state, drawing)), lambda: draw(logits))
    else:
        tokens = draw(logits)
    seen = None
    if state.seen is not None:
        seen = _on_parts(_count, _WIDE, seen=state.seen, tokens=jnp.where(drawing, tokens, -1))
    new_state = dataclasses.replace(state, count=state.count + drawing, seen=seen)
    return tokens, new_state, _reported(logits, tokens, state, drawing) if profile.logprobs else None


def _reported(logits: jax.Array, tokens: jax.Array, state: SamplerState, drawing: jax.Array) -> Logprobs:
    """Log-probabilities, if a row that draws requests any."""

    def report() -> Logprobs:
        return token_logprobs(logits, tokens, MAX_LOGPROBS)

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(report))
    found: Logprobs = jax.lax.cond(jnp.any(drawing & state.reports), report, lambda: nothing)
    return found


def failed(logits: jax.Array, state: SamplerState) -> jax.Array:
    """Rows without a next token, bool [batch]: the draws of `sample` for them are meaningless.

    Their logits, float32 [batch, vocab], hold NaN or infinity or are all minus infinity, or their mask allows no token.
    """
    rows = _on_parts(_not_finite, _ROWS, logits=logits)
    if state.allowed is None or state.restricted is None:
        return rows
    return rows | state.restricted & ~token_mask.any_allowed(state.allowed, logits.shape[1])


def _on_parts(run: Any, out: Axes, **arguments: Any) -> jax.Array:
    """Runs `run(**arguments, axis=)` on every device with its rows and its part of the vocabulary."""
    wide = arguments["logits" if "logits" in arguments else "seen"]
    known: dict[str, Any] = {"logits": _WIDE, "noise": _WIDE, "seen": _WIDE, "tokens": _ROWS, "drawing": _ROWS}
    axes = {name: known.get(name) or sampler_axes(value) for name, value in arguments.items()}
    array: jax.Array = local(partial(run, axis=split_over("vocab", wide.shape[1])), arguments, axes, out)
    return array


def _draw_greedy(logits: jax.Array) -> jax.Array:
    return _on_parts(lambda logits, axis: reductions.argmax(logits, axis), _ROWS, logits=logits)


def _draw(logits: jax.Array, *, state: SamplerState, limited: bool) -> jax.Array:
    # Made outside: the noise must not depend on how the vocabulary is split.
    noise = constrain(_noise(state, logits.shape[1]), _WIDE)
    return _on_parts(partial(_draw_part, limited=limited), _ROWS, logits=logits, state=state, noise=noise)


def _noise(state: SamplerState, vocab: int) -> jax.Array:
    """Gumbel noise float32 [batch, vocab] for each row's next draw, from the row's own key."""

    def gumbel(seed: jax.Array, count: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, count), (vocab,), jnp.float32)

    return jax.vmap(gumbel)(state.seed, state.count)


def _draw_part(
    logits: jax.Array, state: SamplerState, noise: jax.Array, *, limited: bool, axis: MeshAxes | None
) -> jax.Array:
    temperature = state.temperature[:, None]
    scaled = logits / jnp.maximum(temperature, GREEDY_BELOW)
    scaled = truncate(scaled, state, axis) if limited else scaled
    return reductions.argmax(jnp.where(temperature < GREEDY_BELOW, logits, scaled + noise), axis)


def _early(state: SamplerState) -> jax.Array:
    return state.count < state.min_tokens


def _penalised(state: SamplerState) -> jax.Array:
    return (state.presence != 0) | (state.frequency != 0) | (state.repetition != 1)


def _changed(state: SamplerState) -> jax.Array:
    """Rows, bool [batch], that do not draw from the unmodified logits."""
    assert state.bias_ids is not None and state.restricted is not None
    biased = jnp.any(state.bias_ids >= 0, axis=1)
    return biased | _early(state) | _penalised(state) | state.restricted


def _change(logits: jax.Array, state: SamplerState, drawing: jax.Array) -> jax.Array:
    """The logits to draw from: min_tokens, logit_bias, penalties, masks, in this order."""
    return _on_parts(_change_part, _WIDE, logits=logits, state=state, drawing=drawing)


def _change_part(logits: jax.Array, state: SamplerState, drawing: jax.Array, *, axis: MeshAxes | None) -> jax.Array:
    assert state.bias_ids is not None and state.allowed is not None and state.restricted is not None
    first, width = reductions.start(logits, axis), logits.shape[1]
    row = jnp.arange(len(logits))[:, None]

    def columns(ids: jax.Array) -> jax.Array:
        """Columns on this device; `width` if the id is on another device, or is none."""
        return jnp.where((ids >= 0) & (ids >= first), ids - first, width)

    # Scattered into a separate array: otherwise the logits would be copied even if no row changes.
    barred = jnp.where(_early(state)[:, None], state.stop_ids, -1)
    added = jnp.zeros_like(logits).at[row, columns(state.bias_ids)].add(state.bias, mode="drop")
    added = added.at[row, columns(barred)].set(-jnp.inf, mode="drop")
    logits = jnp.where(added == -jnp.inf, _UNLIKELY, logits + added)
    logits = jax.lax.cond(jnp.any(drawing & _penalised(state)), lambda: _penalize(logits, state), lambda: logits)
    # An allowed token beats every forbidden one, even if its own logit makes it impossible.
    masked = jnp.where(token_mask.columns(state.allowed, first, width), jnp.maximum(logits, _UNLIKELY), -jnp.inf)
    return jnp.where(state.restricted[:, None], masked, logits)


def _penalize(logits: jax.Array, state: SamplerState) -> jax.Array:
    """Repetition penalty (arXiv:1909.05858) on prompt and output tokens, then frequency and presence on output's."""
    assert state.seen is not None and state.in_prompt is not None
    generated = state.seen > 0
    factor = jnp.where(generated | state.in_prompt, state.repetition[:, None], 1.0)
    # Clipped, so that an extreme penalty cannot make infinity or NaN.
    repeated = jnp.clip(jnp.where(logits > 0, logits / factor, logits * factor), _UNLIKELY, -_UNLIKELY)
    logits = jnp.where(factor == 1, logits, repeated)
    return logits - state.frequency[:, None] * state.seen - state.presence[:, None] * generated


def _count(seen: jax.Array, tokens: jax.Array, *, axis: MeshAxes | None) -> jax.Array:
    column = tokens - reductions.start(seen, axis)
    here = jnp.where(column >= 0, column, seen.shape[1])
    return jnp.asarray(seen).at[jnp.arange(len(seen)), here].add(1, mode="drop")


def _not_finite(logits: jax.Array, *, axis: MeshAxes | None) -> jax.Array:
    # NaN becomes infinity first: not every device's maximum propagates NaN.
    return ~jnp.isfinite(reductions.largest(jnp.where(jnp.isnan(logits), jnp.inf, logits), axis))
