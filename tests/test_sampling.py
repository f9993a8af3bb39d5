"""The sampler against an independent one, in float64, that sorts the vocabulary.

`eight_devices_sampling.py` runs on eight simulated devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import on_eight_devices
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.special import chdtrc

from llama_jax.errors import RequestError
from llama_jax.sampling import SamplerProfile, SamplerState, SamplingParams, make_sampler, sample, token_logprobs
from llama_jax.sampling.truncation import truncate

# A few sizes of vocabulary only, since each compiles programs of its own.
VOCABULARIES = st.sampled_from([1, 2, 5, 17, 200])
jitted_sample = jax.jit(sample, static_argnames="profile")
jitted_truncate = jax.jit(truncate)
WIDTH = 24
"""Tokens of the vocabulary in most tests, so that they share compiled samplers."""


def padded(*logits: float) -> np.ndarray:
    """float32 [WIDTH], these and behind them tokens that are impossible."""
    return np.asarray([*logits, *[-np.inf] * (WIDTH - len(logits))], np.float32)


def reference_logits(
    raw: np.ndarray,
    p: SamplingParams,
    *,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    eos: Sequence[int] = (),
) -> np.ndarray:
    """Logits before temperature, float64 [vocab]: min_tokens, logit_bias, repetition, frequency, presence."""
    x = raw.astype(np.float64)
    if len(output) < p.min_tokens:
        x[[*([] if p.ignore_eos else eos), *p.stop_token_ids]] = -np.inf
    for token, bias in p.logit_bias.items():
        x[token] += bias
    for token in {*prompt, *output}:
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token in set(output):
        x[token] -= p.frequency_penalty * list(output).count(token) + p.presence_penalty
    if p.allowed_token_ids is not None:
        x[np.setdiff1d(np.arange(len(x)), p.allowed_token_ids)] = -np.inf
    return x


def reference_truncate(x: np.ndarray, *, top_p: float, top_k: int, min_p: float) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens min_p, top_k and top_p keep of logits x [vocab] after temperature, by sorting.

    Tokens as likely as the last one that is kept are kept too.

    Returns:
      bool [vocab], kept, and bool [vocab], too close to call in float32.
    """
    x = x.astype(np.float64)
    with np.errstate(divide="ignore"):
        floor = np.log(np.float64(min_p))
    gap = x - x.max()
    keep = gap >= floor
    close = (min_p > 0) & (gap < 0) & (np.abs(gap - max(floor, -1e300)) <= 1e-5 * max(1.0, abs(floor)))
    if close.any():  # what follows depends on it
        return keep, np.ones_like(keep)
    if 0 < top_k < len(x):
        keep &= x >= np.sort(np.where(keep, x, -np.inf))[-top_k]
    probs = np.where(keep, np.exp(x - x.max()), 0.0)
    probs /= probs.sum()
    if top_p < 1:
        likely_first = np.argsort(-probs, kind="stable")
        before = np.cumsum(probs[likely_first]) - probs[likely_first]
        last = max(int((before < top_p).sum()) - 1, 0)
        cut = probs[likely_first[last]]
        keep &= probs >= cut
        # Where the sum is top_p but for rounding, either neighbour may be the last one.
        for i in np.flatnonzero(np.abs(before - top_p) < 1e-5):
            close |= (probs == probs[likely_first[i]]) | (probs == probs[likely_first[max(i - 1, 0)]])
    return keep, close


def sampler_state(p: SamplingParams, vocab: int, **changes: Any) -> SamplerState:
    return dataclasses.replace(make_sampler([p], [[]], vocab)[1], **changes)


