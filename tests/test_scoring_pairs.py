"""Texts cut into token ids to score, and the scores of tiny models against `forward` over each whole text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, random_params, run, tiny_config
from hypothesis import given
from hypothesis import strategies as st

import llama_jax as lj
from llama_jax.config import RopeSpec
from llama_jax.errors import RequestError
from llama_jax.model.loaded import Model
from llama_jax.scoring.compute import Batch, batches
from llama_jax.scoring.pairs import Pair, fitted, windows
from llama_jax.text.tokenizer import Tokenizer

Ids = Sequence[int]


@pytest.fixture(scope="module")
def tiny() -> Model:
    config = tiny_config()
    return Model(random_params(config), config)


def whole(model: Model, context: Ids, continuation: Ids) -> tuple[np.ndarray, bool]:
    """Log-probabilities and greediness by one plain `forward` over the text, without a cache; padded to one shape."""
    text = [*context, *continuation][:-1]
    tokens, positions = np.zeros((1, 48), np.int32), np.full((1, 48), -1, np.int32)
    tokens[0, : len(text)], positions[0, : len(text)] = text, np.arange(len(text))
    logits = np.asarray(run(model.params, model.config, jnp.asarray(tokens), jnp.asarray(positions))[0][0], np.float64)
    logits = logits[len(context) - 1 : len(text)]
    own = logits[np.arange(len(continuation)), list(continuation)]
    return own - np.log(np.exp(logits).sum(axis=1)), bool((logits.argmax(axis=1) == continuation).all())


def random_pairs(seed: int, vocab: int = 40) -> list[tuple[list[int], list[int]]]:
    """Few contexts, of one token and more, several continuations of each, and a single one."""
    rng = np.random.default_rng(seed)

    def ids(n: int) -> list[int]:
        return rng.integers(0, vocab, n).tolist()

    contexts = [ids(n) for n in (1, 7, 20)]
    pairs = [(contexts[i], ids(n)) for i, n in ((0, 1), (1, 3), (2, 1), (1, 1), (0, 12), (1, 9), (2, 2))]
    return [*pairs, (ids(33), ids(5))]


# Scores.


@pytest.mark.parametrize("batch_tokens", [None, 64], ids=str)
def test_scores_equal_forward_over_the_whole_text(tiny: Model, batch_tokens: int | None) -> None:
    pairs = random_pairs(0)
    pairs += [(pairs[1][0], [token]) for token in range(40)]  # one of which is the likeliest
    seen: list[tuple[int, int, str]] = []
    found = lj.score(tiny, None, pairs, batch_tokens=batch_tokens, progress=lambda *news: seen.append(news))
    assert len(found) == len(pairs)
    for (context, continuation), score in zip(pairs, found, strict=True):
        want, greedy = whole(tiny, context, continuation)
        np.testing.assert_allclose(score.logprobs, want, atol=2e-5)
        assert score.logprob == pytest.approx(want.sum(), abs=1e-4)
        assert score.is_greedy is greedy
        assert score.token_ids == tuple(continuation)
        assert score.dropped == 0
    assert sum(score.is_greedy for score in found[-40:]) == 1
    assert sum(np.exp(score.logprob) for score in found[-40:]) == pytest.approx(1, abs=1e-5)
    assert seen[-1] == (len(pairs), len(pairs), "pairs")
    assert (len(seen) <= 2) == (batch_tokens is None)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_every_kind_of_layer(name: str) -> None:
    model = Model(random_params(TINY[name]), TINY[name])
    pairs = random_pairs(1)
    for (context, continuation), score in zip(pairs, lj.score(model, None, pairs), strict=True):
        np.testing.assert_allclose(score.logprobs, whole(model, context, continuation)[0], atol=5e-5)


def test_rope_that_depends_on_the_length_shares_no_context_between_lengths() -> None:
    """With dynamic rope beyond the trained length a context's keys depend on what follows it."""
    rope = RopeSpec(kind="dynamic", factor=4.0, original_max_positions=16)
    config = tiny_config(rope=rope, max_position_embeddings=16)
    model = Model(random_params(config), config)
    pairs = random_pairs(2)
    for (context, continuation), score in zip(pairs, lj.score(model, None, pairs), strict=True):
        np.testing.assert_allclose(score.logprobs, whole(model, context, continuation)[0], atol=5e-5)


