"""Options of a request: every field of SamplingParams, and how it reaches the sampler."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.errors import RequestError
from llama_jax.sampling import Grammar, SamplingParams, make_sampler

NAN, INF = float("nan"), float("inf")

BAD_FIELDS: dict[str, list[Any]] = {
    "n": [0, -1, 1025, 10**9, 1.0, True, "1", None, NAN],
    "temperature": [-1e-9, -1, NAN, INF, -INF, 1e39, 10**400, True, "0.5", None, [1.0], 1j],
    "top_p": [0, 0.0, -0.1, 1.1, 1.0000001, NAN, INF, True, "1", None],
    "top_k": [-2, 2.5, 2**31, 10**400, True, "5", None, NAN],
    "min_p": [-0.1, 1.1, 2, NAN, INF, False, "0", None],
    "presence_penalty": [-2.1, 2.1, 3, NAN, INF, True, "0", None],
    "frequency_penalty": [-2.1, 2.1, 3, NAN, -INF, True, "0", None],
    "repetition_penalty": [0, 0.0, -1, NAN, INF, 1e39, True, "1", None],
    "logit_bias": [
        {-1: 1},
        {"5": 1},
        {1.0: 1},
        {True: 1},
        {1: 101},
        {1: -100.5},
        {1: NAN},
        {1: INF},
        {1: "1"},
        {1: None},
        {1: True},
        {1: 10**400},
        [1],
        5,
        "5",
    ],
    "allowed_token_ids": [[], (), [-1], [1.0], [True], ["1"], 5, "12", b"12", {1: 2}, [None], [NAN]],
    "bad_words": ["ab", [""], [" "], [5], 5, b"a", [b"a"], [None], {"a": 1}, True],
    "response_format": [
        "json",
        5,
        [],
        {},
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"schema": "{}"}},
        {"type": "json_schema", "json_schema": {"schema": {"enum": [NAN]}}},
        {"type": "json_schema", "json_schema": {"schema": {"enum": [b"a"]}}},
        {"type": "grammar", "syntax": "gbnf", "definition": "a"},
        {"type": "grammar", "syntax": "regex", "definition": 5},
    ],
    "logits_processors": ["ab", [""], [" "], [5], 5, [len], {"a": 1}, True],
    "seed": [-1, 2**64, 1.0, True, "1", NAN],
    "stop": ["", [""], ["a", ""], [5], 5, b"a", [b"a"], [None], {"a": 1}, True],
    "stop_token_ids": [[-1], [1.0], [True], ["1"], 5, "12", b"12", {1: 2}, [None], [NAN]],
    "min_tokens": [-1, 17, 2**31, 1.0, True, "1", None],
    "max_tokens": [-1, 2**31, 2**63, 1.0, True, "1", NAN],
    "logprobs": [-1, 21, 1.0, True, "1"],
    "prompt_logprobs": [-1, 21, 1.0, True, "1"],
    "ignore_eos": [0, 1, None, "yes"],
    "skip_special_tokens": [0, 1, None, "yes"],
}


def test_every_field_is_checked() -> None:
    assert set(BAD_FIELDS) == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    ("field", "value"), [pytest.param(f, v, id=f"{f}={v!r:.20}") for f, values in BAD_FIELDS.items() for v in values]
)
def test_bad_values_name_their_field(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 1024, "temperature": 0, "top_p": 1, "top_k": -1, "min_p": 1, "seed": 2**64 - 1},
        {"temperature": 1e-9, "top_p": 1e-300, "top_k": 2**31 - 1, "min_p": 1e-300, "seed": 0},
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 1e-6, "max_tokens": None},
        {"logit_bias": {0: 100, np.int64(5): np.float32(-100)}, "logprobs": 0, "prompt_logprobs": 20},
        {"min_tokens": 16, "max_tokens": 16, "ignore_eos": True},
        {"min_tokens": 100, "max_tokens": None},
        {"temperature": np.float32(0.5), "top_k": np.int32(5), "stop_token_ids": np.asarray([1, 2])},
        {"stop": ["é", "\n\n"], "stop_token_ids": (0, 2**31)},
        {"stop": None, "stop_token_ids": None, "logit_bias": None, "allowed_token_ids": None},
        {"allowed_token_ids": np.asarray([3, 1])},
        {"allowed_token_ids": range(5)},
        {"bad_words": None, "logits_processors": None, "response_format": None},
        {"bad_words": ["a b", "é"], "response_format": {"type": "text"}, "logits_processors": ("x",)},
    ],
)
def test_limits_themselves_are_in_range(fields: dict[str, Any]) -> None:
    SamplingParams(**fields)


LISTS = ("stop", "stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words", "logits_processors")


@given(
    field=st.sampled_from([field for field in BAD_FIELDS if field not in LISTS]),
    value=st.one_of(st.floats(), st.integers(), st.text(max_size=3), st.booleans(), st.none()),
)
def test_any_value_is_taken_or_refused_by_name(field: str, value: Any) -> None:
    fields = {"max_tokens": None, field: value}
    error = None
    try:
        params = SamplingParams(**fields)
    except RequestError as caught:
        error = caught
    if error:
        assert error.param == field
    else:
        assert getattr(params, field) is value
        # Whatever was taken survives the trip to the device.
        _, state = make_sampler([params], [[0]], 8)
        for number in (state.temperature, state.top_p, state.min_p, state.repetition, state.presence, state.frequency):
            assert np.isfinite(number).all()


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["ab", "c"]).stop == ("ab", "c")
    assert SamplingParams(stop=None).stop == ()


@pytest.mark.parametrize(
    ("response_format", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar("json_schema", '{"type": "object"}')),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"b": "é", "a": 1}}},
            Grammar("json_schema", '{"b": "é", "a": 1}'),
        ),
        ({"type": "grammar", "syntax": "regex", "definition": "a+"}, Grammar.regex("a+")),
        ({"type": "grammar", "syntax": "lark", "definition": "start: A"}, Grammar.lark("start: A")),
        (Grammar.json_schema("{}"), Grammar("json_schema", "{}")),
    ],
)
def test_shapes_of_a_response_format(response_format: Any, grammar: Grammar | None) -> None:
    params = SamplingParams(response_format=response_format)
    assert params.response_format == grammar
    assert hash(params.response_format) == hash(grammar)
    assert params.constrained == (grammar is not None)
    assert pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, seed=1).response_format == grammar


@pytest.mark.parametrize("wrong", [("gbnf", "a"), ("regex", 5)])
def test_what_is_no_grammar(wrong: tuple[Any, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        Grammar(*wrong)
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids", "allowed_token_ids"])
def test_ids_outside_of_the_vocabulary(field: str) -> None:
    def params(token: int) -> SamplingParams:
        return SamplingParams(**{field: {token: 1.0} if field == "logit_bias" else [token]})

    params(9).check_vocab(10)
    with pytest.raises(RequestError, match="10") as caught:
        make_sampler([params(10)], [[0]], 10)
    assert caught.value.param == field


def test_params_are_immutable() -> None:
    params: Any = SamplingParams(logit_bias={1: 1.0})
    assert isinstance(params.logit_bias, Mapping)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 0.0


def test_a_missing_seed_draws_one() -> None:
    seeds = {tuple(make_sampler([SamplingParams()], [[]], 4)[1].seed[0].tolist()) for _ in range(5)}
    assert len(seeds) == 5
    _, state = make_sampler([SamplingParams(), SamplingParams()], [[], []], 4)
    assert state.seed[0].tolist() != state.seed[1].tolist()
    _, state = make_sampler([SamplingParams(seed=2**63 + 7)], [[]], 4)
    assert state.seed.tolist() == [[2**31, 7]]


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=4))
def test_stop_ids_come_in_few_widths(counts: list[int]) -> None:
    """The number of stop ids makes no program of its own, and no id is lost."""
    params = [SamplingParams(stop_token_ids=list(range(10, 10 + n))) for n in counts]
    _, state = make_sampler(params, [[]] * len(params), 64, eos_token_ids=[3, 3])
    assert state.stop_ids.shape[1] in (16, 32, 64)
    for row, n in zip(state.stop_ids.tolist(), counts, strict=True):
        assert sorted(t for t in row if t >= 0) == [3, *range(10, 10 + n)]
