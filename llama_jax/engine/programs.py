"""The engine's programs: a few, with fixed shapes, compiled before the first request.

`mixed` lets sequences begin in rows, and runs the prompts' next tokens and one token of each decoding row through the
model together, packed along one axis; it can score the prompts. `decode` runs steps of decoding rows only. What changes
from step to step is sent as one integer array (`Control`), so that a dispatch sends one array to the device and
fetches one: each array, and each dispatch, costs the host time before a first token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.decode.loop import DecodeState, Progress, by_rows, decode_step, emit, no_progress, run_steps
from llama_jax.engine import lookup
from llama_jax.engine.flat import flat_size, unflat
from llama_jax.engine.state import Joining, join, paged, put_rows, take_rows
from llama_jax.model import forward
from llama_jax.model.adapters import NO_ADAPTERS, Adapters
from llama_jax.model.head import unembed
from llama_jax.params import Params
from llama_jax.sampling import MAX_LOGPROBS, Logprobs, SamplerProfile, token_logprobs

DONE, STOPPED, FAILED = 1 << 16, 1 << 17, 1 << 18
"""Flags added to the number of new tokens, in the last column of a report."""

DRAFTED = 20
"""Bit offset of the number of tried tokens, in the same column."""

SCORED_BLOCK = 128
"""The most tokens whose logits exist at once when prompts are scored."""


class Control:
    """Integers for one dispatch, by name, in one int32 array."""

    def __init__(self, **shapes: tuple[int, ...]):
        self.shapes = shapes
        self.size = sum(math.prod(shape) for shape in shapes.values())

    def new(self, **fills: int) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
        """Makes an array for the host to fill, and views of its parts; each starts with its value in `fills`, or 0."""
        array = np.zeros(self.size, np.int32)
        parts = self.parts(array)
        for name, value in fills.items():
            parts[name][...] = value
        return array, parts

    def parts(self, array: Any) -> dict[str, Any]:
        """The parts of an array, of numpy or of jax."""
        parts, start = {}, 0
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            parts[name] = array[start : start + size].reshape(shape)
            start += size
        return parts


@cache
def decode_control(rows: int) -> Control:
    """For `decode`: the rows, the steps to run, and pages (row, index, page) to book."""
    return Control(rows=(rows,), steps=(1,), pages=(rows, 3))


@cache
def mixed_control(tokens: int, rows: int, joining: int) -> Control:
    """For `mixed`, per token: id (negative: the one that its row drew last), position, line of its row, and the next
    id, to be scored; per line: its row, the token after which it draws, and whether it does; pages to book; and the
    sequences that begin, `joining` integers (`Beginnings`)."""
    each = dict.fromkeys(("ids", "positions", "lines", "next"), (tokens,))
    return Control(**each, rows=(rows,), at=(rows,), draws=(rows,), pages=(rows, 3), joining=(joining,))


def verify_control(rows: int, drafts: int) -> Control:
    """For `verify`: the rows, the draft of each, padded with -1, or the number of draft tokens to look for in the text,
    whether the row has its own masks, and pages (row, index, page) to book."""
    return Control(rows=(rows,), drafts=(rows, drafts), lookup=(rows,), masked=(rows,), pages=(rows, 3))


def book(state: DecodeState, pages: jax.Array) -> DecodeState:
    """Enters pages int32 [n, 3] (row, index, page) into the state's page table; a row past the last is padding."""
    row, index, page = pages.T
    cache = paged(state)
    table = cache.page_table.at[row, index].set(page, mode="drop")
    return dataclasses.replace(state, cache=dataclasses.replace(cache, page_table=table))


def decode(
    params: Params,
    state: DecodeState,
    control: jax.Array,
    adapters: Params | None,
    *,
    config: LlamaConfig,
    profile: SamplerProfile,
    rows: int,
    stride: int,
) -> tuple[DecodeState, jax.Array, Logprobs | None]:
    """Runs steps of some rows. If the program has room for all rows, they are computed in place.

    Returns:
      The state, and `report` of the given rows, or of all.
    """
    given = decode_control(rows).parts(control)
    state = book(state, given["pages"])
    everyone = rows == len(state.done)
    if everyone:
        others = jnp.ones_like(state.done).at[given["rows"]].set(False, mode="drop")
        part = dataclasses.replace(state, done=state.done | others)
    else:
        part = take_rows(state, given["rows"])
    if stride == 1:  # without a loop, for which a GPU would have to ask the host
        part, progress = decode_step(params, part, config=config, profile=profile, adapters=adapters)
    else:
        steps = given["steps"][0]
        part, progress = run_steps(params, part, steps, adapters, config=config, profile=profile, stride=stride)
    told = report(progress)
    if everyone:
        return by_rows(dataclasses.replace(part, done=jnp.where(others, state.done, part.done))), *told
    return put_rows(state, given["rows"], part), *told


