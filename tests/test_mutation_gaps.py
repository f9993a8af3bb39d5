"""Gaps that other tests left: each test here fails under a mutation that the tests of its module let pass."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from helpers import load_golden

from llama_jax.cache import NewCache
from llama_jax.decode import buckets, loop
from llama_jax.decode import prefill as prefill_module
from llama_jax.sampling import SamplingParams, make_sampler
from llama_jax.sampling.state import LEAST_WIDTH
from llama_jax.sampling.truncation import truncate


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_every_stop_id_ends_a_row(place: str) -> None:
    """The ids are sorted on the way to the device and fill the row's whole width: each place of it counts."""
    golden = load_golden("llama2-mha")
    prompt = golden.tokens[0][golden.mask[0]].tolist()
    tokens = golden.greedy[0].tolist()
    margin = LEAST_WIDTH + len(tokens)
    stop = next(t for t in tokens[2:] if margin <= t < golden.config.vocab_size - margin)
    unused = [t for t in range(golden.config.vocab_size) if t not in tokens]
    below, above = [t for t in unused if t < stop], [t for t in unused if t > stop]
    spare = LEAST_WIDTH - 1
    others = {"first": above[:spare], "middle": [*below[:2], *above[: spare - 2]], "last": below[:spare]}[place]
    assert len(others) == spare

    params = SamplingParams(temperature=0.0, ignore_eos=True, stop_token_ids=[*others, stop])
    profile, sampler = make_sampler([params], [prompt], golden.config.vocab_size)
    assert sampler.stop_ids.shape == (1, LEAST_WIDTH)
    room = len(tokens)
    capacity = buckets.cache_bucket(buckets.prompt_bucket(len(prompt)) + room)
    cache = NewCache(1, capacity, np.dtype(np.float32))
    logits, cache = prefill_module.prefill(golden.params, golden.config, [prompt], cache)
    lengths, limits, none = (np.asarray([n], np.int32) for n in (len(prompt), room, 0))
    state, _ = loop.begin(logits, cache, sampler, lengths, limits, none, profile=profile)
    _, progress = loop.advance(golden.params, state, np.int32(room), config=golden.config, profile=profile, stride=room)
    assert 1 + int(progress.new[0]) == tokens.index(stop) + 1
    assert progress.finished_by_stop.tolist() == [True]


def test_top_p_that_the_likeliest_tokens_reach_exactly() -> None:
    """The smallest set of tokens whose probabilities reach top_p: at 0.5 of (0.5, 0.25, 0.25) it is the first alone."""
    logits = np.log(np.asarray([[0.25, 0.5, 0.25]], np.float32))
    for top_p, kept in ((0.5, [1]), (0.501, [0, 1, 2])):
        _, state = make_sampler([SamplingParams(top_p=top_p)], [[]], 3)
        cut = jax.jit(truncate)(logits, state)
        assert np.flatnonzero(np.isfinite(cut[0])).tolist() == kept