@st.composite
def logits_rows(draw: st.DrawFn) -> np.ndarray:
    """float32 [vocab] with ties, extremes and forbidden tokens."""
    vocab = draw(VOCABULARIES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.standard_normal(vocab) * draw(st.sampled_from([0.0, 0.01, 1.0, 5.0, 100.0, 1e4]))
    if draw(st.booleans()):
        x = np.round(x * 2) / 2  # many ties
    x = x + draw(st.sampled_from([0.0, 1e4, -1e4]))
    forbidden = rng.random(vocab) < draw(st.sampled_from([0.0, 0.3, 0.95]))
    forbidden[rng.integers(vocab)] = False
    return np.where(forbidden, -np.inf, x).astype(np.float32)


@settings(max_examples=300)
@given(
    x=logits_rows(),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-6, 1e-300]) | st.floats(1e-3, 1),
    top_k=st.sampled_from([0, -1, 1, 2, 50, 200, 10**6]),
    min_p=st.sampled_from([0.0, 1e-30, 0.05, 0.5, 1.0]) | st.floats(1e-3, 1),
)
@example(x=np.zeros(5, np.float32), top_p=0.4, top_k=2, min_p=1.0)  # all as likely: all kept
@example(x=np.asarray([0.0, -0.0, -0.0, 0.0, -1.0], np.float32), top_p=0.9, top_k=1, min_p=0.0)
@example(x=np.asarray([5.0, -np.inf, -np.inf, -np.inf, 5.0], np.float32), top_p=1e-300, top_k=1, min_p=1.0)
@example(x=np.asarray([-1e4, 1e4], np.float32), top_p=0.9, top_k=2, min_p=0.0)
def test_truncation_keeps_what_sorting_keeps(x: np.ndarray, top_p: float, top_k: int, min_p: float) -> None:
    p = SamplingParams(top_p=top_p, top_k=top_k, min_p=min_p)
    kept = np.isfinite(np.asarray(jitted_truncate(x[None], sampler_state(p, len(x))))[0])
    want, close = reference_truncate(x, top_p=np.float32(top_p).item(), top_k=top_k, min_p=np.float32(min_p).item())
    want &= np.isfinite(x)
    assert kept[x == x.max()].all()  # the most likely token always stays
    np.testing.assert_array_equal(kept[~close], want[~close])


@cache
def noise(seed: int, step: int, vocab: int) -> np.ndarray:
    """The Gumbel noise of one row and step: part of what a seed means, so that a change of it is noticed."""
    key = jax.random.wrap_key_data(np.asarray([seed >> 32, seed & 0xFFFFFFFF], np.uint32), impl="threefry2x32")
    return np.asarray(jax.random.gumbel(jax.random.fold_in(key, step), (vocab,), jnp.float32), np.float64)


@st.composite
def requests(draw: st.DrawFn, vocab: int) -> SamplingParams:
    tokens = st.integers(0, vocab - 1)
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.5, 50.0])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.3, 1e-6])),
        top_k=draw(st.sampled_from([0, 1, 3, 40])),
        min_p=draw(st.sampled_from([0.0, 0.1, 1.0])),
        presence_penalty=draw(st.sampled_from([0.0, 1.5, -2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.7, -2.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.5, 100.0])),
        logit_bias=draw(st.dictionaries(tokens, st.sampled_from([-100, -1.5, 3, 100]), max_size=3)),
        min_tokens=draw(st.integers(0, 3)),
        stop_token_ids=draw(st.lists(tokens, max_size=2)),
        ignore_eos=draw(st.booleans()),
        allowed_token_ids=draw(st.none() | st.lists(tokens, min_size=2, max_size=8)),
        logprobs=draw(st.sampled_from([None, 0, 2])),
        seed=draw(st.sampled_from([0, 1, 2**63 + 5, 2**64 - 1])),
    )


@settings(max_examples=40)
@given(data=st.data(), vocab=st.sampled_from([20, 40]), rng=st.integers(0, 2**32).map(np.random.default_rng))
def test_sampler_equals_reference(data: st.DataObject, vocab: int, rng: np.random.Generator) -> None:
    """Whole sequences of mixed batches: order of the steps, state, noise, and log-probabilities of the raw logits."""
    batch = [dataclasses.replace(data.draw(requests(vocab)), logprobs=20) for _ in range(3)]
    prompts = [rng.integers(0, vocab, n).tolist() for n in (1, 4, 0)]
    eos = [1]
    everything = SamplerProfile("full", logprobs=True)
    _, full = make_sampler(batch, prompts, vocab, eos, everything)
    outputs: list[list[int]] = [[], [], []]
    for step in range(4):
        raw = (rng.standard_normal((3, vocab)) * 3).astype(np.float32)
        tokens, full, logprobs = jitted_sample(raw, full, profile=everything)
        for row, p in enumerate(batch):
            token = int(tokens[row])
            x = reference_logits(raw[row], p, prompt=prompts[row], output=outputs[row], eos=eos)
            assume(np.isfinite(x.max()))  # else all that is allowed ends the text too early
            if not p.greedy:
                scaled = x / np.float64(np.float32(p.temperature))
                keep, close = reference_truncate(scaled, top_p=p.top_p, top_k=p.top_k, min_p=p.min_p)
                assume(not close.any())
                x = np.where(keep, scaled, -np.inf) + noise(p.seed or 0, step, vocab)
            best_two = np.sort(x)[-2:]
            assume(best_two[1] - best_two[0] > 1e-3)  # else rounding decides
            assert token == int(np.argmax(x)), (row, step, p)
            outputs[row].append(token)
            shifted = raw[row].astype(np.float64) - raw[row].max()
            want = shifted - np.log(np.exp(shifted).sum())
            assert float(logprobs.token[row]) == pytest.approx(want[token], abs=1e-5)
            np.testing.assert_array_equal(logprobs.top_ids[row], np.argsort(-want, kind="stable")[:20])
            np.testing.assert_allclose(logprobs.top[row], np.sort(want)[::-1][:20], atol=1e-5)


FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "temperature": {"temperature": 0.5},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "bias": {"logit_bias": {3: 4.0}},
    "repetition": {"repetition_penalty": 1.8},
    "presence": {"presence_penalty": 1.0},
    "frequency": {"frequency_penalty": 1.0},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": [4]},
    "allowed": {"allowed_token_ids": [2, 5, 6, 23]},
    "logprobs": {"logprobs": 3},
}


FULL = ("bias", "repetition", "presence", "frequency", "min_tokens", "allowed")
"""Features of the full profile."""


@pytest.mark.slow
@pytest.mark.parametrize("other", FEATURES)
def test_what_another_row_asks_for_changes_nothing(other: str) -> None:
    """A batch compiles what one of its rows needs; the others must not notice."""
    raw = np.random.default_rng(0).standard_normal((6, WIDTH)).astype(np.float32) * 2
    params = {name: SamplingParams(**{"seed": 11, **fields}) for name, fields in FEATURES.items()}

    def tokens(batch: list[SamplingParams]) -> list[int]:
        profile, state = make_sampler(batch, [[1, 2]] * len(batch), WIDTH)
        drawn = []
        for logits in raw:
            out, state, _ = jitted_sample(jnp.tile(logits, (len(batch), 1)), state, profile=profile)
            drawn.append(int(out[0]))
        return drawn

    for name in ("greedy", "plain", "repetition"):
        assert tokens([params[name]]) == tokens([params[name], params[other]]), name


def test_every_setting_has_its_profile() -> None:
    for name, fields in FEATURES.items():
        kind = "greedy" if name == "greedy" else "full" if name in FULL else "sampling"
        assert SamplerProfile.of([SamplingParams(**fields)]) == SamplerProfile(kind, name == "logprobs"), name  # type: ignore[arg-type]
    assert SamplerProfile.of([SamplingParams(temperature=0.0, top_p=0.5, top_k=3)]) == SamplerProfile()
    mixed = SamplerProfile.of([SamplingParams(**fields) for fields in FEATURES.values()])
    assert mixed == SamplerProfile("full", logprobs=True)


@pytest.mark.parametrize("name", FEATURES)
def test_a_profile_that_can_do_more_draws_the_same(name: str) -> None:
    """So that a request may join a batch that runs with more."""
    params = SamplingParams(**{"seed": 4, **FEATURES[name]})
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((1, WIDTH)) * 2, jnp.float32)
    least = SamplerProfile.of([params])
    drawn = {}
    for profile in (least, SamplerProfile("full", least.logprobs), SamplerProfile("full", logprobs=True)):
        _, state = make_sampler([params], [[1, 2]], WIDTH, profile=profile)
        tokens = []
        for _ in range(6):
            out, state, _ = jitted_sample(logits, state, profile=profile)
            tokens.append(int(out[0]))
        drawn[profile] = tokens
    assert len({tuple(t) for t in drawn.values()}) == 1
    if least.kind != "greedy":
        with pytest.raises(RequestError) as caught:
            make_sampler([params], [[1, 2]], WIDTH, profile=SamplerProfile())
        assert caught.value.param == "profile"


def test_rows_count_for_themselves() -> None:
    """Noise is of a row's own seed and count, whatever the counts of its neighbours."""
    params = [SamplingParams(seed=7)] * 3
    profile, state = make_sampler(params, [[]] * 3, 40, profile=SamplerProfile("full", logprobs=True))
    logits = np.zeros((3, 40), np.float32)
    alone = []
    one = dataclasses.replace(state)
    for _ in range(4):
        out, one, _ = jitted_sample(logits, one, profile=profile)
        alone.append(out.tolist()[0])
    shifted = dataclasses.replace(state, count=np.asarray([0, 2, 3], np.int32))
    tokens, after, _ = jitted_sample(logits, shifted, profile=profile)
    assert tokens.tolist() == [alone[0], alone[2], alone[3]]
    assert after.count.tolist() == [1, 3, 4]