def verify(
    params: Params,
    state: DecodeState,
    control: jax.Array,
    adapters: Params | None,
    texts: jax.Array | None,
    masks: jax.Array | None,
    *,
    config: LlamaConfig,
    profile: SamplerProfile,
    rows: int,
    drafts: int,
    loops: bool,
) -> tuple[DecodeState, jax.Array, Logprobs | None, jax.Array | None]:
    """Runs one pass over the last token and the draft of some rows. Each draws after its last token, and continues
    after the draft's tokens as long as it has drawn them: every draw equals that of a decode step.

    Args:
      texts: int32 [rows of the state, context], complete up to the last token for rows that look up their drafts; None
        if no row does.
      masks: uint32 [rows, drafts + 1, ceil(vocab / 32)], the tokens that a row with its own masks may draw in each
        place (`sampling.token_mask`); None with the greedy profile.
      loops: whether the device can end a loop by itself. If it had to ask the host after each draw, nothing else could
        be dispatched meanwhile, so all draws are computed.

    Returns:
      The state, `report` of the rows, and the texts with what they have drawn.
    """
    given = verify_control(rows, drafts).parts(control)
    state = book(state, given["pages"])
    part = take_rows(state, given["rows"])
    place = jnp.arange(drafts + 1, dtype=jnp.int32)
    tried = given["drafts"]
    if texts is not None:
        own = texts.at[given["rows"]].get(mode="fill", fill_value=-1)
        found = lookup.find(own, part.positions + 1, drafts)
        tried = jnp.where(place[:-1] < given["lookup"][:, None], found, tried)
    begun = part.positions
    ids = jnp.concatenate([part.tokens[:, None], tried], axis=1)
    there = ~part.done[:, None] & ((ids >= 0) | (place == 0))
    logits, cache = forward(
        params,
        config,
        jnp.maximum(ids, 0),
        jnp.where(there, part.positions[:, None] + place, -1),
        part.cache,
        rope_lengths=part.rope_lengths,
        adapters=adapters,
        adapter_ids=None if adapters is None else jnp.repeat(part.adapter_ids[:, None], drafts + 1, axis=1),
    )
    masked = given["masked"] > 0
    part = dataclasses.replace(part, cache=cache)
    type Carry = tuple[jax.Array, DecodeState, Progress, jax.Array]

    def draw(carry: Carry) -> Carry:
        at, part, progress, going = carry
        here = jax.lax.dynamic_index_in_dim(logits, at, axis=1, keepdims=False)
        if masks is not None:
            part = _masked(part, jax.lax.dynamic_index_in_dim(masks, at, axis=1, keepdims=False), masked)
        part, progress = emit(here, part, progress, at, profile, where=going)
        following = ids.at[:, at + 1].get(mode="fill", fill_value=-1)
        return at + 1, part, progress, going & (part.tokens == following) & ~part.done

    progress = no_progress(part, drafts + 1, profile, config.vocab_size)
    start = (jnp.int32(0), part, progress, ~part.done)
    if loops:
        _, part, progress, _ = jax.lax.while_loop(lambda carry: (carry[0] <= drafts) & carry[3].any(), draw, start)
    else:
        _, part, progress, _ = jax.lax.fori_loop(0, drafts + 1, lambda _, carry: draw(carry), start)
    # Drops draft tokens that were stored but not drawn.
    part = dataclasses.replace(part, cache=part.cache.truncate(jnp.maximum(part.positions, 0)))
    if texts is not None:
        at = jnp.where(place < progress.new[:, None], begun[:, None] + 1 + place, texts.shape[1])
        texts = texts.at[given["rows"][:, None], at].set(progress.tokens, mode="drop")
    told, logprobs = report(progress)
    told = told.at[:, -1].add((tried >= 0).sum(axis=1, dtype=jnp.int32) << DRAFTED)
    return put_rows(state, given["rows"], part), told, logprobs, texts


def _masked(state: DecodeState, masks: jax.Array, rows: jax.Array) -> DecodeState:
    """The state with rows bool [batch] restricted to their masks uint32 [batch, ceil(vocab / 32)]."""
    sampler = state.sampler
    assert sampler.restricted is not None and sampler.allowed is not None
    allowed = jnp.where(rows[:, None], masks, sampler.allowed)
    sampler = dataclasses.replace(sampler, restricted=sampler.restricted | rows, allowed=allowed)
    return dataclasses.replace(state, sampler=sampler)


