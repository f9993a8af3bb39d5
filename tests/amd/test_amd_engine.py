"""A step of the engine on an emulated GPU: prompts and decoding rows of one engine in one program, against the CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params

from amd.harness import compile_on
from amd.test_amd_model import MODELS, TOLERANCE, assert_launched, error, named
from llama_jax.engine import programs
from llama_jax.engine.core import Core
from llama_jax.engine.joining import Beginnings
from llama_jax.engine.program_set import Key, profile_of
from llama_jax.engine.settings import EngineSettings
from llama_jax.kernels.attention import decode_attention, flash_attention
from llama_jax.kernels.dispatch import using
from llama_jax.kernels.norm import add_rms_norm_op
from llama_jax.model.loaded import Model
from llama_jax.sampling import SamplingParams

# Pallas's Triton lowering, which JAX has deprecated.
pytestmark = [pytest.mark.amd, pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")]

SETTINGS = EngineSettings(
    rows=5,
    context=128,
    pages=10,
    decode_rows=(5,),
    mixed_tokens=(32,),
    few_tokens=(32,),
    few_rows=4,
    chunk_rows=2,
    page_size=64,
)


def mixed_step(core: Core) -> tuple[Key, Any, np.ndarray, Any]:
    """Runs an engine until a step has two decoding rows and chunks of two prompts, one of which has begun before.

    Returns:
      the step's program, its state and control, and what it returned: numpy arrays.
    """
    rng = np.random.default_rng(0)

    def add(length: int, **params: Any) -> None:
        prompt = rng.integers(0, core.model.config.vocab_size, length).tolist()
        core.add(prompt, SamplingParams(seed=length, **params), limit=16)

    taken: list[tuple[Key, Any, np.ndarray, Any]] = []
    steps: list[Any] = []
    run, schedule = core.programs.step, core.scheduler.schedule

    def recorded() -> Any:
        steps.append(schedule())
        return steps[-1]

    def step(key: Key, state: Any, control: np.ndarray, masks: np.ndarray | None = None) -> Any:
        before = jax.tree.map(np.array, state)  # the step takes the state's place
        result = run(key, state, control, masks)
        chunks = steps[-1].chunks
        if len(steps[-1].decoding) == len(chunks) == 2 and any(chunk.start for chunk in chunks):
            taken.append((key, before, control, jax.tree.map(np.array, result)))
        return result

    core.scheduler.schedule, core.programs.step = recorded, step  # type: ignore[method-assign]
    add(66, temperature=0.0, repetition_penalty=1.3)
    add(5, temperature=0.8, top_p=0.9)
    for _ in range(5):
        core.step()
    add(40, temperature=0.7, top_k=20)
    add(25, temperature=0.0)
    while not taken:
        assert not core.idle
        core.step()
    return taken[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_mixed_step_agrees_with_the_cpu() -> None:
    cfg = MODELS["dense"]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(cfg))
    model = Model(params, cfg)
    key, state, control, want = mixed_step(Core(model, SETTINGS))
    assert (key.name, key.greedy, key.rows) == ("mixed", False, 4)
    function = partial(
        programs.mixed,
        config=cfg,
        profile=profile_of(key),
        tokens=key.size,
        rows=key.rows,
        chunk_rows=SETTINGS.chunk_rows,
        joining=Beginnings(model, SETTINGS).idle,
    )

    def step(params: Any, state: Any, control: Any) -> Any:
        return function(params, state, control, None)

    with using(**named("pallas_triton")):
        got, report = compile_on("gfx942", step, params, state, control).run(params, state, control)
    print(f"{report.wave_instructions} wave instructions, {dict(report.kernels)}")
    (state, told, logprobs, _), (want_state, want_told, want_logprobs, _) = got, want
    drew = (want_told[:, -1] & (programs.DONE - 1)) > 0
    assert drew.sum() >= 2
    np.testing.assert_array_equal(told, want_told)
    np.testing.assert_allclose(
        logprobs.token[drew], want_logprobs.token[drew], atol=TOLERANCE * np.abs(want_logprobs.token[drew]).max()
    )
    # Pages that hold tokens: each slot's key and value, by the row's line of the page table.
    cache, want_cache = state.cache, want_state.cache
    row, slot = np.nonzero(want_cache.positions >= 0)
    assert len(row) > 66 + 5 + 30
    page = want_cache.page_table[row, slot // SETTINGS.page_size]
    for mine, theirs in zip((*cache.k, *cache.v), (*want_cache.k, *want_cache.v), strict=True):
        used = (page, slice(None), slot % SETTINGS.page_size)
        assert error(mine[used], theirs[used]) < TOLERANCE
    # All else are counts, flags and settings, which are equal.
    numbers, want_numbers = (jax.tree_util.tree_flatten_with_path(s)[0] for s in (state, want_state))
    for (path, mine), (_, theirs) in zip(numbers, want_numbers, strict=True):
        if mine.dtype != jnp.bfloat16:
            np.testing.assert_array_equal(mine, theirs, err_msg=jax.tree_util.keystr(path))
    for operation in (decode_attention, flash_attention, add_rms_norm_op):
        assert_launched(report.kernels, operation)