# Single properties.


def draw_many(logits: np.ndarray, rows: int, *, steps: int = 1, **fields: Any) -> np.ndarray:
    """Tokens [rows * steps] of as many rows, seeds 0, 1, 2, ..."""
    p = SamplingParams(seed=0, **fields)
    profile, state = make_sampler([p], [[]], len(logits))
    wide = {
        f.name: np.repeat(value, rows, axis=0)
        for f in dataclasses.fields(SamplerState)
        if (value := getattr(state, f.name)) is not None
    }
    wide["seed"] = np.stack([np.zeros(rows), np.arange(rows)], axis=1).astype(np.uint32)
    state = dataclasses.replace(state, **wide)
    tokens = []
    for _ in range(steps):
        drawn, state, _ = jitted_sample(np.tile(logits, (rows, 1)), state, profile=profile)
        if state.seen is not None:  # draws of one distribution: what came before must not count
            state = dataclasses.replace(state, seen=jnp.zeros_like(state.seen))
        tokens.append(np.asarray(drawn))
    return np.concatenate(tokens)


def chance(counts: np.ndarray, weights: np.ndarray) -> float:
    """Of counts as far from what the weights lead to expect, or farther: Pearson's test."""
    expected = weights / weights.sum() * counts.sum()
    return float(chdtrc(len(counts) - 1, ((counts - expected) ** 2 / expected).sum()))


DISTRIBUTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"logit_bias": {7: 2.0, 0: -100}},
    {"temperature": 0.7, "top_k": 6, "top_p": 0.9, "min_p": 0.02, "logit_bias": {2: 1.0}},
]


@pytest.mark.slow
@pytest.mark.parametrize("fields", DISTRIBUTIONS, ids=lambda f: ",".join(f) or "plain")
@pytest.mark.parametrize(("rows", "steps"), [(20_000, 1), (200, 100)], ids=["seeds", "steps"])
def test_distribution(fields: dict[str, Any], rows: int, steps: int) -> None:
    """20,000 draws over seeds, or over steps of few seeds, follow the probabilities; one too many is never drawn."""
    logits = padded(2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0)
    p = SamplingParams(**fields)
    x = reference_logits(logits, p) / p.temperature
    keep, close = reference_truncate(x, top_p=p.top_p, top_k=p.top_k, min_p=p.min_p)
    assert not close.any()
    probs = np.where(keep, np.exp(x - x.max()), 0)
    probs /= probs.sum()
    counts = np.bincount(draw_many(logits, rows, steps=steps, **fields), minlength=len(logits))
    assert counts[~keep].sum() == 0
    usual = probs * rows * steps >= 5  # the test needs five expected draws a class
    assert counts[~usual].sum() <= 20
    assert chance(counts[usual], probs[usual]) > 1e-3


def test_draws_of_neighbouring_seeds_and_steps_are_independent() -> None:
    tokens = draw_many(padded(0.0, 0.0, 0.0, 0.0), 200, steps=100).reshape(100, 200)
    for pairs in (
        tokens[1:] * 4 + tokens[:-1],
        tokens[:, 1:] * 4 + tokens[:, :-1],
        tokens[1:, :-1] * 4 + tokens[:-1, 1:],
    ):
        assert chance(np.bincount(pairs.ravel(), minlength=16), np.ones(16)) > 1e-3


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-6}, {"top_p": 1e-300}, {"min_p": 1.0}])
def test_cuts_that_leave_one_token(fields: dict[str, Any]) -> None:
    logits = padded(0.0, 0.1, 0.3, 0.2)
    assert set(draw_many(logits, 200, steps=3, **fields).tolist()) == {2}


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}])
def test_ties_at_the_cut_are_all_kept(fields: dict[str, Any]) -> None:
    logits = padded(0.3, 0.1, 0.3, 0.2)
    assert set(draw_many(logits, 200, steps=3, **fields).tolist()) == {0, 2}