@pytest.mark.slow
def test_a_quantised_cache_is_what_is_scored(tiny: Model) -> None:
    """Near the exact scores, and not equal to them, whether a continuation shares its context or not."""
    pairs = random_pairs(3)
    exact = lj.score(tiny, None, pairs)
    found = lj.score(dataclasses.replace(tiny, kv_dtype="int8"), None, pairs)
    differences = [abs(a.logprob - b.logprob) for a, b in zip(exact, found, strict=True)]
    assert 1e-6 < max(differences) < 0.5
    assert differences[4] > 0  # one context token, twelve to score


def test_what_has_no_room_is_left_out_of_the_context(tiny: Model) -> None:
    rng = np.random.default_rng(4)
    context, continuation = rng.integers(0, 40, 30).tolist(), rng.integers(0, 40, 4).tolist()
    (score,) = lj.score(tiny, None, [(context, continuation)], max_length=10)
    assert score.dropped == 30 + 4 - 1 - 10
    np.testing.assert_allclose(score.logprobs, whole(tiny, context[-7:], continuation)[0], atol=2e-5)
    (score,) = lj.score(tiny, None, [(context, continuation)], max_length=4)
    np.testing.assert_allclose(score.logprobs, whole(tiny, context[-1:], continuation)[0], atol=2e-5)


@pytest.mark.parametrize(
    ("pairs", "options", "param"),
    [
        ([([1], [])], {}, "continuation"),
        ([([1], [2] * 5)], {"max_length": 4}, "continuation"),
        ([([], [1])], {}, "context"),
        ([([1], [40])], {}, "pairs"),
        ([([-1], [2])], {}, "pairs"),
        ([([1], "x")], {}, "pairs"),
        ([("a", "b")], {}, "pairs"),
        (["ab"], {}, "pairs"),
        ([([1], [2], [3])], {}, "pairs"),
        ([([1], [2])], {"max_length": 65}, "max_length"),
        ([([1], [2])], {"max_length": 0}, "max_length"),
        ([([1], [2])], {"batch_tokens": 0}, "batch_tokens"),
    ],
    ids=str,
)
def test_refused(tiny: Model, pairs: Any, options: dict[str, int], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        lj.score(tiny, None, pairs, **options)
    assert (caught.value.param, bool(caught.value.hint)) == (param, True)


def test_nothing_asked_nothing_computed(tiny: Model) -> None:
    assert lj.score(tiny, None, []) == []


# Windows and batches.


def test_windows_of_lm_eval() -> None:
    """The example in lm-eval's `LM.loglikelihood_rolling`, and one with more overlap."""
    assert [(p.context, p.continuation) for p in windows(range(10), -1, 4)] == [
        ((-1,), (0, 1, 2, 3)),
        ((3,), (4, 5, 6, 7)),
        ((5, 6, 7), (8, 9)),
    ]
    assert [(p.context, p.continuation) for p in windows(range(7), -1, 4, 3)] == [
        ((-1,), (0, 1, 2, 3)),
        ((1, 2, 3), (4, 5)),
        ((2, 3, 4, 5), (6,)),
    ]


@given(st.integers(0, 60), st.integers(1, 12), st.data())
def test_windows_score_each_token_once(count: int, length: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(1, length))
    text = list(range(count))
    found = list(windows(text, -1, length, overlap))
    assert [t for pair in found for t in pair.continuation] == text
    for number, pair in enumerate(found):
        assert pair.length <= length
        assert [*pair.context, *pair.continuation] == list(range(pair.context[0], pair.continuation[-1] + 1))
        if number:
            assert len(pair.context) >= overlap
            assert pair.length == length  # as much context as there is room for


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 70), st.integers(1, 40)), min_size=1, max_size=40),
    st.sampled_from([1, 64, 300, 5000]),
)
def test_batches_hold_every_pair_once(shapes: list[tuple[int, int, int]], budget: int) -> None:
    pairs = [Pair((first,) * length, (0,) * scored) for first, length, scored in shapes]
    found: list[Batch] = list(batches(pairs, budget))
    assert sorted(number for batch in found for number in batch.members) == list(range(len(pairs)))
    for batch in found:
        computed = len(batch.contexts) * batch.length + len(batch.members) * batch.scored
        assert len(batch.members) == 1 or computed <= budget
        assert len(set(batch.contexts)) == len(batch.contexts)  # each is computed once
        for number, owner in zip(batch.members, batch.owners, strict=True):
            assert batch.contexts[owner] == pairs[number].context
            assert len(pairs[number].context) <= batch.length
            assert len(pairs[number].continuation) <= batch.scored


