"""The programs of a draft model, with its own parameters and cache, and shapes that never depend on requests.

`follow` computes a piece of texts that its cache does not hold yet, `draft` their last tokens and its guesses of the
next ones. The host tracks what each cache row holds (`draft_model`); each call drops drafted tokens that were not
drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp

from llama_jax.aot.programs import Program
from llama_jax.cache import PagedCache
from llama_jax.config import LlamaConfig
from llama_jax.engine.programs import Control
from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.state import shapes_of
from llama_jax.kernels.dispatch import using
from llama_jax.model import forward
from llama_jax.model.loaded import Model
from llama_jax.params import Params
from llama_jax.sharding import in_use, on

DRAFT, FOLLOW = "draft", "follow"
"""Names of the programs."""

PIECE = 256
"""The most tokens of `follow`: other sequences wait while it runs."""


def new_cache(config: LlamaConfig, settings: EngineSettings, dtype: jnp.dtype) -> PagedCache:
    """An empty cache for the draft model: `draft_rows` rows with all their pages."""
    rows, context = settings.draft_rows, settings.draft_context
    return PagedCache.create(config, rows, context, dtype, page_size=settings.page_size)


def draft_control(settings: EngineSettings) -> Control:
    """For `draft`, per row: its last tokens, padded with -1; the number of stored tokens; the length of its prompt; and
    the number of tokens to draft."""
    rows = settings.draft_rows
    return Control(ids=(rows, settings.drafts + 1), stored=(rows,), prompts=(rows,), count=(1,))


def follow_control(settings: EngineSettings) -> Control:
    """For `follow`, per token: id, position (-1: none) and row; per row: the number of stored tokens and the length of
    its prompt."""
    tokens, rows = piece(settings), settings.draft_rows
    return Control(**dict.fromkeys(("ids", "positions", "rows"), (tokens,)), stored=(rows,), prompts=(rows,))


def piece(settings: EngineSettings) -> int:
    """Tokens of `follow`."""
    return min(PIECE, settings.budget)


def draft(
    params: Params, cache: PagedCache, control: jax.Array, *, config: LlamaConfig, settings: EngineSettings, vocab: int
) -> tuple[PagedCache, jax.Array]:
    """Computes the last tokens of texts, then the most likely next ones one by one.

    Args:
      vocab: number of ids that may be drafted.

    Returns:
      The cache, holding the last tokens and all drafted ones but the last, and the drafts int32 [rows, drafts].
    """
    given = draft_control(settings).parts(control)
    ids, stored = given["ids"], given["stored"]
    there = ids >= 0
    new = there.sum(axis=1, dtype=jnp.int32)

    def next_of(
        tokens: jax.Array, positions: jax.Array, cache: PagedCache, last: jax.Array
    ) -> tuple[PagedCache, jax.Array]:
        known = jnp.clip(tokens, 0, config.vocab_size - 1)
        logits, cache = forward(
            params, config, known, positions, cache, rope_lengths=given["prompts"], logits_at=last[:, None]
        )
        return cache, jnp.argmax(logits[:, 0, :vocab], axis=-1).astype(jnp.int32)

    place = stored[:, None] + jnp.arange(ids.shape[1], dtype=jnp.int32)
    cache, token = next_of(ids, jnp.where(there, place, -1), cache.truncate(stored), jnp.maximum(new - 1, 0))
    type Carry = tuple[jax.Array, PagedCache, jax.Array]

    def more(carry: Carry) -> Carry:
        at, cache, drafted = carry
        last = jax.lax.dynamic_index_in_dim(drafted, at - 1, axis=1)
        position = jnp.where(new > 0, stored + new + at - 1, -1)[:, None]
        cache, token = next_of(last, position, cache, jnp.zeros_like(new))
        return at + 1, cache, jax.lax.dynamic_update_index_in_dim(drafted, token, at, axis=1)

    drafted = jnp.zeros((len(new), settings.drafts), jnp.int32).at[:, 0].set(token)
    count = jnp.minimum(given["count"][0], settings.drafts)
    _, cache, drafted = jax.lax.while_loop(lambda carry: carry[0] < count, more, (jnp.int32(1), cache, drafted))
    return cache, drafted


def follow(
    params: Params, cache: PagedCache, control: jax.Array, *, config: LlamaConfig, settings: EngineSettings
) -> PagedCache:
    """Computes further tokens of texts, packed along one axis."""
    given = follow_control(settings).parts(control)
    _, cache = forward(
        params,
        config,
        jnp.clip(given["ids"], 0, config.vocab_size - 1)[None],
        given["positions"][None],
        cache.truncate(given["stored"]),
        rows=given["rows"][None],
        rope_lengths=given["prompts"],
        logits_at=jnp.zeros((1, 1), jnp.int32),  # nobody looks at them
    )
    return cache


def draft_program(
    name: str, config: LlamaConfig, settings: EngineSettings, params: Params, cache: PagedCache, vocab: int
) -> Program:
    """The program DRAFT or FOLLOW. Call and lower this where it is to be traced: inside `sharding.on(mesh)`.

    Args:
      config: of the draft model, as it computes.
      params, cache: of the draft model, arrays or their shapes.
      vocab: of the model.
    """
    where = jax.tree.map(lambda x: x.sharding, cache)
    options: dict[str, Any] = {}
    if name == DRAFT:
        control = draft_control(settings)
        function: Any = partial(draft, config=config, settings=settings, vocab=min(vocab, config.vocab_size))
        told: Any = (where, None)
    else:
        control, function, told = follow_control(settings), partial(follow, config=config, settings=settings), where
    if in_use():
        options["out_shardings"] = told
    jitted = jax.jit(function, donate_argnums=1, **options)
    return Program(name, jitted, (params, cache, jax.ShapeDtypeStruct((control.size,), jnp.int32)), {})


@dataclass(frozen=True)
class DraftParts:
    """A draft model, and the program that makes its cache.

    Attributes:
      begin: compiled, without arguments; vocab: of the model that it drafts for.
    """

    model: Model
    begin: Any
    vocab: int

    @classmethod
    def of(cls, draft: Model, settings: EngineSettings, vocab: int) -> Self:
        """Compiles the program that makes the cache, without running it."""
        with on(draft.mesh), using(**draft.kernels):
            begin = jax.jit(new_cache, static_argnums=(0, 1, 2))
            return cls(draft, begin.lower(draft.config, settings, draft.cache_dtype).compile(), vocab)

    def program(self, name: str, settings: EngineSettings) -> Program:
        """See `draft_program`."""
        model = self.model
        return draft_program(name, model.config, settings, model.params, shapes_of(self.begin), self.vocab)