def mixed(
    params: Params,
    state: DecodeState,
    control: jax.Array,
    adapters: Params | None,
    *,
    config: LlamaConfig,
    profile: SamplerProfile,
    tokens: int,
    rows: int,
    chunk_rows: int,
    joining: Joining,
    scored: bool = False,
) -> tuple[DecodeState, jax.Array, Logprobs | None, Logprobs | None]:
    """Runs one step of prompts and decoding rows together: some rows, or all in place if the program has room for them,
    where the line of a row is its number. Attention of decoding rows, the head and the sampler take as long as all of
    the program's rows need, however few draw.

    Args:
      chunk_rows: the most prompts in it.
      joining: shapes of the sequences that begin.
      scored: whether to compute the prompts' own log-probabilities.

    Returns:
      The state, `report` of the rows, and with `scored` the log-probabilities of each token's successor [tokens], and
      of the most likely ids in its place [tokens, n].
    """
    given = mixed_control(tokens, rows, flat_size(joining)).parts(control)
    state = book(join(state, unflat(given["joining"], joining)), given["pages"])
    everyone = rows == len(state.done)
    part = state if everyone else take_rows(state, given["rows"])
    line, ids, positions = given["lines"], given["ids"], given["positions"]

    def own(x: jax.Array, fill: Any) -> jax.Array:
        return x.at[line].get(mode="fill", fill_value=fill)

    decoding = ids < 0
    # Ended rows store nothing; the host may not know yet that they have ended.
    last = jnp.where(own(part.done, True), -1, own(part.positions, -1))
    arguments: dict[str, Any] = {
        "tokens": jnp.where(decoding, own(part.tokens, 0), ids)[None],
        "positions": jnp.where(decoding, last, positions)[None],
        "cache": part.cache,
        "rows": line[None],
        "chunk_rows": chunk_rows,
        "rope_lengths": part.rope_lengths,
        "adapters": adapters,
        "adapter_ids": None if adapters is None else own(part.adapter_ids, 0)[None],
    }
    scores = None
    if scored:
        _, cache, seen = forward(params, config, **arguments, capture=("final_norm",))
        hidden = seen["final_norm"][0]
        head = NO_ADAPTERS if adapters is None else Adapters(adapters, arguments["adapter_ids"]).of("lm_head")
        logits = unembed(params, config, hidden[given["at"]][None], adapters=head.at(given["at"][None]))
        scores = _scores(params, config, hidden, given["next"], head)
    else:
        logits, cache = forward(params, config, **arguments, logits_at=given["at"][None])
    part = dataclasses.replace(part, cache=cache)
    progress = no_progress(part, 1, profile, config.vocab_size)
    part, progress = emit(logits[0], part, progress, 0, profile, where=given["draws"] > 0)
    return by_rows(part) if everyone else put_rows(state, given["rows"], part), *report(progress), scores


def _scores(params: Params, config: LlamaConfig, hidden: jax.Array, behind: jax.Array, head: Adapters) -> Logprobs:
    """Log-probabilities of ids `behind` int32 [tokens].

    Args:
      hidden: input of the model's head [tokens, hidden_size].
      head: its adapters in slots, with ids [1, tokens].
    """

    def score(block: tuple[jax.Array, ...]) -> Logprobs:
        h, ids, at = block
        logits = unembed(params, config, h[None], adapters=head.at(at[None]))
        return token_logprobs(logits[0], ids, MAX_LOGPROBS)

    # A block at a time: the logits of all tokens would be the largest array of the engine. Each reads the whole head.
    tokens = len(behind)
    blocks = -(-tokens // SCORED_BLOCK)
    size = -(-tokens // blocks)

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, blocks * size - tokens)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(blocks, size, *x.shape[1:])

    found = jax.lax.map(score, tuple(map(cut, (hidden, behind, jnp.arange(tokens, dtype=jnp.int32)))))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:tokens], found)


def report(progress: Progress) -> tuple[jax.Array, Logprobs | None]:
    """News of a dispatch for the host, int32 [rows, stride + 1]: new tokens, and in the last column their number, with
    DONE, STOPPED and FAILED."""
    flags = jnp.where(progress.done, DONE, 0)
    flags |= jnp.where(progress.finished_by_stop, STOPPED, 0) | jnp.where(progress.failed, FAILED, 0)
    return jnp.concatenate([progress.tokens, (progress.new | flags)[:, None]], axis=1), progress.logprobs
