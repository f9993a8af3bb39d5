"""The set of an engine's programs, each as a function of shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.aot.programs import Program
from llama_jax.config import LlamaConfig
from llama_jax.decode.graphs import graph_options
from llama_jax.decode.loop import DecodeState
from llama_jax.decode.weights_read import PROMPT_ROWS, weight_options
from llama_jax.engine import programs
from llama_jax.engine.draft_programs import DRAFT, FOLLOW, piece
from llama_jax.engine.flat import flat_size
from llama_jax.engine.lookup import remember
from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.state import Joining, Marked, mark, narrow, scrub, wide
from llama_jax.kernels.attention import batch_invariant
from llama_jax.params import Params
from llama_jax.sampling import FULL, GREEDY, SamplerProfile, token_mask
from llama_jax.sharding import in_use

START = "start"
"""Name of the program that makes the state, which `Core` runs once; not part of the set."""

MARKED = 1024
"""The most tokens that one call of `mark` marks."""

LOOPED_GREEDY = 8
"""The most rows of a decode step that has a program for greedy requests alone, on a device that loops by itself. It
tests within its loop what the draws need. On an H200 this took 1.1 % of a step of Llama-3.1-8B with one row, 0.7 % with
8, and 0.5 % with 64."""

MASKED = 32
"""The most rows that one call of `mark` gives masks to."""


@dataclass(frozen=True)
class Key:
    """One program of the set.

    Attributes:
      name: "decode", "verify", "mixed", "scored", "mark", "scrub" or "remember"; for a draft model "draft" or "follow".
      size: rows of "decode", "verify" and "draft", tokens of "mixed", "scored" and "follow"; else 0.
      greedy: whether it only takes the most likely tokens. The other program of its size can do everything.
      rows: most rows of "mixed"; 0: all.
    """

    name: str
    size: int = 0
    greedy: bool = False
    rows: int = 0

    def __str__(self) -> str:
        unit = "rows" if self.name in ("decode", "verify", DRAFT) else "tokens"
        size = f" of {self.size} {unit}" if self.size else ""
        return f"{self.name}{size}{f', {self.rows} rows' if self.rows else ''}{', greedy' if self.greedy else ''}"


def program_set(settings: EngineSettings, *, on_cpu: bool) -> list[Key]:
    """Every program of an engine.

    A batch-invariant engine has none for greedy requests alone: which of the two runs would depend on the other
    requests.

    Args:
      on_cpu: attention in plain jnp gives leftovers in a page no weight, so that no page is cleared (`state.scrub`).
    """
    greedy = not on_cpu if settings.greedy is None else settings.greedy
    in_loop = settings.steps > 1 and settings.greedy is None
    keys = [Key("mark"), *([] if on_cpu else [Key("scrub")]), Key("scored", settings.budget)]
    keys += [Key(DRAFT, settings.draft_rows), Key(FOLLOW, piece(settings))] if settings.draft_context else []
    keys += [Key("remember")] if settings.looks_up else []
    for only in (False, True) if greedy and not settings.batch_invariant else (False,):
        keys += [Key("mixed", tokens, only, settings.few_rows) for tokens in settings.few_tokens]
        if not (only and settings.few_tokens):
            keys += [Key("mixed", tokens, only) for tokens in settings.mixed_tokens]
        most = LOOPED_GREEDY if only and in_loop else settings.rows
        keys += [Key("decode", rows, only) for rows in settings.decode_rows if rows <= most]
        keys += [Key("verify", settings.draft_rows, only)] if settings.drafts else []
    return keys


def sufficient(keys: Iterable[Key]) -> list[Key]:
    """Programs that any request can be answered with, if not as fast, unless its prompt is scored: the largest of each
    name."""
    largest = {key.name: key.size for key in sorted(keys, key=lambda key: key.size)}
    return [
        key
        for key in keys
        if key.size == largest[key.name] and not key.rows and not key.greedy and key.name != "scored"
    ]


def program(
    key: Key, config: LlamaConfig, settings: EngineSettings, params: Params, state: DecodeState, adapters: Params | None
) -> Program:
    """A program of the set. Call and lower this where it is to be traced: inside `sharding.on(mesh)`.

    Args:
      config: as the model computes (`Model.config`).
      params, state, adapters: arrays or their shapes, with shardings; those of the state are the result's too.
    """

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    function: Callable[..., Any]
    texts = texts_of(settings, state)
    state = narrow(state) if key.greedy else state
    where = jax.tree.map(lambda x: x.sharding, state)
    if key.name == "remember":
        assert texts is not None
        shardings = {"out_shardings": where.tokens} if in_use() else {}
        jitted = jax.jit(remember, donate_argnums=0, **shardings)
        return Program(str(key), jitted, (texts, ints(), ints(texts.shape[1])), {})
    if key.name in ("mark", "scrub"):
        args: tuple[Any, ...]
        changed: Any = state if key.name == "scrub" else wide(state.sampler)
        if key.name == "mark":
            n, words = masked(settings), token_mask.all_allowed(config.vocab_size).shape
            marks = Marked(ints(MARKED), ints(MARKED), jax.ShapeDtypeStruct((MARKED,), jnp.bool))
            masks = jax.ShapeDtypeStruct((n, *words), jnp.uint32)
            function, args = mark, (ints(n), masks, ints(settings.chunk_rows), marks)
        else:
            function, args = scrub, (ints(settings.pages_per_row),)
        shardings = {"out_shardings": jax.tree.map(lambda x: x.sharding, changed)} if in_use() else {}
        return Program(str(key), jax.jit(function, donate_argnums=0, **shardings), (changed, *args), {})
    traced = batch_invariant(settings.batch_invariant)
    static: dict[str, Any] = {"config": config, "profile": profile_of(key)}
    if key.name == "decode":
        control = programs.decode_control(key.size)
        function = partial(traced(programs.decode), **static, rows=key.size, stride=settings.steps)
        options = (graph_options() if settings.steps > 1 else {}) | weight_options(config, key.size)
    elif key.name == "verify":
        control = programs.verify_control(key.size, settings.drafts)
        loops = settings.steps > 1
        function = partial(traced(programs.verify), **static, rows=key.size, drafts=settings.drafts, loops=loops)
        options = (graph_options() if loops else {}) | weight_options(config, key.size * (1 + settings.drafts))
    else:
        rows = key.rows or settings.rows
        joining = _joining(settings, state)
        control = programs.mixed_control(key.size, rows, flat_size(joining))
        static |= {"tokens": key.size, "rows": rows, "chunk_rows": settings.chunk_rows, "joining": joining}
        static |= {"scored": key.name == "scored"}
        function = partial(traced(programs.mixed), **static)
        options = weight_options(config, key.size, library=PROMPT_ROWS)
    verifies = key.name == "verify"
    told: list[Any] = [None] * (2 if key.name in ("decode", "verify") else 3)
    told += [texts and where.tokens] if verifies else []
    shardings = {"out_shardings": (where, *told)} if in_use() else {}
    jitted = jax.jit(function, donate_argnums=(1, 4) if verifies else 1, compiler_options=options or None, **shardings)
    more = [texts, None if key.greedy else masks_of(key, settings, config)] if verifies else []
    return Program(str(key), jitted, (params, state, ints(control.size), adapters, *more), {})


def texts_of(settings: EngineSettings, state: DecodeState) -> jax.ShapeDtypeStruct | None:
    """The texts in which rows look for drafts; None if no row does."""
    if not settings.looks_up:
        return None
    shape = settings.rows, settings.pages_per_row * settings.page_size
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=state.tokens.sharding)


def masks_of(key: Key, settings: EngineSettings, config: LlamaConfig) -> jax.ShapeDtypeStruct:
    """The masks that `verify` takes, per row and place."""
    words = token_mask.all_allowed(config.vocab_size).shape
    return jax.ShapeDtypeStruct((key.size, 1 + settings.drafts, *words), jnp.uint32)


def masked(settings: EngineSettings) -> int:
    """Number of rows that one `mark` call gives masks to."""
    return min(MASKED, settings.rows)


def _joining(settings: EngineSettings, state: DecodeState) -> Joining:
    """Shapes of the arguments of `join`."""
    n = settings.chunk_rows

    def like(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype)

    numbers = jax.ShapeDtypeStruct((n,), jnp.int32)
    pages = jax.ShapeDtypeStruct((n, settings.pages_per_row), jnp.int32)
    return Joining(
        rows=numbers,
        pages=pages,
        shared=numbers,
        length=numbers,
        limit=numbers,
        rope_lengths=numbers,
        adapter_ids=numbers,
        sampler=jax.tree.map(like, narrow(state).sampler),
    )


def profile_of(key: Key) -> SamplerProfile:
    """The profile of the program's sampler."""
    return GREEDY if key.greedy else FULL