@pytest.mark.parametrize(("temperature", "greedy"), [(0.0, True), (1e-9, True), (9.9e-6, True), (1.1e-5, False)])
def test_greedy_below_a_hundred_thousandth(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy
    logits = padded(0.0, 1e-5, 0.0)  # at 1.1e-5 still a matter of chance
    drawn = set(draw_many(logits, 200, steps=2, temperature=temperature).tolist())
    assert (drawn == {1}) is greedy


@pytest.mark.parametrize("scale", [1e4, 1e30])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1.1e-5},
        {"temperature": 1e20},
        {"top_p": 0.9, "top_k": 5, "min_p": 0.1},
        {"repetition_penalty": 1e20, "presence_penalty": 2.0},
        {"repetition_penalty": 1e-20, "frequency_penalty": -2.0, "top_p": 0.5},
    ],
    ids=lambda f: ",".join(f"{k}={v:g}" for k, v in f.items()) or "plain",
)
def test_extremes_give_tokens_and_no_nan(fields: dict[str, Any], scale: float) -> None:
    logits = padded(scale, -scale, 0.0, -0.0, scale / 2)[None]
    profile, state = make_sampler([SamplingParams(seed=1, logprobs=2, **fields)], [[0, 1, 2, 5]], WIDTH)
    for _ in range(5):
        tokens, state, logprobs = jitted_sample(logits, state, profile=profile)
        assert 0 <= int(tokens[0]) < 5  # the impossible ones never
        assert logprobs is not None
        assert not np.isnan(logprobs.token).any()
        assert not np.isnan(logprobs.top).any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_when_every_token_would_end_the_text_too_early(temperature: float) -> None:
    """min_tokens that leave nothing: some token of the vocabulary comes all the same."""
    p = SamplingParams(temperature=temperature, top_p=0.5, min_tokens=2, stop_token_ids=range(4), seed=0)
    profile, state = make_sampler([p], [[]], 4)
    tokens, _, _ = jitted_sample(jnp.zeros((1, 4)), state, profile=profile)
    assert 0 <= int(tokens[0]) < 4


def run_greedy(logits: Sequence[float], steps: int, prompt: Sequence[int] = (), **fields: Any) -> list[int]:
    profile, state = make_sampler([SamplingParams(temperature=0.0, **fields)], [prompt], WIDTH, [0])
    tokens = []
    for _ in range(steps):
        out, state, _ = jitted_sample(padded(*logits)[None], state, profile=profile)
        tokens.append(int(out[0]))
    return tokens


@pytest.mark.parametrize(
    ("fields", "prompt", "want"),
    [
        ({}, [], [3, 3, 3, 3]),
        ({"presence_penalty": 0.6}, [], [3, 2, 3, 3]),  # once, however often: 4.0-0.6 against 3.5-0.6
        ({"presence_penalty": 0.6}, [3], [3, 2, 3, 3]),  # the prompt does not count
        ({"frequency_penalty": 0.6}, [], [3, 2, 3, 1]),  # 4.0, 3.4 < 3.5, 3.4 > 3.0, then 2.8, 2.9 < 3.0
        ({"frequency_penalty": 0.6}, [3, 3], [3, 2, 3, 1]),
        ({"repetition_penalty": 2.0}, [], [3, 2, 1, 3]),  # 4/2 < 3.5, 3.5/2 < 3, 3/2 < 4/2: once and for all
        ({"repetition_penalty": 2.0}, [3], [2, 1, 3, 3]),  # the prompt counts
        ({"repetition_penalty": 0.5}, [1], [1, 1, 1, 1]),  # below one it attracts
        ({"logit_bias": {1: 1.5}}, [], [1, 1, 1, 1]),
        ({"logit_bias": {3: -100, 2: -100}}, [], [1, 1, 1, 1]),
        ({"logit_bias": {1: 100}, "stop_token_ids": [1], "min_tokens": 2}, [], [3, 3, 1, 1]),
    ],
)
def test_penalties_and_bias(fields: dict[str, Any], prompt: list[int], want: list[int]) -> None:
    assert run_greedy([-1.0, 3.0, 3.5, 4.0], 4, prompt, **fields) == want