def test_a_long_context_is_computed_once_for_all_of_its_continuations() -> None:
    (batch,) = batches([Pair((1,) * 500, (i,) * 6) for i in range(8)], 2048)
    assert (len(batch.contexts), batch.owners) == (1, [0] * 8)


@given(st.integers(1, 30), st.integers(1, 10), st.integers(10, 20))
def test_fitted(context: int, continuation: int, length: int) -> None:
    pair = Pair(tuple(range(context)), tuple(range(continuation)))
    found = fitted(pair, length)
    assert found.continuation == pair.continuation
    assert found.length == min(pair.length, length)
    assert pair.context[found.dropped :] == found.context


# Texts.


def test_perplexities_that_exceed_a_float_are_infinite() -> None:
    """A long text without white space is one word."""
    found = lj.scoring.RollingScore(np.full(400, -9.0, np.float32), words=1, bytes=1200, windows=1)
    assert (found.word_perplexity, found.byte_perplexity) == (np.inf, pytest.approx(np.exp(3.0)))


def test_rolling_scores(smollm2: tuple[Model, Tokenizer]) -> None:
    _, tokenizer = smollm2
    config = tiny_config(vocab_size=49152)
    model = Model(random_params(config), config)
    text = "One, two;\n three  and four, ﬁve é 日本 and so on and on and on.\n"
    ids = tokenizer.encode(text)
    (found,) = lj.score_rolling(model, tokenizer, [text], max_length=8, overlap=3)
    want = []
    assert tokenizer.bos_token_id is not None
    for pair in windows(ids, tokenizer.bos_token_id, 8, 3):
        want += whole(model, pair.context, pair.continuation)[0].tolist()
    np.testing.assert_allclose(found.logprobs, want, atol=5e-5)
    assert (found.tokens, found.bytes, found.words) == (len(ids), len(text.encode()), 16)
    total = -sum(want)
    assert found.perplexity == pytest.approx(np.exp(total / len(ids)), rel=1e-4)
    assert found.word_perplexity == pytest.approx(np.exp(total / found.words), rel=1e-3)
    assert found.bits_per_byte == pytest.approx(np.log2(found.byte_perplexity))
    assert found.error == pytest.approx(found.perplexity * np.std(want) / len(ids) ** 0.5, rel=1e-4)
    alone = lj.perplexity(model, tokenizer, text, max_length=8, overlap=3)
    assert alone == found.perplexity
    for texts, options, param in (
        ([""], {}, "texts"),
        (text, {}, "texts"),
        ([text], {"overlap": 0}, "overlap"),
        ([text], {"overlap": 9, "max_length": 8}, "overlap"),
    ):
        with pytest.raises(RequestError) as caught:
            lj.score_rolling(model, tokenizer, texts, **options)  # type: ignore[arg-type]
        assert caught.value.param == param
