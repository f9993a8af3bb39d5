"""The host's say in each token, in the engine: against a loop that knows neither engine nor masks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from engines import Asked, alone, run, small_settings, some_requests, tiny_model, tokens
from scheduler_cases import host, ids, sequence, step_now

from llama_jax.engine.core import Core
from llama_jax.engine.rules import Rule
from llama_jax.sampling import BadWords, Constraint, SamplingParams, token_mask

VOCAB = 40


class Listed:
    """Allows the tokens that a function of the text lists, and ends or fails where functions say so."""

    def __init__(
        self,
        allowed: Callable[[list[int]], set[int]],
        ends: Callable[[list[int]], bool] = lambda text: False,
        fails: Callable[[list[int]], str | None] = lambda text: None,
    ):
        self.text: list[int] = []
        self._allowed, self._ends, self._fails = allowed, ends, fails

    def mask(self, out: np.ndarray) -> None:
        time.sleep(0.001 * (len(self.text) % 3))
        for token in set(range(VOCAB)) - self._allowed(self.text):
            token_mask.forbid(out, token)

    def accept(self, token: int) -> None:
        assert token in self._allowed(self.text)
        self.text.append(token)

    @property
    def ended(self) -> bool:
        return self._ends(self.text)

    @property
    def error(self) -> str | None:
        return self._fails(self.text)


def by_parity(text: list[int]) -> set[int]:
    """Every other token is even; the sum of the last three decides a third that may not come."""
    return {t for t in range(VOCAB) if t % 2 == len(text) % 2 and t % 3 != sum(text[-3:]) % 3}


def listed(allowed: set[int]) -> list[bool]:
    return [token in allowed for token in range(VOCAB)]


def without(words: list[list[int]]) -> Callable[[list[int]], set[int]]:
    """The rule of bad words, spelled out."""
    return lambda text: {t for t in range(VOCAB) if not any([*text, t][-len(word) :] == word for word in words)}


def nothing_is_held(core: Core) -> None:
    counts = core.snapshot().counts
    assert (counts.running, counts.waiting, counts.pages_used, counts.pages_fenced) == (0, 0, 0, 0)


def mixture(count: int) -> tuple[list[Asked], dict[int, Any], dict[int, Any]]:
    """Requests of every kind, with constraints on two of three, and what these allow."""
    model = tiny_model()
    asked = some_requests(model, count)
    constraints: dict[int, Any] = {}
    allowed: dict[int, Any] = {}
    for i, request in enumerate(asked):
        free = list(alone(model, request).tokens)
        words = [free[a : a + n] for a, n in ((0, 1), (2, 2), (4, 3)) if len(free[a : a + n]) == n]
        if i % 3 == 1:
            constraints[i], allowed[i] = [BadWords(words)], without(words)
        elif i % 3 == 2:
            constraints[i] = [Listed(by_parity), BadWords(words)]
            allowed[i] = lambda text, words=words: by_parity(text) & without(words)(text)
    return asked, constraints, allowed


@pytest.mark.parametrize("changes", [{}, pytest.param({"steps": 4}, marks=pytest.mark.slow)], ids=str)
def test_tokens_are_those_of_a_loop_without_engine(changes: dict[str, int]) -> None:
    """With arrivals at any time; neighbours draw what they draw alone."""
    model = tiny_model()
    core = Core(model, small_settings(**changes))
    asked, constraints, allowed = mixture(9)
    news = run(core, asked, arrivals=[i % 7 for i in range(9)], constraints=constraints)
    changed = 0
    for i, request in enumerate(asked):
        free = alone(model, request)
        only = allowed.get(i)
        expected = free if only is None else alone(model, request, lambda drawn, only=only: listed(only(drawn)))
        assert tokens(news[i]) == expected.tokens
        assert news[i][-1].ending == expected.ending
        assert news[i][-1].error is None
        changed += expected.tokens != free.tokens
    assert changed >= 5
    nothing_is_held(core)


@pytest.mark.slow
def test_preempted_rows_keep_their_constraints() -> None:
    model = tiny_model()
    core = Core(model, small_settings(pages=6))
    asked = [
        ([3 + i, 4, 5 + i], SamplingParams(seed=i, temperature=i % 2, max_tokens=40, ignore_eos=True)) for i in range(5)
    ]
    news = run(core, asked, constraints={i: [Listed(by_parity)] for i in range(5)})
    for request, ours in zip(asked, news, strict=True):
        assert tokens(ours) == alone(model, request, lambda drawn: listed(by_parity(drawn))).tokens
    assert core.snapshot().counts.preemptions > 0
    nothing_is_held(core)


def test_the_end_of_a_constraint_is_the_end_of_the_text() -> None:
    """Also with the last token that there may be."""
    core = Core(tiny_model(), small_settings())
    for limit in (8, 3):
        params = SamplingParams(temperature=0.0, max_tokens=limit, ignore_eos=True)
        rule = Listed(lambda text: set(range(VOCAB)), ends=lambda text: len(text) == 3)
        free, bound = run(core, [([5, 6], params)] * 2, constraints={1: [rule]})
        assert tokens(bound) == tokens(free)[:3]
        assert bound[-1].ending == "stop"
    nothing_is_held(core)


class _Broken(Listed):
    def __init__(self, where: str, error: type[BaseException] = ValueError):
        super().__init__(lambda text: set(range(VOCAB)))
        self._where, self._error = where, error

    def _maybe(self, where: str) -> None:
        if where == self._where and len(self.text) >= 2:
            raise self._error(f"broken {where}")

    def mask(self, out: np.ndarray) -> None:
        self._maybe("mask")

    def accept(self, token: int) -> None:
        super().accept(token)
        self._maybe("accept")

    @property
    def ended(self) -> bool:
        self._maybe("ended")
        return False

    @property
    def error(self) -> str | None:
        self._maybe("error")
        return None


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (Listed(lambda text: set() if len(text) == 2 else {5, 6, 7}), "the constraints allow no token"),
        (Listed(lambda text: {5, 6, 7}, fails=lambda text: "too deep" if len(text) == 2 else None), "too deep"),
        *((_Broken(where), f"ValueError: broken {where}") for where in ("mask", "accept", "ended", "error")),
        *((_Broken(where, SystemExit), f"SystemExit: broken {where}") for where in ("mask", "accept")),
    ],
    ids=["no token", "error", "mask", "accept", "ended", "property", "mask exits", "accept exits"],
)
def test_a_dead_end_ends_its_sequence_alone(rule: Constraint, says: str) -> None:
    """Tokens that it had drawn stay; the others continue; the same prompt is computed as if nothing had been."""
    model = tiny_model()
    core = Core(model, small_settings())
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    asked = [([5, 6, 7], params), ([5, 6, 7], params), ([8, 9], params)]
    before, dead, after = run(core, asked, constraints={1: [rule]})
    assert (dead[-1].ending, dead[-1].error) == ("failed", says)
    assert len(tokens(dead)) == 2
    for request, news in ((asked[0], before), (asked[2], after)):
        assert tokens(news) == alone(model, request).tokens
    nothing_is_held(core)


def test_cancelled_at_any_moment() -> None:
    """Before its prompt, between two steps, and when its next mask is being computed."""
    model = tiny_model()
    core = Core(model, small_settings())
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    for steps in range(8):
        number = core.add([5, 6, 7] * 9, params, 30, rule=Rule([Listed(by_parity)], params, VOCAB))
        other = core.add([4, 3], params, 6)
        drawn: list[int] = []
        for step in range(60):
            if step == steps:
                core.cancel(number)
            news = core.step()
            assert not [new for new in news if new.id == number and step >= steps]
            drawn += [token for new in news if new.id == other for token in new.tokens]
            if core.idle:
                break
        assert tuple(drawn) == alone(model, ([4, 3], params)).tokens[:6]
        nothing_is_held(core)


@pytest.mark.slow
def test_nothing_is_compiled_for_constraints_after_ready() -> None:
    core = Core(tiny_model(), small_settings())
    list(core.programs.compile_all())
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        asked, constraints, _ = mixture(9)
        compiled.clear()  # those of the loop without engine
        run(core, asked, constraints=constraints)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not [name for name in compiled if "backend_compile" in name]
    assert core.snapshot().late_compilations == 0


@pytest.mark.slow
def test_more_rows_than_one_call_gives_masks_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_jax.engine.program_set.MASKED", 2)
    model = tiny_model()
    core = Core(model, small_settings(stop_ids=65))  # sizes that no other test has
    asked = [([3 + i], SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)) for i in range(3)]
    for request, news in zip(
        asked, run(core, asked, constraints={i: [Listed(by_parity)] for i in range(3)}), strict=True
    ):
        assert tokens(news) == alone(model, request, lambda drawn: listed(by_parity(drawn))).tokens


def test_allowed_ids_and_constraints_hold_together() -> None:
    rule = Rule([BadWords([[4]])], SamplingParams(allowed_token_ids=[3, 4, 33]), VOCAB)
    assert rule.ahead.masks[0].tolist() == token_mask.only([3, 33], VOCAB).tolist()
    rule = Rule([BadWords([[4]])], SamplingParams(), VOCAB)
    assert rule.ahead.masks[0].tolist() == token_mask.only(set(range(VOCAB)) - {4}, VOCAB).tolist()


# --- Which steps they are in


def test_the_next_step_does_not_wait_for_the_host() -> None:
    """Two go on, the third is drawn for again when its token is known."""
    h = host(rows=4)
    for id in range(3):
        h.add(sequence(id, 2, 9, paced=id == 2))
    assert ids(h.schedule()) == ([0, 1, 2], [])
    assert ids(h.schedule()) == ([], [0, 1])
    h.deliver()
    assert ids(h.schedule()) == ([], [0, 1, 2])
    assert ids(h.schedule()) == ([], [0, 1])
    h.drain(40)


def test_it_waits_where_most_rows_would_not_be_in_it() -> None:
    h = host(rows=4)
    for id in range(3):
        h.add(sequence(id, 2, 9, paced=id != 2))
    assert ids(h.schedule()) == ([0, 1, 2], [])
    assert h.schedule() is None
    h.add(sequence(3, 2, 1))  # but for a prompt it does not
    assert ids(h.schedule()) == ([3], [2])
    h.deliver()
    assert ids(h.schedule()) == ([], [0, 1, 2])
    h.drain(40)


def test_one_step_at_a_time() -> None:
    h = host(rows=4, steps=4)
    for id in range(3):
        h.add(sequence(id, 2, 13 if id else 6, paced=id == 0))
    step_now(h)
    steps = []
    while h.live:
        steps.append((h.live.get(0) is not None, step_now(h).steps))
    assert {count for paced, count in steps if paced} == {1}
    assert [count for paced, count in steps if not paced] == [4, 3]