def test_repetition_penalty_pushes_negative_logits_down() -> None:
    assert run_greedy([-1.0, -1.5, -4.0], 3, repetition_penalty=2.0, ignore_eos=True) == [0, 1, 0]


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({}, [0, 0, 0]),
        ({"min_tokens": 2}, [1, 1, 0]),
        ({"min_tokens": 2, "stop_token_ids": [1]}, [2, 2, 0]),
        ({"min_tokens": 2, "ignore_eos": True}, [0, 0, 0]),
        ({"min_tokens": 2, "ignore_eos": True, "stop_token_ids": [0]}, [1, 1, 0]),
    ],
)
def test_no_end_before_min_tokens(fields: dict[str, Any], want: list[int]) -> None:
    assert run_greedy([3.0, 2.0, 1.0], 3, **fields) == want


def test_bias_and_penalties_come_before_temperature() -> None:
    """At a high temperature a bias of 1.5 must be divided too."""
    logits = padded(0.0, 0.0)
    share = (draw_many(logits, 200, steps=100, temperature=10.0, logit_bias={1: 20.0}) == 1).mean()
    assert share == pytest.approx(1 / (1 + np.exp(-2.0)), abs=0.01)


def test_min_p_comes_after_temperature_and_top_p_after_top_k() -> None:
    logits = padded(*np.log([0.5, 0.3, 0.15, 0.05]))
    # At temperature 2 the second is 0.77 times as likely as the first, and not 0.6 times.
    assert set(draw_many(logits, 200, steps=3, temperature=2.0, min_p=0.7).tolist()) == {0, 1}
    # Of the two that top_k leaves, the first has 0.625: enough for 0.6. Of all four it would have 0.5.
    assert set(draw_many(logits, 200, steps=3, top_k=2, top_p=0.6).tolist()) == {0}
    # Of the three that min_p leaves, two have 0.84.
    assert set(draw_many(logits, 200, steps=3, min_p=0.2, top_p=0.83).tolist()) == {0, 1}


def test_log_probabilities_are_of_the_raw_logits() -> None:
    logits = padded(1.0, 3.0, 2.0, 0.0)[None]
    p = SamplingParams(
        temperature=0.3,
        top_k=1,
        logit_bias={3: 100},
        repetition_penalty=1.5,
        logprobs=2,
        min_tokens=1,
        stop_token_ids=[1],
    )
    profile, state = make_sampler([p], [[3]], WIDTH)
    tokens, _, logprobs = jitted_sample(logits, state, profile=profile)
    want = np.asarray(jax.nn.log_softmax(logits[0]))
    assert logprobs is not None
    assert tokens.tolist() == [3]
    assert float(logprobs.token[0]) == pytest.approx(want[3])
    assert logprobs.top_ids[0, :4].tolist() == [1, 2, 0, 3]
    np.testing.assert_allclose(logprobs.top[0, :4], want[[1, 2, 0, 3]], rtol=1e-6)


def test_token_logprobs_of_the_whole_vocabulary() -> None:
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5)), jnp.float32)
    got = token_logprobs(logits, jnp.asarray([0, 4, 2]), 5)
    want = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(got.token, want[[0, 1, 2], [0, 4, 2]], rtol=1e-6)
    np.testing.assert_array_equal(got.top_ids, np.argsort(-want, axis=1))
    np.testing.assert_allclose(np.exp(got.top).sum(1), 1, rtol=1e-5)


def test_sampler_is_pure_and_differs_by_count() -> None:
    profile, start = make_sampler([SamplingParams(seed=3)], [[]], WIDTH)
    run = partial(jitted_sample, np.zeros((1, WIDTH), np.float32), profile=profile)
    state, drawn = start, []
    for _ in range(4):
        tokens, after, _ = run(state)
        assert run(state)[0].tolist() == tokens.tolist()
        state = after
        drawn += tokens.tolist()
    assert len(set(drawn)) > 1


def test_sampler_outside_of_jit() -> None:
    """A researcher may call it as it is, with the state as `make_sampler` returns it."""
    p = SamplingParams(seed=3, top_p=0.9, min_tokens=1, repetition_penalty=1.2, logit_bias={1: 1.0}, logprobs=1)
    profile, state = make_sampler([p], [[2]], WIDTH, [0])
    logits = jnp.arange(float(WIDTH))[None]
    tokens, after, logprobs = sample(logits, state, profile)
    want, want_after, want_logprobs = jitted_sample(logits, state, profile=profile)
    assert tokens.tolist() == want.tolist()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), (after, logprobs), (want_after, want_logprobs))


@pytest.mark.slow
@pytest.mark.timeout(600)  # a process of its own, for some tens of seconds on an idle machine
def test_on_eight_devices() -> None:
    on_eight_devices("eight_devices_sampling.py")
